"""`verify --run`: N + N = 2 N on the user's run, and a failure when something is not restored.

pytest tests/train/test_proof.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flashgpt.train import step
from flashgpt.train.guard import Guard
from flashgpt.train.optimizer import Optimizer
from flashgpt.train.proof import _difference
from flashgpt.train.step import dropout_seed

Cli = Callable[..., Any]


def rows(shown: str) -> dict[str, bool]:
    """What was compared, and whether it was equal."""
    lines = [line for line in shown.splitlines() if line.startswith("use_flash")]
    return {line.split("  ")[0]: line.endswith("equal") for line in lines}


def test_a_run_resumes_bit_for_bit_and_is_left_as_it_is(copied: Any, cli: Cli) -> None:
    before = {path: path.read_bytes() for path in copied.folder.rglob("*") if path.is_file()}
    ran = cli("verify", "--run", copied.folder, "--steps", 2, "--json")
    found = rows(ran.err)
    assert len(found) == 8 and all(found.values())
    assert "2 + 2 steps against 4" in ran.err and "verdict: resumes bit for bit" in ran.err
    result = json.loads(ran.done())
    assert result["passed"] and {row["use_flash"] for row in result["rows"]} == {True, False}
    assert all(row["values"] > 3 for row in result["rows"])
    after = {path: path.read_bytes() for path in copied.folder.rglob("*") if path.is_file()}
    assert after == before


def test_a_run_without_a_checkpoint_is_proven_from_its_start(
    tmp_path: Path, copied: Any, cli: Cli
) -> None:
    for path in copied.checkpoints:
        path.rename(path.with_name(f"gone_{path.name}"))
    assert "verdict: resumes bit for bit" in cli("verify", "--run", copied.folder).done()


@pytest.mark.parametrize("lost", ["moments", "guard", "masks"])
def test_what_is_not_restored_is_named(
    lost: str, copied: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lost == "moments":
        monkeypatch.setattr(Optimizer, "load_state_tensors", lambda *_: None)
    elif lost == "guard":
        monkeypatch.setattr(Guard, "load_state_tensors", lambda *_: None)
    else:
        calls = iter(range(1000))
        monkeypatch.setattr(step, "dropout_seed", lambda seed, at: dropout_seed(next(calls), at))
    ran = cli("verify", "--run", copied.folder)
    assert ran.status == 1 and "verdict: FAILED" in ran.out
    wrong = {name.split(": ")[1] for name, equal in rows(ran.out).items() if not equal}
    if lost == "guard":
        assert wrong == {"guard"}
    else:
        assert {"weights", "optimizer"} <= wrong


def test_a_difference_beside_a_nan_is_seen() -> None:
    nan = float("nan")
    one = {"x": torch.tensor([[1, nan], [2, 3]])}
    assert _difference(True, "x", one, {"x": one["x"].clone()}).passed
    for other in (
        torch.tensor([[1, nan], [9, 3]]),
        torch.tensor([[1, 0.0], [2, 3]]),
        torch.tensor([[1, nan], [2, 3], [4, 5]]),
        torch.tensor([[1, nan], [2, 3]], dtype=torch.float64),
    ):
        assert not _difference(True, "x", one, {"x": other}).passed
    assert not _difference(True, "x", one, {}).passed


def test_it_says_what_it_passed_over_and_starts_from(copied: Any, cli: Cli, flip: Any) -> None:
    flip(copied.checkpoints[-1] / "model.safetensors", 5000)
    (copied.folder / "state.json").unlink()
    shown = cli("verify", "--run", copied.folder).done()
    assert f"passed over: {copied.checkpoints[-1]}" in shown
    assert f"from {copied.checkpoints[-2]}" in shown


def test_bad_use_is_refused(cli: Cli, tmp_path: Path, copied: Any) -> None:
    assert f"{tmp_path} is no run" in cli("verify", "--run", tmp_path).error(1)
    refused = cli("verify", "--run", copied.folder, "--steps", 0).error(2)
    assert "--steps must be at least 1, got 0" in refused
    refused = cli("verify", "--run", copied.folder, "--full").error(2)
    assert "--run stands alone" in refused
    assert "--steps is for --run" in cli("verify", "--steps", 2).error(2)
