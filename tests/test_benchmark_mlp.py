"""The script that tries products with GELU at their end: what it writes, and that it sees faults.

pytest tests/test_benchmark_mlp.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

pytest.importorskip("triton")

from benchmarks import mlp as script
from flashgpt.model import triton_mlp
from flashgpt.model.triton_mlp import CUT, Cut

Main = Callable[[], tuple[int, dict[str, Any]]]
OTHER = Cut(64, 64, 32, 4, 2)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Main:
    """Runs the script on a tiny shape: status and the object that it wrote."""
    monkeypatch.setattr(script, "OTHER_CUTS", {"triton": (OTHER,)})
    monkeypatch.setattr(script, "languages", lambda device: {"triton": triton_mlp})

    def main() -> tuple[int, dict[str, Any]]:
        out = tmp_path / "made" / "here"
        status = script.main(["--rows", "70", "--width", "24", "--rounds", "2", "--out", str(out)])
        return status, json.loads((out / "mlp.json").read_text())

    return main


def test_every_way_is_measured_and_held_to_fp32(
    run: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    status, record = run()
    assert status == 0
    cuts = ["triton 128 128 64 4 3", "triton 64 64 32 4 2"]
    found = [(row["gelu"], row["part"], row["way"]) for row in record["rows"]]
    assert found == [
        (form, part, way)
        for form in ("gelu", "gelu_new")
        for part in ("backward", "forward")
        for way in ("product", "apart", *cuts)
    ]
    for row in record["rows"]:
        assert len(row["all_ms"]) == 2 and row["ms"] > 0
        assert (row["error"] == 0) == (row["way"] == "product")
    assert {"device", "torch", "revision"} <= record["machine"].keys()
    lines = capsys.readouterr().out.splitlines()
    last = json.loads(lines[-1])
    assert last["right"] and [row["way"] for row in last["rows"]] == [way for *_, way in found]
    assert [line for line in lines if line.endswith("WRONG")] == []


@pytest.mark.parametrize("kernel", ["linear_gelu", "matmul_dgelu"])
def test_a_wrong_result_is_told(
    kernel: str, run: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = getattr(triton_mlp, kernel)

    def wrong(*given: Any) -> tuple[Tensor, Tensor]:
        first, second = right(*given)
        first[-1, -1] += first.abs().max() / 64
        return first, second

    monkeypatch.setattr(triton_mlp, kernel, wrong)
    assert run()[0] == 1
    assert sum(line.endswith("WRONG") for line in capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize(("failing", "status"), [(CUT, 1), (OTHER, 0)])
def test_a_cut_that_fails_does_not_stop_the_others(
    failing: Cut,
    status: int,
    run: Main,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kernel = triton_mlp.matmul_dgelu

    def fail(*given: Any) -> tuple[Tensor, Tensor]:
        if given[-1] == failing:
            raise RuntimeError("out of resource: shared memory")
        return kernel(*given)

    monkeypatch.setattr(triton_mlp, "matmul_dgelu", fail)
    found, record = run()
    assert found == status
    failed = [row for row in record["rows"] if "failed" in row]
    assert len(failed) == 2 and all("ms" not in row for row in failed)
    assert len(record["rows"]) - len(failed) == 14
    assert capsys.readouterr().out.count("failed: RuntimeError: out of resource") == 2


@pytest.mark.parametrize(("name", "value"), [("rows", "0"), ("rounds", "0"), ("width", "20")])
def test_refusals(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        script.main([f"--{name}", value])
    assert end.value.code == 2 and f"--{name} must be" in capsys.readouterr().err


def test_the_help_has_an_example_that_parses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    example = text.partition("example: python -m benchmarks.mlp ")[2].split()
    assert example and script.options(example).rows == 65536
