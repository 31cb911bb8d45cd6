"""One position of a GPT-2 for a few texts, in Triton: products with vectors and what lies between.

With few texts a step reads each weight once and computes next to nothing, so its time is that of
memory, and of the starts and ends of kernels. Hence few kernels, five a block: LayerNorm + product
(+ GELU), attention over a part of the keys, the parts' sum + product + residual. Between kernels
all is in fp32. Each kernel may be launched while the one before still runs (programmatic dependent
launch) and then reads its weights, which nobody writes, before it waits for the one before.

Owns the kernels but attention's (triton_attend.py), and their launches. Which kernel follows which
is in device_step.py, which imports this file when the first CUDA model comes, for it needs Triton.

Legend: B texts, D features that come in, F features that go out, N heads, H head dim, S positions
of the cache, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashgpt.attention.triton_launch import INTERPRETED, launch

LOG2E = tl.constexpr(1.4426950408889634)
NONE = tl.constexpr(-float("inf"))
MOST_TEXTS = 4  # with more, each is a pass over a tile that stays in registers, and these run out
TILE = 16384  # weights of a program
WARPS = 8
GELUS = {None: 0, "gelu_new": 1, "gelu": 2}


@triton.jit
def _gelu(x, kind: tl.constexpr):
    if kind == 1:
        # 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp2(u * (-2.0 * LOG2E)))
    if kind == 2:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x


@triton.jit
def _weights(weight, f, k, outs, ins: tl.constexpr):
    """Rows f of [F, D], 0 past its ends."""
    place = f[:, None].to(tl.int64) * ins + k[None, :]
    return tl.load(weight + place, mask=(f < outs)[:, None] & (k < ins)[None, :], other=0.0)


@triton.jit
def _norm_linear(
    x_BD,
    gain_D,
    shift_D,
    weight_FD,
    bias_F,
    out_BF,
    best_BP2,
    outs,
    eps,
    texts: tl.constexpr,
    ins: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
    gelu: tl.constexpr,
    early: tl.constexpr,
):
    """out = gelu(LayerNorm(x) weight^T + bias); each program's largest and its place in `best`."""
    if early:
        gdc_launch_dependents()
    f = tl.program_id(0) * rows + tl.arange(0, rows)
    k = tl.arange(0, width)
    inside = k < ins
    weight = _weights(weight_FD, f, k, outs, ins)
    gain = tl.load(gain_D + k, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_D + k, mask=inside, other=0.0).to(tl.float32)
    if bias_F is not None:
        bias = tl.load(bias_F + f, mask=f < outs, other=0.0).to(tl.float32)
    if early:
        gdc_wait()
    for b in tl.static_range(texts):
        x = tl.load(x_BD + b * ins + k, mask=inside, other=0.0)
        centred = tl.where(inside, x - tl.sum(x) / ins, 0.0)
        scale = 1.0 / tl.sqrt_rn(tl.sum(centred * centred) / ins + eps)
        normed = centred * scale * gain + shift
        out = tl.sum(weight.to(tl.float32) * normed[None, :], 1)
        if bias_F is not None:
            out += bias
        out = _gelu(out, gelu)
        tl.store(out_BF + b * outs + f, out, mask=f < outs)
        if best_BP2 is not None:
            value, place = tl.max(tl.where(f < outs, out, NONE), 0, return_indices=True)
            at = best_BP2 + (b * tl.num_programs(0) + tl.program_id(0)) * 2
            tl.store(at, value)
            tl.store(at + 1, (tl.program_id(0) * rows + place).to(tl.float32, bitcast=True))


@triton.jit
def _linear_add(
    in_BD,
    weight_FD,
    bias_F,
    x_BF,
    parts_BNPH,
    stats_BNP2,
    outs,
    texts: tl.constexpr,
    ins: tl.constexpr,
    rows: tl.constexpr,
    width: tl.constexpr,
    parts: tl.constexpr,
    head_dim: tl.constexpr,
    early: tl.constexpr,
):
    """x += in weight^T + bias, in place; with `parts`, in is what the parts of attention sum to."""
    if early:
        gdc_launch_dependents()
    f = tl.program_id(0) * rows + tl.arange(0, rows)
    k = tl.arange(0, width)
    inside = k < ins
    weight = _weights(weight_FD, f, k, outs, ins)
    bias = tl.load(bias_F + f, mask=f < outs, other=0.0).to(tl.float32)
    if early:
        gdc_wait()
    for b in tl.static_range(texts):
        if parts == 0:
            value = tl.load(in_BD + b * ins + k, mask=inside, other=0.0)
        else:
            head = (b * (ins // head_dim) + k // head_dim) * parts
            top = tl.full([width], NONE, tl.float32)
            for part in tl.static_range(parts):
                stat = stats_BNP2 + (head + part) * 2
                top = tl.maximum(top, tl.load(stat, mask=inside, other=0.0))
            total = tl.zeros([width], tl.float32)
            value = tl.zeros([width], tl.float32)
            for part in tl.static_range(parts):
                stat = stats_BNP2 + (head + part) * 2
                share = tl.exp2(tl.load(stat, mask=inside, other=0.0) - top)
                total += share * tl.load(stat + 1, mask=inside, other=1.0)
                at = parts_BNPH + (head + part) * head_dim + k % head_dim
                value += share * tl.load(at, mask=inside, other=0.0)
            value = value / total
        out = tl.sum(weight.to(tl.float32) * value[None, :], 1) + bias
        at = x_BF + b * outs + f
        tl.store(at, tl.load(at, mask=f < outs, other=0.0) + out, mask=f < outs)


@triton.jit
def _embed(
    id_B,
    place_B,
    pad_B,
    wte_VD,
    wpe_SD,
    x_BD,
    ins: tl.constexpr,
    width: tl.constexpr,
    early: tl.constexpr,
):
    """x = embedding of the token + embedding of its place in its text."""
    # Lets no kernel start early: some read `place_B`, which the step before writes.
    if early:
        gdc_wait()
    b = tl.program_id(0)
    k = tl.arange(0, width)
    token, place = tl.load(id_B + b), tl.load(place_B + b) - tl.load(pad_B + b)
    x = tl.load(wte_VD + token * ins + k, mask=k < ins, other=0.0).to(tl.float32)
    x += tl.load(wpe_SD + place.to(tl.int64) * ins + k, mask=k < ins, other=0.0).to(tl.float32)
    tl.store(x_BD + b * ins + k, x, mask=k < ins)


@triton.jit
def _advance(
    best_BP2,
    id_B,
    place_B,
    drawn_B,
    tokens_LB,
    programs,
    last_place,
    width: tl.constexpr,
    early: tl.constexpr,
):
    """Keeps the token of each text, the likeliest where `best_BP2` is given, and counts it."""
    if early:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0)
    if best_BP2 is not None:
        p = tl.arange(0, width)
        at = best_BP2 + (b * programs + p) * 2
        value = tl.load(at, mask=p < programs, other=NONE)
        found = tl.load(at + 1, mask=p < programs, other=0.0).to(tl.int32, bitcast=True)
        winner = tl.argmax(value, 0)
        token = tl.sum(tl.where(p == winner, found, 0), 0).to(tl.int64)
        tl.store(id_B + b, token)
    else:
        token = tl.load(id_B + b)
    drawn = tl.load(drawn_B + b)
    tl.store(tokens_LB + drawn.to(tl.int64) * tl.num_programs(0) + b, token)
    tl.store(drawn_B + b, drawn + 1)
    tl.store(place_B + b, tl.minimum(tl.load(place_B + b) + 1, last_place))


@dataclasses.dataclass(frozen=True)
class State:
    """Where each text stands; on the device, and changed there.

    Attributes:
        id_B: the token that comes next (int64).
        place_B: its place in the cache (int32); positions before it are filled.
        pad_B: positions of the cache before the text (int32).
        drawn_B: tokens drawn so far (int32).
        tokens_LB: these tokens (int64).
    """

    id_B: Tensor
    place_B: Tensor
    pad_B: Tensor
    drawn_B: Tensor
    tokens_LB: Tensor


def embed(state: State, wte_VD: Tensor, wpe_SD: Tensor) -> Tensor:
    """x_BD in fp32: the embeddings of the tokens that come next."""
    texts, ins = len(state.id_B), wte_VD.shape[1]
    x_BD = _empty(state, ins)
    arguments = (state.id_B, state.place_B, state.pad_B, wte_VD, wpe_SD, x_BD)
    launch_early(_embed, texts, arguments, (ins, triton.next_power_of_2(ins)), x_BD.device)
    return x_BD


def norm_linear(
    x_BD: Tensor,
    norm: nn.LayerNorm,
    weight_FD: Tensor,
    bias_F: Tensor | None,
    gelu: str | None = None,
) -> Tensor:
    """gelu(LayerNorm(x) weight^T + bias) [B, F]; x and the result in fp32.

    Args:
        gelu: name of the activation, None for none.
    """
    out_BF = x_BD.new_empty(len(x_BD), len(weight_FD))
    _launch_norm_linear(x_BD, norm, weight_FD, bias_F, gelu, out_BF, None)
    return out_BF


def head(x_BD: Tensor, norm: nn.LayerNorm, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """logits_BV = LayerNorm(x) weight^T, all in fp32.

    Returns:
        the logits, and `best_BP2`: the largest of each program's and, as bits, its place.
    """
    (texts, ins), vocab = x_BD.shape, len(weight_VD)
    logits_BV = x_BD.new_empty(texts, vocab)
    best_BP2 = x_BD.new_empty(texts, programs(vocab, ins), 2)
    _launch_norm_linear(x_BD, norm, weight_VD, None, None, logits_BV, best_BP2)
    return logits_BV, best_BP2


def _launch_norm_linear(
    x_BD: Tensor,
    norm: nn.LayerNorm,
    weight_FD: Tensor,
    bias_F: Tensor | None,
    gelu: str | None,
    out_BF: Tensor,
    best_BP2: Tensor | None,
) -> None:
    (texts, ins), outs = x_BD.shape, len(weight_FD)
    arguments = (x_BD, norm.weight, norm.bias, weight_FD, bias_F, out_BF, best_BP2, outs, norm.eps)
    constants = (texts, ins, *_tile(ins), GELUS[gelu])
    launch_early(_norm_linear, programs(outs, ins), arguments, constants, x_BD.device)


def linear_add_(x_BF: Tensor, in_BD: Tensor, weight_FD: Tensor, bias_F: Tensor) -> None:
    """x += in weight^T + bias, in and x in fp32."""
    (texts, ins), outs = in_BD.shape, x_BF.shape[1]
    arguments = (in_BD, weight_FD, bias_F, x_BF, None, None, outs)
    constants = (texts, ins, *_tile(ins), 0, 1)
    launch_early(_linear_add, programs(outs, ins), arguments, constants, x_BF.device)


def attention_linear_add_(
    x_BF: Tensor, attention: tuple[Tensor, Tensor], weight_FD: Tensor, bias_F: Tensor
) -> None:
    """x += out weight^T + bias, out the attention that `attend_in_parts` left; x in fp32."""
    parts_BNPH, stats_BNP2 = attention
    texts, heads, parts, head_dim = parts_BNPH.shape
    ins, outs = heads * head_dim, x_BF.shape[1]
    arguments = (None, weight_FD, bias_F, x_BF, parts_BNPH, stats_BNP2, outs)
    constants = (texts, ins, *_tile(ins), parts, head_dim)
    launch_early(_linear_add, programs(outs, ins), arguments, constants, x_BF.device)


def advance(state: State, best_BP2: Tensor | None, last_place: int) -> None:
    """Takes the token in `id_B`, or the best one, as drawn.

    Args:
        best_BP2: what `head` left.
        last_place: of the cache; places stay there.
    """
    count = 1 if best_BP2 is None else best_BP2.shape[1]
    changed = (state.id_B, state.place_B, state.drawn_B, state.tokens_LB)
    arguments = (best_BP2, *changed, count, last_place)
    constants = (triton.next_power_of_2(count),)
    launch_early(_advance, len(state.id_B), arguments, constants, state.id_B.device)


def programs(outs: int, ins: int) -> int:
    """Programs of a product with [F, D]."""
    return -(-outs // _tile(ins)[0])


def _empty(state: State, *shape: int) -> Tensor:
    return torch.empty(len(state.id_B), *shape, device=state.id_B.device)


def _tile(ins: int) -> tuple[int, int]:
    width = triton.next_power_of_2(ins)
    return max(1, TILE // width), width


def launch_early(
    kernel: Any,
    count: int,
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    device: torch.device,
    warps: int = WARPS,
    stages: int = 3,
) -> None:
    """Launches a kernel whose last constant says whether it begins before the one before ends."""
    early = not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)
    options = {"num_warps": warps, "num_stages": stages}
    if early:
        options["launch_pdl"] = True
    launch(kernel, count, arguments, (*constants, early), device, **options)
