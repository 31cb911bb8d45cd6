"""Who a process is, by what torchrun tells it. pytest tests/test_launch.py"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashgpt.launch import Launch

TOLD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "LOCAL_RANK": "1"}
TOLD |= {"TORCHELASTIC_RESTART_COUNT": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TOLD:
        monkeypatch.delenv(name, raising=False)
    assert Launch.here() == Launch(rank=0, size=1)
    monkeypatch.setenv("WORLD_SIZE", "8")  # some schedulers set it by themselves
    assert Launch.here() == Launch(rank=0, size=1)


def test_torchrun_tells_who_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TOLD.items():
        monkeypatch.setenv(name, value)
    assert Launch.here() == Launch(1, 2, 1, 3, keeps_store=True)


def test_restarts_on_several_machines_need_a_store_of_their_own(
    monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    for name, value in {**TOLD, "RANK": "0", "TORCHELASTIC_MAX_RESTARTS": "3"}.items():
        monkeypatch.setenv(name, value)
    Launch.here().check()
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    refused = cli("train", "--out", "none")
    assert refused.status == 2
    assert "needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; export it" in refused.err
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    Launch.here().check()


def test_other_verbs_are_for_one_process(
    monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any], tmp_path: Path
) -> None:
    """Said once, by the first process."""
    for name, value in TOLD.items():
        monkeypatch.setenv(name, value)
    second = cli("evaluate", tmp_path)
    assert (second.status, second.err) == (2, "")
    monkeypatch.setenv("RANK", "0")
    first = cli("evaluate", tmp_path)
    assert first.err == "flashgpt[0]: evaluate is for one process; leave torchrun out\n"
    assert cli("train", "--print-config").status == 2


@pytest.mark.parametrize("starts_from_weights", [False, True])
def test_what_torchrun_starts_again_goes_on(
    starts_from_weights: bool,
    trained: Any,
    options: list[str],
    text: Path,
    tmp_path: Path,
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the very command that started it; a run that started from weights with its own."""
    command = ["train", *options]
    if starts_from_weights:
        command = ["train", "--model.init-from", trained.folder, "--data.source", text]
        command += ["--data.cache", tmp_path / "data", "--train.tokens-per-step", 128]
    command += ["--out", tmp_path / "run", "--train.steps", 4]
    cli(*command, "--train.stop-at", 2).done()
    assert "holds checkpoints; go on with --resume" in cli(*command).error(1)
    for name, value in {**TOLD, "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    shown = " ".join(cli(*command).done().split())
    assert f"goes on from {tmp_path / 'run'}/checkpoints/step_00000002" in shown
    assert "starts from the weights" not in shown
