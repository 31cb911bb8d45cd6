"""Errors in one line. pytest tests/measure/test_failure.py"""

from __future__ import annotations

import pytest
import torch

from flashgpt.measure.failure import OUT_OF_MEMORY, reason


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), OUT_OF_MEMORY),
        (RuntimeError("\nno kernel\nmore"), "RuntimeError: no kernel"),
        (TypeError(), "TypeError: no message"),
    ],
)
def test_a_reason_is_one_line(error: Exception, says: str) -> None:
    assert reason(error) == says


def test_a_tensor_too_large_for_this_machine_is_out_of_memory() -> None:
    """The words by which it is recognised are those of this torch."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46)
    assert reason(caught.value) == OUT_OF_MEMORY
