"""The products of triton_step.py for more texts, whose numbers go through tensor cores together.

A program has some features of all texts. What is multiplied is rounded to the weights' dtype, as
PyTorch's products do; sums and the residual stream are fp32.

Legend: B texts, D features that come in, F features that go out, P programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashgpt.generation.triton_step import GELUS, NONE, _gelu, _weights, launch_early

MOST_TEXTS = 64  # with more, tiles are large enough for PyTorch's products
LEAST_SIDE = 16  # of a tile that tensor cores multiply
# Features of a program, which reads all texts; and the cut of those that come in. The best of ten
# for 8 to 64 texts of GPT-2 124M on an H100; what matters most is that few warps share the sums.
ROWS, HEAD_ROWS = 16, 64
CHUNK, STAGES = 128, 6
WARPS = 2


@triton.jit
def _norm(
    x_BD,
    gain_D,
    shift_D,
    out_BD,
    eps,
    ins: tl.constexpr,
    width: tl.constexpr,
    early: tl.constexpr,
):
    """out = LayerNorm(x), of one text."""
    if early:
        gdc_launch_dependents()
    k = tl.arange(0, width)
    inside = k < ins
    gain = tl.load(gain_D + k, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_D + k, mask=inside, other=0.0).to(tl.float32)
    at = tl.program_id(0) * ins + k
    if early:
        gdc_wait()
    x = tl.load(x_BD + at, mask=inside, other=0.0)
    centred = tl.where(inside, x - tl.sum(x) / ins, 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(centred * centred) / ins + eps)
    tl.store(out_BD + at, centred * scale * gain + shift, mask=inside)


@triton.jit
def _linear(
    in_BD,
    weight_FD,
    bias_F,
    out_BF,
    best_BP2,
    texts,
    outs,
    ins: tl.constexpr,
    size: tl.constexpr,
    rows: tl.constexpr,
    chunk: tl.constexpr,
    gelu: tl.constexpr,
    add: tl.constexpr,
    early: tl.constexpr,
):
    """out = gelu(in weight^T + bias), or out += that; `best` gets the largest of each text here."""
    if early:
        gdc_launch_dependents()
        gdc_wait()
    f = tl.program_id(0) * rows + tl.arange(0, rows)
    b = tl.arange(0, size)
    out = tl.zeros([rows, size], tl.float32)
    for start in range(0, ins, chunk):
        k = start + tl.arange(0, chunk)
        weight = _weights(weight_FD, f, k, outs, ins)
        inside = (b < texts)[:, None] & (k < ins)[None, :]
        x = tl.load(in_BD + b[:, None] * ins + k[None, :], mask=inside, other=0.0)
        out = tl.dot(weight, tl.trans(x.to(weight.dtype)), out, input_precision="ieee")
    mask = (f < outs)[:, None] & (b < texts)[None, :]
    if bias_F is not None:
        out += tl.load(bias_F + f, mask=f < outs, other=0.0).to(tl.float32)[:, None]
    out = _gelu(out, gelu)
    at_out = out_BF + b[None, :] * outs + f[:, None]
    if add:
        out += tl.load(at_out, mask=mask, other=0.0)
    tl.store(at_out, out, mask=mask)
    if best_BP2 is not None:
        value, place = tl.max(tl.where(mask, out, NONE), 0, return_indices=True)
        at = best_BP2 + (b * tl.num_programs(0) + tl.program_id(0)) * 2
        tl.store(at, value, mask=b < texts)
        found = (tl.program_id(0) * rows + place).to(tl.float32, bitcast=True)
        tl.store(at + 1, found, mask=b < texts)


def norm_linear(
    x_BD: Tensor,
    norm: nn.LayerNorm,
    weight_FD: Tensor,
    bias_F: Tensor | None,
    gelu: str | None = None,
) -> Tensor:
    """gelu(LayerNorm(x) weight^T + bias) [B, F], x in fp32: `triton_step.norm_linear`.

    The result is in the weights' dtype.
    """
    out_BF = x_BD.new_empty(len(x_BD), len(weight_FD), dtype=weight_FD.dtype)
    normed_BD = _normed(x_BD, norm, weight_FD.dtype)
    _launch_linear(normed_BD, weight_FD, bias_F, out_BF, ROWS, gelu=gelu)
    return out_BF


def linear_add_(x_BF: Tensor, in_BD: Tensor, weight_FD: Tensor, bias_F: Tensor) -> None:
    """x += in weight^T + bias, x in fp32."""
    _launch_linear(in_BD, weight_FD, bias_F, x_BF, ROWS, add=True)


def head(x_BD: Tensor, norm: nn.LayerNorm, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """logits_BV and `best_BP2` of LayerNorm(x) weight^T, all in fp32: `triton_step.head`."""
    texts, vocab = len(x_BD), len(weight_VD)
    logits_BV = x_BD.new_empty(texts, vocab)
    best_BP2 = x_BD.new_empty(texts, -(-vocab // HEAD_ROWS), 2)
    normed_BD = _normed(x_BD, norm, weight_VD.dtype)
    _launch_linear(normed_BD, weight_VD, None, logits_BV, HEAD_ROWS, best_BP2)
    return logits_BV, best_BP2


def _normed(x_BD: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    texts, ins = x_BD.shape
    out_BD = torch.empty_like(x_BD, dtype=dtype)
    arguments = (x_BD, norm.weight, norm.bias, out_BD, norm.eps)
    constants = (ins, triton.next_power_of_2(ins))
    launch_early(_norm, texts, arguments, constants, x_BD.device)
    return out_BD


def _launch_linear(
    in_BD: Tensor,
    weight_FD: Tensor,
    bias_F: Tensor | None,
    out_BF: Tensor,
    rows: int,
    best_BP2: Tensor | None = None,
    *,
    gelu: str | None = None,
    add: bool = False,
) -> None:
    (texts, ins), outs = in_BD.shape, out_BF.shape[1]
    arguments: tuple[Any, ...] = (in_BD, weight_FD, bias_F, out_BF, best_BP2, texts, outs)
    size, width = (max(LEAST_SIDE, triton.next_power_of_2(count)) for count in (texts, ins))
    constants = (ins, size, rows, min(CHUNK, width), GELUS[gelu], add)
    launch_early(_linear, -(-outs // rows), arguments, constants, in_BD.device, WARPS, STAGES)
