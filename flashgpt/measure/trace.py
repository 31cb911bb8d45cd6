"""What PyTorch's profiler saw of a call, as the events of its Chrome trace."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity


def trace(
    call: Callable[[], object], device: torch.device, *, memory: bool = False
) -> list[dict[str, Any]]:
    """The events of one call, until the device has done it; times in microseconds.

    Args:
        memory: every allocation, too.
    """
    # Read when the first profile starts: else it writes two lines to stderr per profile.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities, profile_memory=memory) as profile:
        result = call()
        if cuda:
            torch.cuda.synchronize(device)
    del result  # after the profile, so that it counts
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "trace.json"
        profile.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events
