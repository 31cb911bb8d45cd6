"""Who a process is, by what torchrun tells it. pytest tests/test_launch.py"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashgpt.launch import Launch

TOLD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "LOCAL_RANK": "1"}
TOLD |= {"TORCHELASTIC_RESTART_COUNT": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
TOLD |= {"TORCHELASTIC_RUN_ID": "this"}
FIRST = TOLD | {"RANK": "0", "LOCAL_RANK": "0"}


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TOLD:
        monkeypatch.delenv(name, raising=False)
    assert Launch.here() == Launch(rank=0, size=1)
    monkeypatch.setenv("WORLD_SIZE", "8")  # some schedulers set it by themselves
    assert Launch.here() == Launch(rank=0, size=1)


def test_torchrun_tells_who_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TOLD.items():
        monkeypatch.setenv(name, value)
    assert Launch.here() == Launch(1, 2, 1, 3, name="this", keeps_store=True)


def test_restarts_on_several_machines_need_a_store_of_their_own(
    monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    for name, value in {**FIRST, "TORCHELASTIC_MAX_RESTARTS": "3"}.items():
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
    """Said once, by the first process, which torchrun would end if another one left before."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for name, value in TOLD.items():
        monkeypatch.setenv(name, value)
    second = cli("evaluate", tmp_path)
    assert (second.status, second.err, waited) == (2, "", [20.0])
    for name, value in FIRST.items():
        monkeypatch.setenv(name, value)
    first = cli("evaluate", tmp_path)
    assert first.err == "flashgpt[0]: evaluate is for one process; leave torchrun out\n"
    assert len(waited) == 1
    assert cli("train", "--print-config").status == 2


def test_a_process_that_fails_says_why_and_leaves_at_once() -> None:
    """Not by Python's own way out, which threads of a process group may block or abort."""
    code = "import atexit, runpy; atexit.register(print, 'own way')\n"
    code += "runpy.run_module('flashgpt', run_name='__main__')"
    for told, shown in ((FIRST, ""), ({}, "own way\n")):
        env = {name: value for name, value in os.environ.items() if name not in FIRST} | told
        command = [sys.executable, "-c", code, "trian"]
        left = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert (left.returncode, left.stdout) == (2, shown)
        assert "unknown verb 'trian'; did you mean 'train'?" in left.stderr


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
    """By the very command that started it; a run that started from weights with its own. But not
    what another launch trained: there nothing is touched, however often torchrun tries."""
    command = ["train", *options]
    if starts_from_weights:
        command = ["train", "--model.init-from", trained.folder, "--data.source", text]
        command += ["--data.cache", tmp_path / "data", "--train.tokens-per-step", 128]
    command += ["--out", tmp_path / "run", "--train.steps", 4]
    for name, value in {**FIRST, "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)

    def launched(name: str, restarts: int, *more: Any) -> Any:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        return cli(*command, *more)

    launched("this", 0, "--train.stop-at", 2).done()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("step_*/*")}
    for restarts in (0, 1, 2):
        refused = launched("other", restarts).error(1)
        assert "holds checkpoints; go on with --resume" in refused
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("step_*/*")
    }
    shown = " ".join(launched("this", 1).done().split())
    assert f"goes on from {tmp_path / 'run'}/checkpoints/step_00000002" in shown
    assert "starts from the weights" not in shown
    for restarts in (0, 1):  # a new launch by the same name
        refused = launched("this", restarts, "--train.steps", 6).error(1)
        assert "holds checkpoints; go on with --resume" in refused


def test_a_restart_before_there_is_a_run_begins_one(
    options: list[str], tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**FIRST, "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "file").touch()
    assert "is a file; choose another" in cli("train", *options, "--out", tmp_path / "file").error(
        1
    )
    cli("train", *options, "--out", tmp_path / "run", "--train.steps", 2).done()
    monkeypatch.delenv("RANK")
    cli("train", "--resume", "--out", tmp_path / "run", "--train.steps", 3).done()
    assert not (tmp_path / "run" / "launch").exists()
