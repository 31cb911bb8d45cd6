"""What the benchmark measures: FLOP, kernels, refusals. No assertion here depends on a time.

pytest tests/measure/test_bench_attention.py
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from flashgpt import half_on_cpu
from flashgpt.attention import kernels
from flashgpt.attention.request import Request
from flashgpt.measure import bench_attention as bench
from flashgpt.measure import clock
from flashgpt.measure.bench_attention import (
    FLEX,
    OWN_DROPOUT,
    PLAIN,
    SDPA,
    Setup,
    Timing,
    flop,
    measure,
)

CPU = torch.device("cpu")
SETUP = Setup((8, 32), 64, 2, 16, 0.1, torch.float32, CPU, rounds=3)


@pytest.fixture(autouse=True)
def _small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(clock.PEAK_SIZE, "cpu", 64)


def _setup(**changes: Any) -> Setup:
    return dataclasses.replace(SETUP, **changes)


def test_flop_are_those_of_the_visible_pairs() -> None:
    """Independent: each visible (query, key) costs H multiply-adds in each product."""
    batch, heads, length, head_dim = 2, 3, 512, 16
    pairs = batch * heads * sum(t + 1 for t in range(length))
    for gradient, products in ((False, 2), (True, 7)):
        exact = products * pairs * head_dim * 2
        assert flop(batch, heads, length, head_dim, gradient) == pytest.approx(exact, rel=1 / 256)
    assert flop(1, 1, 10, 1, True) / flop(1, 1, 10, 1, False) == 3.5


def test_flop_are_half_of_what_torch_counts_without_the_mask() -> None:
    q, k, v = (torch.randn(2, 3, 64, 16) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        bench._attentions(_setup(), 64, False)["standard"](q, k, v)
    assert counter.get_total_flops() == 2 * flop(2, 3, 64, 16, False)


def test_every_kernel_that_runs_here_is_measured() -> None:
    found = measure(SETUP)
    kinds = {(row.kernel, row.length, row.dropout) for row in found.rows}
    assert len(kinds) == len(found.rows)
    for length in SETUP.lengths:
        assert {kernel for kernel, t, p in kinds if t == length and not p} >= {
            *("standard", "blocked", "sdpa:cpu", SDPA)
        }
        dropped = {kernel for kernel, t, p in kinds if t == length and p}
        assert dropped >= {"standard", "blocked", SDPA} and "sdpa:cpu" not in dropped
    for row in found.rows:
        _check_row(row, found.peak_flop_per_second)
    standard = {(r.length, r.dropout): r for r in found.rows if r.kernel == "standard"}
    for row in found.rows:
        other = standard[row.length, row.dropout].forward_backward
        assert row.forward_backward is not None and other is not None
        assert row.times_standard == pytest.approx(other.ms / row.forward_backward.ms)


def _check_row(row: Timing, peak: float) -> None:
    assert row.batch == 64 // row.length
    for timed, gradient in ((row.forward, False), (row.forward_backward, True)):
        assert timed is not None and timed.rounds == 3
        assert 0 < timed.ms_min <= timed.ms <= timed.ms_max
        speed = flop(row.batch, 2, row.length, 16, gradient) / (timed.ms / 1e3)
        assert timed.flop_per_second == pytest.approx(speed)
        assert timed.share_of_peak == pytest.approx(speed / peak)
    gradients = 3 * row.batch * row.length * 2 * 16 * 4
    assert row.peak_bytes >= gradients, "at least dq, dk and dv"


def test_refusals_carry_the_reason_of_the_table() -> None:
    found = {(r.kernel, r.dropout): r for r in measure(SETUP).refused}
    for name in ("sdpa:cudnn", "sdpa:flash", "sdpa:efficient"):
        for dropout in (False, True):
            assert found[name, dropout].reason == "runs on CUDA, data is on cpu"
            assert found[name, dropout].lengths == [8, 32] and not found[name, dropout].gradient
    assert "shared dropout" in found["sdpa:cpu", True].reason
    assert found[FLEX, True].reason == "has no dropout"
    assert "--flex adds it" in found[FLEX, False].reason
    measured = {(row.kernel, row.dropout) for row in measure(SETUP).rows}
    every = {(name, p) for name in (*kernels.KERNELS, SDPA, PLAIN, FLEX) for p in (False, True)}
    own = {(name + OWN_DROPOUT, True) for name in kernels.KERNELS if name.startswith("sdpa:")}
    assert every | own == measured | set(found)


def test_a_kernel_known_to_be_bad_is_measured_as_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.KNOWN_BAD, "blocked", ((lambda request: True, "wrong"),))
    found = measure(_setup(lengths=(8,), dropout=0.0))
    assert "blocked" in {row.kernel for row in found.rows}


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_plain_peer_is_attention(p: float) -> None:
    q, k, v = torch.randn(3, 2, 3, 9, 16, dtype=torch.float64).unbind()
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    torch.manual_seed(0)
    out = bench._plain(hidden, p, q, k, v)
    if not p:
        exact = scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(out, exact)
    else:  # with values of one, a row adds up what was kept, scaled
        torch.manual_seed(0)
        sums = bench._plain(hidden, p, q, k, torch.ones_like(v))
        assert sums.min() < 0.9 and sums.max() > 1.1 and abs(sums.mean() - 1) < 0.3


def test_a_kernel_without_backward_has_forward_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward_only(request: Request) -> str | None:
        return "wrong gradients" if request.gradient else None

    refusing = dataclasses.replace(kernels.KERNELS["blocked"], supports=forward_only)
    monkeypatch.setitem(kernels.KERNELS, "blocked", refusing)
    found = measure(_setup(lengths=(8,), dropout=0.0))
    (row,) = [row for row in found.rows if row.kernel == "blocked"]
    (standard,) = [row for row in found.rows if row.kernel == "standard"]
    assert row.forward_backward is None
    assert row.times_standard == pytest.approx(standard.forward.ms / row.forward.ms)
    (refused,) = [r for r in found.refused if r.kernel == "blocked"]
    assert (refused.gradient, refused.reason) == (True, "wrong gradients")


def _fails(error: Exception) -> Any:
    def attention(*_: Any, **__: Any) -> Tensor:
        raise error

    return attention


def test_a_peer_that_fails_is_named_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_flex", lambda length, device: _fails(KeyError("no compiler\nx")))
    monkeypatch.setattr(
        bench, "scaled_dot_product_attention", _fails(RuntimeError("\nno kernel\nmore"))
    )
    found = measure(_setup(lengths=(8,), dropout=0.0, flex=True))
    reasons = {r.kernel: r.reason for r in found.refused}
    assert reasons[SDPA] == "RuntimeError: no kernel"
    assert reasons[FLEX] == "KeyError: 'no compiler\\nx'"
    assert {"standard", "blocked", "sdpa:cpu"} <= {row.kernel for row in found.rows}


def test_flex_on_the_cpu_is_measured_forward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    working = _setup(lengths=(8,), dropout=0.0, flex=True)
    monkeypatch.setattr(bench, "_flex", lambda length, device: scaled_dot_product_attention)
    found = measure(working)
    (row,) = [row for row in found.rows if row.kernel == FLEX]
    assert row.forward_backward is None
    (refused,) = [r for r in found.refused if r.kernel == FLEX]
    assert (refused.gradient, refused.reason) == (True, "has no backward pass on the CPU")


def test_flex_that_fails_in_backward_is_not_measured_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its forward pass would run uncompiled, and be timed as if that were FlexAttention."""

    def forward_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.requires_grad:
            raise NotImplementedError("no backward")
        return q * k * v

    monkeypatch.setattr(bench, "_flex", lambda length, device: forward_only)
    monkeypatch.setattr(bench, "_refusal", lambda name, *_: None if name == FLEX else "not now")
    found = measure(_setup(lengths=(8,), dropout=0.0, flex=True))
    (refused,) = [r for r in found.refused if r.kernel == FLEX and not r.gradient]
    assert refused.reason == "NotImplementedError: no backward"
    assert found.rows == []


def test_a_fault_of_our_own_kernel_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = dataclasses.replace(kernels.KERNELS["blocked"], attention=_fails(RuntimeError("bug")))
    monkeypatch.setitem(kernels.KERNELS, "blocked", broken)
    with pytest.raises(RuntimeError, match="bug"):
        measure(_setup(lengths=(8,)))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_a_kernel_that_does_not_fit_is_left_out(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fails = _fails(error)
    monkeypatch.setattr(
        bench, "attend", lambda q, k, v, use_flash, **_: q * k * v if use_flash else fails()
    )
    found = measure(_setup(lengths=(8,), dropout=0.0))
    assert {r.kernel: r.reason for r in found.refused}["standard"] == "out of memory"
    assert all(row.times_standard is None for row in found.rows)


def test_a_tensor_too_large_for_this_machine_is_out_of_memory() -> None:
    """The words by which it is recognised are those of this torch."""
    call = lambda: torch.empty(2**46)  # noqa: E731
    assert bench._failure("standard", call, CPU) == "out of memory"


def test_calls_get_views_of_one_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, ...]] = []

    def watching(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        seen.append((q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    monkeypatch.setattr(bench, "attend", watching)
    measure(_setup(lengths=(32,), dropout=0.0))
    for q, k, v in seen:
        assert q.shape == k.shape == v.shape == (2, 2, 32, 16)
        assert q.stride() == (32 * 3 * 2 * 16, 16, 3 * 2 * 16, 1)
        assert k.storage_offset() == 2 * 16 and v.storage_offset() == 2 * 2 * 16
        assert q.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert {q.requires_grad for q, _, _ in seen} == {False, True}


def test_note_and_progress_reach_the_end() -> None:
    notes: list[str] = []
    ticks: list[tuple[int, int]] = []
    measure(_setup(lengths=(100,)), notes.append, lambda *tick: ticks.append(tick))
    assert notes == [
        "speed of a large square product",
        "T 100, batch 1, dropout off",
        "T 100, batch 1, dropout on",
    ]
    assert ticks[0] == (0, 6) and ticks[-1] == (6, 6) and ticks == sorted(ticks)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lengths": ()}, "lengths must name at least one"),
        ({"lengths": (64, 0)}, "lengths must be at least 1, got 0"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"heads": -1}, "heads must be at least 1, got -1"),
        ({"head_dim": 0}, "head_dim must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1"),
        ({"dropout": float("nan")}, r"dropout must be in \[0, 1\), got nan"),
        ({"rounds": 2}, "rounds must be at least 3, got 2"),
        (
            {"dtype": torch.bfloat16},
            "fp32 or fp16 on this CPU, where it ends the process; got bf16",
        ),
    ],
)
def test_a_setup_that_cannot_be_measured(
    changes: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half_on_cpu, "refusal", lambda: "it ends the process")
    with pytest.raises(ValueError, match=says):
        _setup(**changes)
