"""Clocks of benchmarks: one call, many in alternation, and the speed that the device can reach."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

MIN_ROUNDS = 3
CASE_SECONDS = 10.0  # `alternate` ends after this once it has MIN_ROUNDS
# On CUDA one short call would be the time of its launch; so many ms of calls are queued instead.
CUDA_QUEUE_MS = 10.0
PEAK_SIZE = {"cpu": 2048, "cuda": 8192}
PEAK_TRIES = 7
MEMORY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # past every cache

Call = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)


def device_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP per second of a large square product, the best of several."""
    size = PEAK_SIZE[device.type]
    a = torch.randn(size, size, dtype=dtype, device=device)
    torch.mm(a, a)
    best = min(milliseconds(lambda: torch.mm(a, a), device) for _ in range(PEAK_TRIES))
    return 2 * size**3 / best * 1e3


def device_bandwidth(device: torch.device) -> float:
    """Bytes per second of memory: a large tensor is added up, and copied; the better, of several.

    What is copied counts twice, for it is read and written.
    """
    size = MEMORY_BYTES[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    calls: dict[int, Call] = {size: source.sum, 2 * size: lambda: target.copy_(source)}
    found = []
    for moved, call in calls.items():
        call()
        best = min(milliseconds(call, device) for _ in range(PEAK_TRIES))
        found.append(moved / best * 1e3)
    return max(found)


def milliseconds(call: Call, device: torch.device) -> float:
    """The time of a call on an idle machine; on CUDA of several in a row if it is short."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    once = _cuda_milliseconds(call, device, 1)
    repeats = math.ceil(CUDA_QUEUE_MS / max(once, 0.01))
    return once if repeats == 1 else _cuda_milliseconds(call, device, repeats)


def _cuda_milliseconds(call: Call, device: torch.device, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / repeats


def alternate(
    calls: Mapping[Key, Call],
    rounds: int,
    timer: Callable[[Call], float],
    tick: Callable[[int], None] = lambda _: None,
    seconds: float = CASE_SECONDS,
) -> dict[Key, list[float]]:
    """Times every call once per round, in reversed order every other round.

    So a machine that slows down, or a call that heats it for the next one, is no one's advantage.
    Ends after `rounds`, or after `seconds` once there are MIN_ROUNDS.

    Args:
        timer: call -> milliseconds.
        tick: hears how many rounds are done.
    """
    found: dict[Key, list[float]] = {key: [] for key in calls}
    start = time.monotonic()
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.monotonic() - start > seconds:
            break
        for key in reversed(list(calls)) if done % 2 else list(calls):
            found[key].append(timer(calls[key]))
        tick(done + 1)
    return found
