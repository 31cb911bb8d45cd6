"""How much of the communication of a trace stands beside computing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Spans = list[tuple[float, float]]


def overlap(events: Iterable[dict[str, Any]], steps: int) -> dict[str, Any]:
    """From the events of PyTorch's Chrome trace on CUDA, of so many steps.

    Returns:
        nccl_ms: of a step, while at least one of NCCL's kernels runs. A kernel that waits for
            another device runs.
        compute_ms: of a step, while at least one other kernel runs.
        overlapped: part of nccl_ms that is part of compute_ms; 1 without any.
        nccl_kernels: milliseconds of a step by the kernel's name.
    """
    nccl: Spans = []
    compute: Spans = []
    names: dict[str, float] = {}
    for event in events:
        if event.get("cat") != "kernel":
            continue
        start, duration = float(event["ts"]), float(event["dur"])
        if "nccl" in event["name"].lower():
            name = event["name"].split("(")[0]
            names[name] = names.get(name, 0.0) + duration / 1e3 / steps
            nccl.append((start, start + duration))
        else:
            compute.append((start, start + duration))
    nccl, compute = _merged(nccl), _merged(compute)
    total, shared = _length(nccl), _length(_common(nccl, compute))
    return {
        "nccl_ms": total / 1e3 / steps,
        "compute_ms": _length(compute) / 1e3 / steps,
        "overlapped": shared / total if total else 1.0,
        "nccl_kernels": names,
    }


def _merged(spans: Spans) -> Spans:
    """Without overlaps, in order."""
    found: Spans = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def _common(one: Spans, other: Spans) -> Spans:
    """What is in both, of spans without overlaps, in order."""
    found: Spans = []
    i = j = 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            found.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def _length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)
