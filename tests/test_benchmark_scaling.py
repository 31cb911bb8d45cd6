"""The comparison of one process with several: what it writes, and that it sees what is wrong.

pytest tests/test_benchmark_scaling.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling, scaling_ways
from benchmarks.overlap import overlap
from benchmarks.scaling_ways import Worker
from flashgpt.train import wrapping
from flashgpt.train.parallel import Parallel


def test_several_processes_are_measured_beside_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On two cores; FSDP2 goes the same way and is left out for its time."""
    command = ["--device", "cpu", "--tiny", "--ways", "ddp", "--out", str(tmp_path)]
    assert scaling.main(command) == 0
    single, ddp = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert (single["processes"], ddp["processes"]) == (1, 2)
    for row in (single, ddp):
        assert len(row["losses"]) == 5 and len(row["ms"]) == 3 and row["peak_bytes"] > 0
        tokens = 2 * 32 * row["processes"]
        middle = statistics.median(row["ms"])
        assert row["tokens_per_second"] == pytest.approx(tokens / middle * 1e3)
    assert ddp["agrees"] and ddp["drift"] < 1e-5
    assert ddp["speedup"] == ddp["tokens_per_second"] / single["tokens_per_second"]
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["way"] for row in last] == ["single", "ddp"]


def row(way: str, **more: Any) -> dict[str, Any]:
    return {"way": way, "processes": 2, "ms": [1.0], "tokens_per_second": 10.0, **more}


def test_losses_that_drift_further_than_the_control_disagree() -> None:
    single = row("single", losses=[5.0, 4.0], control=[5.0, 4.001])
    near, far = row("ddp", losses=[5.0, 4.0029]), row("fsdp", losses=[5.0, 4.0031])
    scaling.compare([single, near, far])
    assert (near["agrees"], far["agrees"]) == (True, False)


def test_fsdp_is_held_to_one_process_compiled_in_the_same_way() -> None:
    single = row("single", losses=[5.0, 4.0], control=[5.0, 4.001])
    blocks = row("blocks", losses=[5.0, 4.1], control=[5.0, 4.102])
    fsdp = row("fsdp", losses=[5.0, 4.105])
    scaling.compare([single, blocks, fsdp])
    assert fsdp["agrees"] and fsdp["drift"] == pytest.approx(0.005)
    assert blocks["drift"] == pytest.approx(0.1) and "agrees" not in blocks


def test_blocks_are_compiled_one_by_one() -> None:
    worker = Worker("blocks", scaling.size(tiny=True), "cpu", 2, Parallel())
    with scaling_ways.compiling_blocks():
        assert wrapping.compile_module(worker.parts.model) == worker.parts.model.__call__
    assert all("forward" in vars(block) for block in worker.parts.model.h)


def test_a_way_that_fails_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def launch(way: str, *_: object) -> dict[str, Any]:
        if way == "fsdp":
            return {"way": way, "failed": "ended with status 1"}
        return row(way, losses=[5.0], control=[5.0], peak_bytes=1)

    monkeypatch.setattr(scaling, "launch", launch)
    assert scaling.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 1
    assert "fsdp     failed: ended with status 1" in capsys.readouterr().out


def test_overlap_is_what_stands_beside_computing() -> None:
    """Two kernels of NCCL, of 30 and 10 us; 15 us of them beside computing."""

    def kernel(name: str, start: float, duration: float) -> dict[str, Any]:
        return {"cat": "kernel", "name": name, "ts": start, "dur": duration}

    events = [
        kernel("gemm", 0, 10),
        kernel("gemm", 5, 10),  # beside the first
        kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL(x)", 5, 30),
        kernel("adamw", 30, 10),
        kernel("ncclDevKernel_ReduceScatter(x)", 100, 10),
        {"cat": "cpu_op", "name": "nccl:all_reduce", "ts": 0, "dur": 1000},
    ]
    found = overlap(events, steps=2)
    assert found["nccl_ms"] == pytest.approx(0.02)
    assert found["compute_ms"] == pytest.approx(0.0125)
    assert found["overlapped"] == pytest.approx(15 / 40)
    assert found["nccl_kernels"]["ncclDevKernel_ReduceScatter"] == pytest.approx(0.005)
    assert overlap([], steps=1)["overlapped"] == 1.0
