"""Kills and flipped bytes, a few of each, every time the tests run.

pytest tests/test_benchmark_faults.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import faults
from flashgpt.train import checkpoint


def test_killed_runs_end_as_the_one_left_alone_and_flips_are_found(tmp_path: Path) -> None:
    assert faults.main(["--kills", "2", "--flips", "20", "--no-disks", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "faults.json").read_text())
    assert found["kills"]["kills"] == 2 and found["kills"]["runs_finished"] >= 1
    assert len(found["kills"]["resumed_from"]) == 2
    assert len(found["flips"]["files"]) == 8


def test_the_comparison_sees_one_bit_and_a_missing_line(
    trained: Any, copied: Any, flip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "LAST", 12)
    one, other = faults.contents(trained.folder), faults.contents(copied.folder)
    assert faults.same(one, other)
    assert not faults.same(one, (other[0], other[1][:-1]))
    flip(copied.checkpoints[-1] / "model.safetensors", -3)
    assert not faults.same(one, faults.contents(copied.folder))


def test_a_flip_that_is_not_found_is_a_fault(copied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = checkpoint.file_digest
    weights = copied.checkpoints[-1] / "model.safetensors"
    stale = digest(weights)
    monkeypatch.setattr(
        checkpoint, "file_digest", lambda path: stale if path == weights else digest(path)
    )
    with pytest.raises(faults.Fault, match=r"of model.safetensors .* is found"):
        faults.flips(copied.checkpoints[-1], 20, random.Random(0))


def test_white_space_of_the_digests_counts(copied: Any) -> None:
    path = copied.checkpoints[-1] / "trainer" / "digests.json"
    text = path.read_text()
    path.write_text(text.replace("\n", " ", 1))
    with pytest.raises(checkpoint.DamagedError, match=r"digests\.json is damaged"):
        checkpoint.check(copied.checkpoints[-1])


def test_the_docs_say_what_was_found() -> None:
    root = Path(faults.__file__).parents[1]
    found = json.loads((root / "benchmarks" / "faults" / "faults.json").read_text())
    kills = found["kills"]
    page = " ".join((root / "docs" / "training.md").read_text().split())
    assert f"{kills['kills']} kills at random moments, {kills['while_saving']} of them" in page
    assert f"all {kills['runs_finished']} runs that got to their end" in page
    changed, files = found["flips"]["flips"], len(found["flips"]["files"])
    assert f"Each of {changed} changed bytes, over all {files} files" in page
    readme = " ".join((root / "README.md").read_text().split())
    assert f"Killed {kills['kills']} times" in readme and f"each of {changed} flipped" in readme
