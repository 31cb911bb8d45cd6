"""How much memory a call takes: one definition for the CPU and for CUDA."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flashgpt.measure.trace import trace

CPU_DEVICE = 0  # "Device Type" of the profiler's trace


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch allocates while `call` runs, beyond what was allocated before.

    Inputs that exist before do not count, what `call` returns does. Memory that a library takes
    for itself, past torch's allocator, does not count.

    Args:
        device: where `call` computes; only memory there is counted.
    """
    if device.type != "cuda":
        return _cpu_peak(call)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(call: Callable[[], object]) -> int:
    """The highest running sum of what the profiler saw allocated and freed."""
    events = trace(call, torch.device("cpu"), memory=True)
    changes = [event for event in events if event["name"] == "[memory]"]
    now = peak = 0
    for event in sorted(changes, key=lambda event: float(event["ts"])):
        if event["args"]["Device Type"] == CPU_DEVICE:
            now += event["args"]["Bytes"]
            peak = max(peak, now)
    return peak
