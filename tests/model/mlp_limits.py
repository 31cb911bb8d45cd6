"""What products with GELU at their end should give, and how far off they may be.

Legend: M rows, D model width, F inner width.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
# Within a tile, past its ends in each direction, and more than two tiles in each.
SHAPES = [(1, 8, 16), (63, 72, 136), (65, 200, 248), (128, 64, 128), (1023, 72, 264)]
U = 2.0**-24  # half a unit of fp32

Limited = dict[str, tuple[Tensor, Tensor]]  # name -> exact value, and how far off it may be


def gpu(test: Any) -> Any:
    """Marks a test that needs a Hopper GPU."""
    marks = pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
    return functools.reduce(lambda made, mark: mark(made), marks, test)


def case(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x_MD, w1_FD, b_F, dout_MD, w2_DF, pre_MF; sums of products have a spread of 2 or so."""
    rows, width, inner = shape
    generator = torch.Generator().manual_seed(rows)
    sizes = ((rows, width), (inner, width), (inner,), (rows, width), (width, inner), (rows, inner))
    x, w1, b, dout, w2, pre = (torch.randn(*size, generator=generator) for size in sizes)
    scale = 2 * width**-0.5
    made = (x, scale * w1, b, dout, scale * w2, 3 * pre)
    return tuple(t.to(DEVICE, dtype) for t in made)  # type: ignore[return-value]


def rounded(value: Tensor, error: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A value that errs by so much, and is then rounded to a dtype."""
    kind = torch.finfo(dtype)
    return value, error + kind.eps / 2 * (value.abs() + error) + kind.smallest_normal * kind.eps


def product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a b, and how far off sums in fp32 may be; tensor cores round no better than to 2 U."""
    return a @ b, 2 * U * a.shape[1] * (a.abs() @ b.abs())


def forward_limits(x: Tensor, w1: Tensor, b: Tensor, tanh: bool) -> Limited:
    """Phi errs by 7.5e-8 as approximated and by less than 12 U as computed; gelu' is below 1.13."""
    dtype, (x, w1, b) = x.dtype, (t.double() for t in (x, w1, b))
    pre, error = product(x, w1.T)
    pre, error = pre + b, error + U * (pre + b).abs()
    act = F.gelu(pre, approximate="tanh" if tanh else "none")
    act_error = 1.13 * error + (pre.abs() + error) * (7.5e-8 + 12 * U)
    return {"act": rounded(act, act_error, dtype), "pre": rounded(pre, error, dtype)}


def backward_limits(dout: Tensor, w2: Tensor, pre: Tensor, tanh: bool) -> Limited:
    """gelu' errs as Phi does, and |x| phi by less than 12 U more."""
    dtype, (dout, w2, pre) = dout.dtype, (t.double() for t in (dout, w2, pre))
    dact, error = product(dout, w2)
    approximate = "tanh" if tanh else "none"
    slope = torch.ops.aten.gelu_backward(torch.ones_like(pre), pre, approximate=approximate)
    dpre = dact * slope
    error = error * slope.abs() + (dact.abs() + error) * (7.5e-8 + 24 * U) + U * dpre.abs()
    sums = error.sum(0) + len(pre) * U * dpre.abs().sum(0)
    return {"dpre": rounded(dpre, error, dtype), "db": rounded(dpre.sum(0), sums, dtype)}


def excess(found: tuple[Tensor, ...], limited: Limited) -> dict[str, float]:
    """The largest error of each tensor, in parts of its limit."""
    return {
        name: float(((got.double() - value).abs() / limit).max().nan_to_num(torch.inf))
        for got, (name, (value, limit)) in zip(found, limited.items(), strict=True)
    }
