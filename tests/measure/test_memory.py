"""Peak memory of known calls, and of attention. pytest tests/measure/test_memory.py"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashgpt.attention.attend import attend
from flashgpt.measure.memory import free_bytes, peak_bytes, phase_peaks

CPU = torch.device("cpu")
MB = 1_000_000
SMALL = 64  # scalars that torch wraps on the way


def _peak(call: Callable[[], object]) -> int:
    return peak_bytes(call, CPU)


def test_nothing_takes_nothing() -> None:
    x = torch.ones(MB)
    assert _peak(lambda: None) == 0
    assert _peak(lambda: x.view(10, -1)) == 0


def test_what_is_alive_at_once_counts_together() -> None:
    def kept() -> Tensor:
        first = torch.empty(MB)
        return first * 2

    def one_after_the_other() -> None:
        for _ in range(5):
            torch.empty(MB)

    assert 8 * MB <= _peak(kept) <= 8 * MB + SMALL
    assert _peak(one_after_the_other) == 4 * MB
    assert _peak(lambda: [torch.empty(MB) for _ in range(5)]) == 20 * MB


def test_a_peak_that_is_gone_at_the_end_counts() -> None:
    def call() -> Tensor:
        big = torch.zeros(3 * MB, dtype=torch.float64)
        return big[:10].clone()

    assert 24 * MB + 80 <= _peak(call) <= 24 * MB + 80 + SMALL


def test_what_was_there_before_does_not_count() -> None:
    held = [torch.ones(2 * MB)]
    assert 8 * MB <= _peak(lambda: held[0] + 1) <= 8 * MB + SMALL

    def frees_first() -> Tensor:
        held.clear()
        return torch.empty(MB)

    assert _peak(frees_first) <= 4 * MB


def test_bytes_depend_on_the_dtype() -> None:
    assert _peak(lambda: torch.empty(MB, dtype=torch.float16)) == 2 * MB
    assert _peak(lambda: torch.empty(MB, dtype=torch.int64)) == 8 * MB


def _attention_peak(kernel: str, length: int) -> int:
    q, k, v = (torch.randn(1, 2, length, 16).requires_grad_() for _ in range(3))

    def call() -> tuple[Tensor, ...]:
        out = attend(q, k, v, kernel=kernel, use_flash=kernel != "standard")
        return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    call()
    return _peak(call)


def test_standard_attention_is_quadratic_and_blocked_is_not() -> None:
    standard = [_attention_peak("standard", length) for length in (1024, 2048)]
    blocked = [_attention_peak("blocked", length) for length in (1024, 2048)]
    assert standard[1] / standard[0] == pytest.approx(4, rel=0.1)
    assert blocked[1] / blocked[0] < 3
    # At least scores and weights, each [2, T, T] in fp32.
    assert standard[0] > 2 * 2 * 1024**2 * 4
    assert standard[1] > 4 * blocked[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_definition_is_the_same_on_cuda() -> None:
    cuda = torch.device("cuda")
    held = torch.ones(MB, device=cuda)

    def call() -> Tensor:
        first = held * 2
        return first + 1

    block = 2 * 2**20  # the caching allocator hands out large tensors in steps of this
    assert 8 * MB <= peak_bytes(call, cuda) <= 8 * MB + 2 * block
    assert peak_bytes(lambda: held.view(10, -1), cuda) == 0


def test_forward_passes_and_the_rest_of_a_step_have_peaks_of_their_own() -> None:
    def forward(x: Tensor) -> Tensor:
        return torch.empty(5 * MB).sum() + x

    def step(watched: Callable[[Tensor], Tensor]) -> Tensor:
        kept = torch.empty(MB)
        watched(watched(kept[:1]))
        return torch.empty(2 * MB)

    found = phase_peaks(step, forward, CPU)
    assert 24 * MB <= found.forward <= 24 * MB + SMALL
    assert 12 * MB <= found.rest <= 12 * MB + SMALL


def test_on_cuda_the_allocators_books_are_closed_around_each_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With books of our own in place of a GPU's."""
    now = peak = 100

    def allocate(change: int) -> None:
        nonlocal now, peak
        now += change
        peak = max(peak, now)

    def reset(_: object) -> None:
        nonlocal peak
        peak = now

    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)

    def forward() -> None:
        allocate(50)
        allocate(-20)

    def step(watched: Callable[[], None]) -> None:
        allocate(10)
        watched()
        allocate(-5)
        watched()
        allocate(30)
        allocate(-95)

    found = phase_peaks(step, forward, torch.device("cuda"))
    assert (found.forward, found.rest) == (10 + 30 - 5 + 50, 10 + 30 - 5 + 30 + 30)
    peak = 10**6  # of before
    assert phase_peaks(step, forward, torch.device("cuda")) == found


def test_free_memory_is_some_of_what_is_there() -> None:
    free = free_bytes(CPU)
    assert 2**20 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
