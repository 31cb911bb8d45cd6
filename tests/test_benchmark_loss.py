"""The loss's script: what it measures and writes, and that it sees what is wrong.

pytest tests/test_benchmark_loss.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import loss as script
from flashgpt.model import loss as loss_module
from flashgpt.model.loss import linear_cross_entropy

SMALL = ["--rows", "40", "70", "--emb-dim", "16", "--vocab-size", "300", "--rounds", "2", "--ways"]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs the script on ways: status and the object that it wrote."""

    def main(*ways: str) -> tuple[int, dict[str, Any]]:
        status = script.main([*SMALL, *ways, "--out", str(tmp_path / "out")])
        return status, json.loads((tmp_path / "out" / "loss.json").read_text())

    return main


def test_all_ways_are_timed_and_right(
    run: Callable[..., tuple[int, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    status, record = run("ours", "operators", "eager")
    assert status == 0
    found = [(row["rows"], row["way"]) for row in record["ways"]]
    assert found == [(m, way) for m in (40, 70) for way in ("ours", "operators", "eager")]
    precise = record["constants"]["products"] == "fp32"
    for row in record["ways"]:
        assert len(row["ms"]) == 2 * script.CALLS and min(row["ms"]) > 0 < row["peak_bytes"]
        assert all(0 < error < (1e-5 if precise else 0.02) for error in row["errors"].values())
    assert {"device", "torch", "revision"} <= record["machine"].keys()
    table = capsys.readouterr().out.splitlines()[-7:-1]
    assert [line.split()[:2] for line in table] == [[str(m), way] for m, way in found]


def broken(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(x, weight, targets.roll(1))


def scaled(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    loss = linear_cross_entropy(x, weight, targets)
    return loss.detach() + 1.02 * (loss - loss.detach())


@pytest.mark.parametrize("fault", [broken, scaled])
def test_a_wrong_way_is_told(
    fault: script.Loss,
    run: Callable[..., tuple[int, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "plain", fault)
    assert run("ours", "eager")[0] == 1
    table = capsys.readouterr().out.splitlines()[-5:-1]
    assert [line.endswith("WRONG") for line in table] == [False, True, False, True]


@pytest.mark.parametrize(("name", "status"), [("plain", 0), ("linear_cross_entropy", 1)])
def test_a_way_that_fails_does_not_stop_the_others(
    name: str,
    status: int,
    run: Callable[..., tuple[int, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(script, name, fail)
    found, record = run("ours", "eager")
    assert found == status
    failed = {row["way"] for row in record["ways"] if "failed" in row}
    assert failed == {"eager" if name == "plain" else "ours"}
    assert sum(len(row["ms"]) == 2 * script.CALLS for row in record["ways"]) == 2


def test_the_sweep_tries_sizes_and_leaves_the_kernel_as_it_was() -> None:
    pytest.importorskip("triton")
    from flashgpt.model import triton_loss

    own = triton_loss.PIECES, triton_loss.WARPS, loss_module.CHUNK_ROWS_TRITON
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = script.kernel(1, 300, torch.float32, device, sweep=True)
    sizes = [(row["pieces"], row["warps"]) for row in found]
    assert sizes[0] == own[:2] and own[:2] in sizes[1:] and len(set(sizes)) == len(sizes) - 1
    assert all(row["ms"] > 0 for row in found)
    small = script.options([*SMALL, "ours"])
    assert [row["chunk_rows"] for row in script.chunks(small, device)] == [*script.SWEPT_CHUNKS]
    assert own == (triton_loss.PIECES, triton_loss.WARPS, loss_module.CHUNK_ROWS_TRITON)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a CUDA device")
def test_a_sweep_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--sweep"])
    assert "needs a CUDA device" in capsys.readouterr().err
