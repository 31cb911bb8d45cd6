"""The dtypes that a model computes in under autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def of_products(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's, but float64 stays; else that of x."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def of_residual(x: Tensor) -> torch.dtype:
    """The dtype of the residual stream that starts as x: bf16 where the products are bf16.

    It halves what norms, sums and dropout read and write. In fp16 the stream may overflow, as some
    features of trained models are large, so there it stays as it is.
    """
    return torch.bfloat16 if of_products(x) == torch.bfloat16 else x.dtype
