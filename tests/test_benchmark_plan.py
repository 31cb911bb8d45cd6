"""The script that holds `plan`'s predictions against measurements.

pytest tests/test_benchmark_plan.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import plan
from flashgpt.measure import step_sample


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_sample, "TIMED_SECONDS", 0.0)


def run(folder: Path, *more: str) -> tuple[int, dict[str, Any]]:
    status = plan.main(["--tiny", "--rows", "32", "--out", str(folder), *more])
    return status, json.loads((folder / "plan.json").read_text())


def test_large_micro_batches_are_predicted_and_then_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, record = run(tmp_path)
    claims = record["claims"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == claims
    assert [(row["way"], row["micro_batch"]) for row in record["rows"]] == [
        ("use_flash on", 16),
        ("use_flash on", 32),
        ("use_flash off", 8),
        ("use_flash on, blocks recomputed", 32),
    ]
    assert not record["missing"] and [s["rows"] for s in record["rows"][0]["from"]] == [2, 4]
    assert claims["memory_error"] < plan.MEMORY_LIMIT
    assert claims["memory_error"] == max(abs(row["memory_error"]) for row in record["rows"])
    assert status == (0 if claims["hold"] else 1)
    assert claims["hold"] is (claims["speed_error"] <= plan.SPEED_LIMIT)


def test_what_is_not_measured_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(plan, "sample", full)
    status, record = run(tmp_path)
    assert status == 1 and not record["rows"] and not record["claims"]["hold"]
    assert {one["reason"] for one in record["missing"]} == {"out of memory"}
    assert len(record["missing"]) == 10
    status, record = run(tmp_path, "--seconds", "1e-9")
    assert status == 1 and {one["reason"] for one in record["missing"]} == {"no time left"}


@pytest.mark.parametrize(
    ("memory", "speed", "hold"), [(0.04, -0.09, 1), (-0.06, 0, 0), (0, 0.2, 0)]
)
def test_the_claims_are_judged(memory: float, speed: float, hold: int) -> None:
    rows = [
        {"memory_error": 0.0, "speed_error": 0.0},
        {"memory_error": memory, "speed_error": speed},
    ]
    found = plan.judge(rows)
    assert found == {"hold": bool(hold), "memory_error": abs(memory), "speed_error": abs(speed)}
