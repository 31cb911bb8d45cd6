"""How much memory a call takes: one definition for the CPU and for CUDA."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from flashgpt.measure.trace import trace

CPU_DEVICE = 0  # "Device Type" of the profiler's trace
FORWARD = "flashgpt.forward"  # what `phase_peaks` marks, in a profile

P = ParamSpec("P")
T = TypeVar("T")


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


@dataclasses.dataclass(frozen=True)
class PhasePeaks:
    """The most bytes allocated beyond what was there before, by part of a training step.

    Attributes:
        forward: while forward passes ran.
        rest: in backward passes and in the update.
    """

    forward: int
    rest: int


def phase_peaks(
    step: Callable[[Callable[P, T]], object], forward: Callable[P, T], device: torch.device
) -> PhasePeaks:
    """Peaks of a call as `peak_bytes` counts them, those of its forward passes apart.

    Args:
        step: runs a training step with the forward pass it is given, which is `forward`, watched.
    """
    return (_cuda_phases if device.type == "cuda" else _cpu_phases)(step, forward, device)


def release(device: torch.device) -> None:
    """Gives back the memory of models that are gone, and of code that was compiled for them.

    On CUDA also cuBLAS's workspaces, of which each captured graph leaves two behind (64 MiB on an
    H100); see https://docs.pytorch.org/docs/stable/notes/cuda.html#cublas-workspaces.
    """
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Memory that a process could take now: of a GPU, or of this machine, where Linux says so what
    is available, elsewhere all of it. Limits of a container are not seen.

    Raises:
        ValueError: the system does not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {name: value for name, _, value in (line.partition(":") for line in lines)}
        return int(sizes["MemAvailable"].split()[0]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError) as error:
        raise ValueError("this system does not say how much memory it has; name it") from error


def _cuda_phases(
    step: Callable[[Callable[P, T]], object], forward: Callable[P, T], device: torch.device
) -> PhasePeaks:
    # The host keeps the books as it launches, so nothing is waited for between phases.
    peaks = {True: 0, False: 0}

    def close(in_forward: bool) -> None:
        peaks[in_forward] = max(peaks[in_forward], torch.cuda.max_memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)

    def watched(*args: P.args, **kwargs: P.kwargs) -> T:
        close(False)
        result = forward(*args, **kwargs)
        close(True)
        return result

    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step(watched)
    torch.cuda.synchronize(device)
    close(False)
    return PhasePeaks(peaks[True] - before, peaks[False] - before)


def _cpu_phases(
    step: Callable[[Callable[P, T]], object], forward: Callable[P, T], device: torch.device
) -> PhasePeaks:
    def watched(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.profiler.record_function(FORWARD):
            return forward(*args, **kwargs)

    events = trace(lambda: step(watched), device, memory=True)
    passes = [
        (float(e["ts"]), float(e["ts"]) + float(e["dur"]))
        for e in events
        if e["name"] == FORWARD and e.get("ph") == "X"
    ]
    peaks = {True: 0, False: 0}
    for moment, now in _allocated(events):
        in_forward = any(start <= moment <= end for start, end in passes)
        peaks[in_forward] = max(peaks[in_forward], now)
    return PhasePeaks(peaks[True], peaks[False])


def _cpu_peak(call: Callable[[], object]) -> int:
    events = trace(call, torch.device("cpu"), memory=True)
    return max([0, *(now for _, now in _allocated(events))])


def _allocated(events: list[dict[str, Any]]) -> Iterator[tuple[float, int]]:
    """Moments at which the profiler saw memory of the CPU allocated or freed (microseconds), and
    the bytes that are allocated from then on, beyond those before."""
    now = 0
    changes = [event for event in events if event["name"] == "[memory]"]
    for event in sorted(changes, key=lambda event: float(event["ts"])):
        if event["args"]["Device Type"] == CPU_DEVICE:
            now += event["args"]["Bytes"]
            yield float(event["ts"]), now
