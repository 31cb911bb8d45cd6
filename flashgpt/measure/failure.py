"""Why a benchmark could not measure something, in one line."""

from __future__ import annotations

import torch

OUT_OF_MEMORY = "out of memory"


def reason(error: Exception) -> str:
    """`OUT_OF_MEMORY`, or the error's type and the first line of its message."""
    text = str(error).strip()
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
