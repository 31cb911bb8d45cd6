"""Half precision on the CPU: where it is refused, and a run in it.

pytest tests/test_half_on_cpu.py
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flashgpt import half_on_cpu
from flashgpt.half_on_cpu import SLOWEST, refusal
from flashgpt.train import runtime

CPU = torch.device("cpu")


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Puts a program of its own in the place of the trial."""

    def put(program: str) -> None:
        (tmp_path / "trial.py").write_text(program)
        monkeypatch.setattr(half_on_cpu, "__file__", str(tmp_path / "trial.py"))

    refusal.cache_clear()
    yield put
    refusal.cache_clear()


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os; os.abort()", "where bf16 products end the process (SIGABRT)"),
        ("1 / 0", "where a trial of bf16 products failed (ZeroDivisionError: division by zero)"),
        ("pass", "where a trial of bf16 products failed (without a word)"),
        (
            "print('hello'); print(0.00645)",
            "where bf16 products have 0.0065 times the speed of fp32's",
        ),
        (f"print({SLOWEST})", None),
        ("print('a line of a library'); print(3.5)", None),
        ("import os; print(0 if 'ONEDNN_VERBOSE' in os.environ else 1)", None),
    ],
)
def test_a_cpu_is_refused_by_what_its_trial_finds(
    trial: Callable[[str], None], program: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_VERBOSE", "1")
    trial(program)
    if reason is None:
        assert runtime.autocast_dtype("bf16", CPU) is torch.bfloat16
        return
    with pytest.raises(ValueError, match=r"must be fp32 \(or auto\) on this CPU") as refused:
        runtime.autocast_dtype("bf16", CPU)
    assert str(refused.value).endswith(f"{reason}; got 'bf16'")


def test_a_trial_without_an_end_is_a_refusal(
    trial: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial("while True: pass")
    monkeypatch.setattr(half_on_cpu, "MOST_SECONDS", 0.5)
    with pytest.raises(ValueError, match=r"products took more than 0\.5 s"):
        runtime.autocast_dtype("bf16", CPU)


def test_only_bf16_on_the_cpu_is_tried(trial: Callable[[str], None], tmp_path: Path) -> None:
    trial(f"open({str(tmp_path / 'tried')!r}, 'w')")
    assert runtime.autocast_dtype("auto", CPU) is runtime.autocast_dtype("fp32", CPU) is None
    assert runtime.autocast_dtype("bf16", torch.device("cuda")) is torch.bfloat16
    with pytest.raises(ValueError, match=r"fp32 \(or auto\) on the CPU; got 'fp16'"):
        runtime.autocast_dtype("fp16", CPU)
    assert not (tmp_path / "tried").exists()


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN's limits are of x86"
)
@pytest.mark.parametrize("limit", [None, "AVX2"])
def test_the_trial_itself_ends_with_what_it_measured(limit: str | None) -> None:
    """Where it were broken, bf16 would be refused on every CPU and the test below be skipped."""
    limits = {} if limit is None else {"ONEDNN_MAX_CPU_ISA": limit, "ATEN_CPU_CAPABILITY": "avx2"}
    trial = subprocess.run(
        [sys.executable, half_on_cpu.__file__],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **limits},
    )
    if trial.returncode < 0 and limit is None:
        pytest.skip("bf16 products end the process here")
    assert trial.returncode == 0, trial.stderr
    assert 0 < float(trial.stdout) < (math.inf if limit is None else SLOWEST)


def test_a_run_in_bf16_learns_and_goes_on_bit_for_bit(
    tmp_path: Path, train: Callable[..., Any]
) -> None:
    reason = refusal()
    if reason is not None:
        pytest.skip(f"on this CPU {reason}")
    bf16 = "--train.precision", "bf16", "--train.device", "cpu"
    whole = train(tmp_path / "whole", *bf16)
    train(tmp_path / "parts", *bf16, "--train.stop-at", 8)
    assert train(tmp_path / "parts", *bf16, "--resume").same_as(whole)
    losses, wanted = (
        [entry["loss"] for entry in run.metrics]
        for run in (whole, train(tmp_path / "fp32", "--train.device", "cpu"))
    )
    apart = [abs(a - b) for a, b in zip(losses, wanted, strict=True)]
    assert 0 < max(apart) < 0.02 < losses[0] - losses[-1]
