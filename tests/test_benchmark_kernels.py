"""The scripts that try the attention kernels on a GPU, and that the cuts come from what they found.

pytest tests/test_benchmark_kernels.py
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import tiles, trials
from flashgpt.attention.kernels import KERNELS, Kernel
from flashgpt.attention.standard import attention

triton_flash = pytest.importorskip("flashgpt.attention.triton_flash")
ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def spoiled(q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> tuple[Tensor, Tensor]:
    """Attention whose output holds NaN where T is 17."""
    out, lse, _ = attention(q, k, v, **masks)
    return (out * torch.nan if q.shape[2] == 17 else out), lse


@pytest.mark.parametrize("spoil", [True, False])
def test_a_step_that_is_not_finite_is_listed(spoil: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "SUSPECT", "suspect" if spoil else "blocked")
    monkeypatch.setitem(KERNELS, "suspect", Kernel("suspect", lambda _: None, spoiled))
    monkeypatch.setattr(trials, "LENGTHS", (2, 17))
    monkeypatch.setattr(trials, "HEAD_DIMS", (16,))
    monkeypatch.setattr(trials, "LOOK_EVERY", 7)
    found = trials.nan(24, CPU)
    assert found["steps"] == 24 and found["kinds of calls"] > 5
    assert bool(found["not finite"]) is spoil
    assert all(case.startswith("T 17 ") for case in found["not finite"])


def test_without_a_gpu_they_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for script in (tiles, trials):
        assert script.main([]) == 1
    assert capsys.readouterr().out.count("needs a GPU, and there is none") == 2


def test_the_cuts_of_the_kernels_are_measured_and_near_the_best() -> None:
    """Within 5 % of the fastest cut, at every length and with dropout too."""
    rows = json.loads((ROOT / "benchmarks/tiles/tiles.json").read_text())["rows"]
    times = {
        (r["kernel"], r["head_dim"], r["length"], r["dropout"], tuple(r["cut"])): r["ms"]
        for r in rows
    }
    assert {(kernel, h, cut) for kernel, h, cut in tiles.jobs()} <= {
        (kernel, h, cut) for kernel, h, _, _, cut in times
    }
    for (head_dim, length), p, kernel in itertools.product(tiles.CASES, (0.0, 0.1), tiles.CUTS):
        q = torch.empty(1, 1, length, head_dim, dtype=torch.float16)
        cut = triton_flash.tiles(kernel, q, p > 0)
        chosen = tuple(cut if cut.registers is not None else cut[:4])
        case = (kernel, head_dim, length, p)
        best = min(ms for key, ms in times.items() if key[:4] == case)
        assert times[(*case, chosen)] <= 1.05 * best, (case, chosen)
