"""Why a benchmark could not measure something, in one line."""

from __future__ import annotations

import torch

OUT_OF_MEMORY = "out of memory"
# What torch's CPU allocator says, and CUDA's libraries of their own memory.
SIGNS = ("can't allocate memory", "STATUS_ALLOC_FAILED")


def reason(error: Exception) -> str:
    """`OUT_OF_MEMORY`, or the error's type and the first line of its message."""
    text = str(error).strip()
    if isinstance(error, torch.OutOfMemoryError) or any(sign in text for sign in SIGNS):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
