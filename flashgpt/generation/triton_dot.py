"""The products of triton_step.py for more texts, whose numbers go through tensor cores together.

A program has some features of all texts, and goes over the features that come in chunk by chunk.
What is multiplied is rounded to the weights' dtype, as PyTorch's products do; sums and the residual
stream are fp32.

Legend: B texts, D features that come in, F features that go out, P programs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashgpt.generation.triton_step import GELUS, NONE, _gelu, _weights, launch_early

MOST_TEXTS = 32  # with more, PyTorch's products are faster
LEAST_SIDE = 16  # of a tile that tensor cores multiply
ROWS, MANY_ROWS = 16, 64  # features of a program; of a product with so many that
MANY = 16384  # programs each read all texts again
CHUNK = 256  # features that come in, at a time
WARPS, STAGES = 4, 3


@triton.jit
def _product(
    in_BD,
    gain_D,
    shift_D,
    weight_FD,
    bias_F,
    out_BF,
    best_BP2,
    texts,
    outs,
    eps,
    ins: tl.constexpr,
    size: tl.constexpr,
    rows: tl.constexpr,
    chunk: tl.constexpr,
    gelu: tl.constexpr,
    add: tl.constexpr,
    early: tl.constexpr,
):
    """out = gelu(in weight^T + bias), or out += that; in after LayerNorm where a gain is given.

    `best` gets the largest of each text's outputs here, and its place.
    """
    if early:
        gdc_launch_dependents()
    f = tl.program_id(0) * rows + tl.arange(0, rows)
    b = tl.arange(0, size)
    is_text = (b < texts)[:, None]
    at_text = in_BD + b[:, None] * ins
    if early:
        gdc_wait()
    mean = tl.zeros([size], tl.float32)
    scale = tl.zeros([size], tl.float32)
    if gain_D is not None:
        for start in range(0, ins, chunk):
            k = start + tl.arange(0, chunk)
            x = tl.load(at_text + k[None, :], mask=is_text & (k < ins)[None, :], other=0.0)
            mean += tl.sum(x, 1) / ins
        for start in range(0, ins, chunk):
            k = start + tl.arange(0, chunk)
            inside = (k < ins)[None, :]
            x = tl.load(at_text + k[None, :], mask=is_text & inside, other=0.0)
            centred = tl.where(inside, x - mean[:, None], 0.0)
            scale += tl.sum(centred * centred, 1) / ins
        scale = 1.0 / tl.sqrt_rn(scale + eps)
    out = tl.zeros([rows, size], tl.float32)
    for start in range(0, ins, chunk):
        k = start + tl.arange(0, chunk)
        weight = _weights(weight_FD, f, k, outs, ins)
        x = tl.load(at_text + k[None, :], mask=is_text & (k < ins)[None, :], other=0.0)
        if gain_D is not None:
            gain = tl.load(gain_D + k, mask=k < ins, other=0.0).to(tl.float32)
            shift = tl.load(shift_D + k, mask=k < ins, other=0.0).to(tl.float32)
            x = (x - mean[:, None]) * scale[:, None] * gain[None, :] + shift[None, :]
        out = tl.dot(weight, tl.trans(x.to(weight.dtype)), out, input_precision="ieee")
    mask = (f < outs)[:, None] & (b < texts)[None, :]
    if bias_F is not None:
        out += tl.load(bias_F + f, mask=f < outs, other=0.0).to(tl.float32)[:, None]
    out = _gelu(out, gelu)
    at = out_BF + b[None, :] * outs + f[:, None]
    if add:
        out += tl.load(at, mask=mask, other=0.0)
    tl.store(at, out, mask=mask)
    if best_BP2 is not None:
        value, place = tl.max(tl.where(mask, out, NONE), 0, return_indices=True)
        at_best = best_BP2 + (b * tl.num_programs(0) + tl.program_id(0)) * 2
        tl.store(at_best, value, mask=b < texts)
        found = (tl.program_id(0) * rows + place).to(tl.float32, bitcast=True)
        tl.store(at_best + 1, found, mask=b < texts)


def norm_linear(
    x_BD: Tensor,
    norm: nn.LayerNorm,
    weight_FD: Tensor,
    bias_F: Tensor | None,
    gelu: str | None = None,
    best_BP2: Tensor | None = None,
) -> Tensor:
    """gelu(LayerNorm(x) weight^T + bias) [B, F], x in fp32: `triton_step.norm_linear`.

    The result is in the weights' dtype; with `best_BP2`, [B, programs(F), 2], in fp32.
    """
    dtype = weight_FD.dtype if best_BP2 is None else x_BD.dtype
    out_BF = x_BD.new_empty(len(x_BD), len(weight_FD), dtype=dtype)
    parameters = (norm.weight, norm.bias, weight_FD, bias_F)
    _launch(x_BD, parameters, out_BF, best_BP2, norm.eps, gelu, add=False)
    return out_BF


def linear_add_(x_BF: Tensor, in_BD: Tensor, weight_FD: Tensor, bias_F: Tensor) -> None:
    """x += in weight^T + bias, x in fp32."""
    _launch(in_BD, (None, None, weight_FD, bias_F), x_BF, None, 0.0, None, add=True)


def programs(outs: int, ins: int) -> int:
    """Programs of a product with [F, D], whatever D."""
    return -(-outs // _rows(outs))


def _rows(outs: int) -> int:
    return ROWS if outs < MANY else MANY_ROWS


def _launch(
    in_BD: Tensor,
    parameters: tuple[Tensor | None, ...],
    out_BF: Tensor,
    best_BP2: Tensor | None,
    eps: float,
    gelu: str | None,
    *,
    add: bool,
) -> None:
    (texts, ins), outs = in_BD.shape, out_BF.shape[1]
    size = max(LEAST_SIDE, triton.next_power_of_2(texts))
    chunk = min(CHUNK, max(LEAST_SIDE, triton.next_power_of_2(ins)))
    arguments = (in_BD, *parameters, out_BF, best_BP2, texts, outs, eps)
    constants = (ins, size, _rows(outs), chunk, GELUS[gelu], add)
    count = programs(outs, ins)
    launch_early(_product, count, arguments, constants, in_BD.device, WARPS, STAGES)
