"""Checkpoints of every format number since the first load and go on.

The folders beside this file were written by the versions that introduced the formats: six steps, of
which the checkpoint after three is kept, and the log of all six.

pytest tests/train/test_formats.py
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashgpt.train import checkpoint

FORMATS = Path(__file__).parent / "checkpoint_formats"
# Other processors and versions of torch round otherwise; three steps at a rate of 1e-2 amplify it.
WITHIN = 1e-4


@pytest.mark.parametrize("number", range(1, checkpoint.FORMAT + 1))
def test_a_run_goes_on_from_it(
    number: int,
    tmp_path: Path,
    text: Path,
    cli: Callable[..., Any],
    trained: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(FORMATS / str(number), tmp_path / "run")
    shutil.copy(text, tmp_path / "words.txt")
    monkeypatch.chdir(tmp_path)
    run = type(trained)(tmp_path / "run")
    written = run.metrics
    assert [entry["step"] for entry in written] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in run.checkpoints] == ["step_00000003"]
    assert checkpoint.check(run.checkpoints[0]).state["format"] == number
    shown = cli("train", "--resume", "--out", "run").done()
    assert "goes on from run/checkpoints/step_00000003" in shown and "passed over" not in shown
    assert len(run.metrics) == 6
    for mine, before in zip(run.metrics, written, strict=True):
        assert mine["loss"] == pytest.approx(before["loss"], abs=WITHIN)
    again = checkpoint.check(run.checkpoints[-1])
    assert (again.step, again.state["format"]) == (6, checkpoint.FORMAT)
    other = run.metrics[3]["loss"] - run.metrics[2]["loss"]
    assert abs(other) > 10 * WITHIN  # so the comparison would see another step
