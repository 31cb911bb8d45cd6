"""Products of the feed-forward layer with GELU, or its derivative, at their end: in Triton.

Owns GELU's arithmetic, which gluon_mlp.py takes from here, and kernels that serve where that file
does not; mlp.py says where. Needs Triton.

    linear_gelu      pre = x W^T + b                   act = gelu(pre)
    matmul_dgelu     dpre = (dout W) * gelu'(pre)      db = column sums of dpre

One program has one tile of the result. What follows a product is computed from its sums in fp32,
before they are rounded. Each tile's column sums are written apart and added up by PyTorch, so
results repeat bit for bit. The end of a tile, which reads and writes memory, takes about as long as
its product: of two programs on a multiprocessor one ends while the other computes.

With Phi and phi the normal distribution function and its density, or in the tanh form
Phi(x) = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3), and phi its derivative:

    gelu(x) = x Phi(x) = max(x, 0) - |x| Phi(-|x|)
    gelu'(x) = Phi(x) + x phi(x) = 1 - gelu'(-x)

So all is computed at -|x|, from one power and one reciprocal. The normal Phi is off by less than
7.5e-8 (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26).

Legend: M rows, D model width, F inner width; m, d, f of a tile;
P parts of the rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flashgpt.attention import triton_launch
from flashgpt.attention.triton_launch import launch

INTERPRETED = tl.constexpr(triton_launch.INTERPRETED)
LOG2_E = tl.constexpr(math.log2(math.e))
DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))
# 2 u = TANH_X x + TANH_X3 x^3
TANH_X, TANH_X3 = (tl.constexpr(math.sqrt(8 / math.pi) * c) for c in (1.0, 0.044715))
# 7.1.26 is of erfc(z), which is 2 Phi(-|x|), z = |x| / sqrt(2).
T = tl.constexpr(0.3275911 / math.sqrt(2))
A1, A2, A3, A4, A5 = (
    tl.constexpr(a / 2) for a in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
)


@triton.jit
def _exp2(x):
    """2^x, or 0 below the normal numbers: one instruction, where Triton's own takes four."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _reciprocal(x):
    """1 / x; one instruction as well."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _normal(x, TANH: tl.constexpr):
    """Phi(-|x|) and phi(x) as parts of a power, and that power."""
    if TANH:
        power = _exp2(tl.abs(x) * (-LOG2_E * TANH_X + x * x * (-LOG2_E * TANH_X3)))
        below = _reciprocal(1.0 + power)
        density = below * below * (TANH_X + x * x * (3 * TANH_X3))
    else:
        power = _exp2(x * x * (-0.5 * LOG2_E))
        t = _reciprocal(1.0 + T * tl.abs(x))
        below = t * (A1 + t * (A2 + t * (A3 + t * (A4 + t * A5))))
        density = DENSITY
    return below, density, power


@triton.jit
def gelu(x, TANH: tl.constexpr):
    below, _, power = _normal(x, TANH)
    return tl.maximum(x, 0.0) - tl.abs(x) * (below * power)


@triton.jit
def dgelu(x, TANH: tl.constexpr):
    below, density, power = _normal(x, TANH)
    negative = (below - tl.abs(x) * density) * power
    return tl.where(x < 0, negative, 1.0 - negative)


@triton.jit
def _linear_gelu(
    X, W, Bias, Act, Pre, D, F, m: tl.constexpr, f: tl.constexpr, d: tl.constexpr,
    TANH: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(F, f)
    row, column = tl.program_id(0) // tiles * m, tl.program_id(0) % tiles * f
    pre_mf = tl.zeros([m, f], tl.float32)
    for start in tl.range(0, D, d):  # descriptors give zeros past the ends
        pre_mf = tl.dot(X.load([row, start]), W.load([column, start]).T, pre_mf)
    at = column + tl.arange(0, f)
    pre_mf += tl.load(Bias + at, at < F, other=0.0).to(tl.float32)[None, :]
    kind: tl.constexpr = Bias.dtype.element_ty
    Pre.store([row, column], pre_mf.to(kind))
    Act.store([row, column], gelu(pre_mf, TANH).to(kind))


@triton.jit
def _matmul_dgelu(
    Dout, W, Pre, Dpre, Sums, D, F, m: tl.constexpr, f: tl.constexpr, d: tl.constexpr,
    TANH: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(F, f)
    row, column = tl.program_id(0) // tiles * m, tl.program_id(0) % tiles * f
    dact_mf = tl.zeros([m, f], tl.float32)
    for start in tl.range(0, D, d):
        dact_mf = tl.dot(Dout.load([row, start]), W.load([start, column]), dact_mf)
    # One half after the other, for a whole tile of `pre` has no room in the registers.
    halves = dact_mf.reshape([m, 2, f // 2]).permute(0, 2, 1).split()
    Sums += row // m * F
    for i in tl.static_range(2):
        start = column + i * (f // 2)
        pre_mf = Pre.load([row, start])
        dpre_mf = halves[i] * dgelu(pre_mf.to(tl.float32), TANH)
        Dpre.store([row, start], dpre_mf.to(pre_mf.dtype))
        at = start + tl.arange(0, f // 2)
        tl.store(Sums + at, tl.sum(dpre_mf, 0), at < F)


class Cut(NamedTuple):
    """How a product is cut: rows, columns and depth of a tile, warps, stages of its loads."""

    m: int
    f: int
    d: int
    warps: int
    stages: int


CUT = Cut(128, 128, 64, 4, 3)


def linear_gelu(
    x_MD: Tensor, w_FD: Tensor, b_F: Tensor, tanh: bool, cut: Cut = CUT
) -> tuple[Tensor, Tensor]:
    """act_MF and pre_MF.

    Args:
        x_MD, w_FD, b_F: all fp16 or all bf16; dense, addresses and rows multiples of 16 bytes.
        tanh: GELU in the tanh form, else the exact one.
    """
    act_MF = x_MD.new_empty(len(x_MD), len(w_FD))
    pre_MF = torch.empty_like(act_MF)
    if len(x_MD):
        inputs = (_tiles(x_MD, cut.m, cut.d), _tiles(w_FD, cut.f, cut.d), b_F)
        outputs = (_tiles(t, cut.m, cut.f) for t in (act_MF, pre_MF))
        _launch(_linear_gelu, (*inputs, *outputs), act_MF, x_MD.shape[1], tanh, cut)
    return act_MF, pre_MF


def matmul_dgelu(
    dout_MD: Tensor, w_DF: Tensor, pre_MF: Tensor, tanh: bool, cut: Cut = CUT
) -> tuple[Tensor, Tensor]:
    """dpre_MF and db_F; arguments as of `linear_gelu`."""
    dpre_MF = pre_MF.new_empty(pre_MF.shape)
    parts = math.ceil(len(pre_MF) / cut.m)
    sums_PF = pre_MF.new_empty(parts, pre_MF.shape[1], dtype=torch.float32)
    if len(pre_MF):
        inputs = (_tiles(dout_MD, cut.m, cut.d), _tiles(w_DF, cut.d, cut.f))
        halves = (_tiles(t, cut.m, cut.f // 2) for t in (pre_MF, dpre_MF))
        _launch(_matmul_dgelu, (*inputs, *halves, sums_PF), pre_MF, dout_MD.shape[1], tanh, cut)
    return dpre_MF, sums_PF.sum(0).to(pre_MF.dtype)


def _tiles(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, x.shape, [x.shape[1], 1], [rows, columns])


def _launch(
    kernel: Any, tensors: tuple[Any, ...], out_MF: Tensor, width: int, tanh: bool, cut: Cut
) -> None:
    """One program for each tile of the result."""
    rows, columns = out_MF.shape
    launch(
        kernel,
        math.ceil(rows / cut.m) * math.ceil(columns / cut.f),
        (*tensors, width, columns),
        (cut.m, cut.f, cut.d, tanh),
        out_MF.device,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
