"""Attention of one token of each of a few texts over a cache, in Triton.

A program has one head of one text, and all its keys or a part of them. Parts are for few texts,
whose heads alone would leave most of a GPU idle: each leaves a sum of values with its peak and its
sum of weights, which `join`, or the next product, puts together.

Owns the kernels and their launches; where the texts stand is `triton_step.State`.

Legend: B texts, D = N H, N heads, H head dim, P parts, S positions of the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flashgpt.generation.triton_step import LOG2E, NONE, State, launch_early

KEYS = 256  # positions of a part
KEYS_WHOLE = 64  # looked at together where a program has all of them


@triton.jit
def _attend(
    qkv_B3NH,
    k_BNSH,
    v_BNSH,
    place_B,
    pad_B,
    parts_BNPH,
    stats_BNP2,
    out_BNH,
    scale,
    heads,
    room,
    parts: tl.constexpr,
    chunk: tl.constexpr,
    tile: tl.constexpr,
    head_dim: tl.constexpr,
    width: tl.constexpr,
    early: tl.constexpr,
):
    """Attention of the token at `place` over a part of the keys; keeps its own key and value.

    A program has one head of one text and `chunk` positions, in tiles. It leaves the sum of their
    values, weighted by 2^(score - peak), with the peak and the sum of weights; or, with `out_BNH`,
    the mean.
    """
    if early:
        gdc_launch_dependents()
    head, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    b, n = head // heads, head % heads
    h = tl.arange(0, width)
    inside = h < head_dim
    place, pad = tl.load(place_B + b), tl.load(pad_B + b)
    first = part * chunk
    base = head.to(tl.int64) * room * head_dim
    s = first + tl.arange(0, tile)
    seen = (s >= pad) & (s < place)
    at = base + s[:, None] * head_dim + h[None, :]
    mask = seen[:, None] & inside[None, :]
    k = tl.load(k_BNSH + at, mask=mask, other=0.0)
    v = tl.load(v_BNSH + at, mask=mask, other=0.0)
    if early:
        gdc_wait()
    own = qkv_B3NH + (b * 3 * heads + n) * head_dim + h
    q = tl.load(own, mask=inside, other=0.0).to(tl.float32) * (scale * LOG2E)
    score = tl.where(seen, tl.sum(k.to(tl.float32) * q[None, :], 1), NONE)
    top = tl.max(score, 0)
    # 2^(-inf - -inf) is no number: where nothing is seen, any finite peak does.
    weight = tl.exp2(score - tl.where(top == NONE, 0.0, top))
    total = tl.sum(weight, 0)
    value = tl.sum(weight[:, None] * v.to(tl.float32), 0)
    for start in range(first + tile, tl.minimum(first + chunk, place), tile):
        s = start + tl.arange(0, tile)
        seen = (s >= pad) & (s < place)
        at = base + s[:, None] * head_dim + h[None, :]
        mask = seen[:, None] & inside[None, :]
        k = tl.load(k_BNSH + at, mask=mask, other=0.0)
        v = tl.load(v_BNSH + at, mask=mask, other=0.0)
        score = tl.where(seen, tl.sum(k.to(tl.float32) * q[None, :], 1), NONE)
        peak = tl.maximum(top, tl.max(score, 0))
        safe = tl.where(peak == NONE, 0.0, peak)
        weight = tl.exp2(score - safe)
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(weight, 0)
        value = value * fade + tl.sum(weight[:, None] * v.to(tl.float32), 0)
        top = peak
    if (place >= first) & (place < first + chunk):
        kind = k_BNSH.dtype.element_ty
        k_own = tl.load(own + heads * head_dim, mask=inside, other=0.0).to(kind)
        v_own = tl.load(own + 2 * heads * head_dim, mask=inside, other=0.0).to(kind)
        at_own = base + place * head_dim + h
        tl.store(k_BNSH + at_own, k_own, mask=inside)
        tl.store(v_BNSH + at_own, v_own, mask=inside)
        score_own = tl.sum(k_own.to(tl.float32) * q, 0)
        peak = tl.maximum(top, score_own)
        fade = tl.exp2(top - peak)
        weight_own = tl.exp2(score_own - peak)
        total = total * fade + weight_own
        value = value * fade + weight_own * v_own.to(tl.float32)
        top = peak
    if out_BNH is not None:
        tl.store(out_BNH + head * head_dim + h, value / total, mask=inside)
    else:
        at_part = head * parts + part
        tl.store(parts_BNPH + at_part * head_dim + h, value, mask=inside)
        tl.store(stats_BNP2 + at_part * 2, top)
        tl.store(stats_BNP2 + at_part * 2 + 1, total)


@triton.jit
def _join(
    parts_BNPH,
    stats_BNP2,
    out_BNH,
    parts: tl.constexpr,
    head_dim: tl.constexpr,
    part_width: tl.constexpr,
    width: tl.constexpr,
    early: tl.constexpr,
):
    """The mean that the parts of one head's attention make."""
    if early:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    p = tl.arange(0, part_width)
    h = tl.arange(0, width)
    stat = stats_BNP2 + (head * parts + p) * 2
    top = tl.load(stat, mask=p < parts, other=NONE)
    share = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(share * tl.load(stat + 1, mask=p < parts, other=0.0), 0)
    at = parts_BNPH + (head * parts + p)[:, None] * head_dim + h[None, :]
    mask = (p < parts)[:, None] & (h < head_dim)[None, :]
    value = tl.sum(share[:, None] * tl.load(at, mask=mask, other=0.0), 0)
    tl.store(out_BNH + head * head_dim + h, value / total, mask=h < head_dim)


def attend(state: State, qkv_BD: Tensor, k_BNSH: Tensor, v_BNSH: Tensor) -> Tensor:
    """Attention of one token of each text over its text, whose key and value join the cache.

    Args:
        qkv_BD: [B, 3 N H], any dtype.
        k_BNSH: keys of the positions before; contiguous, as v_BNSH.

    Returns:
        [B, N H], in the dtype of qkv.
    """
    texts, heads, _, head_dim = k_BNSH.shape
    out_BD = qkv_BD.new_empty(texts, heads * head_dim)
    _attend_in(1, state, qkv_BD, k_BNSH, v_BNSH, (None, None, out_BD))
    return out_BD


def attend_in_parts(
    state: State, qkv_BD: Tensor, k_BNSH: Tensor, v_BNSH: Tensor
) -> tuple[Tensor, Tensor]:
    """`attend`, its sums left apart for `attention_linear_add`, both in fp32.

    Returns:
        parts_BNPH: sums of values over parts of the keys, weighted by 2^(score - peak).
        stats_BNP2: the peaks, and the sums of these weights.
    """
    texts, heads, room, head_dim = k_BNSH.shape
    parts = -(-room // KEYS)
    parts_BNPH = torch.empty(texts, heads, parts, head_dim, device=k_BNSH.device)
    stats_BNP2 = torch.empty(texts, heads, parts, 2, device=k_BNSH.device)
    _attend_in(parts, state, qkv_BD, k_BNSH, v_BNSH, (parts_BNPH, stats_BNP2, None))
    return parts_BNPH, stats_BNP2


def _attend_in(
    parts: int,
    state: State,
    qkv_BD: Tensor,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    outs: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    texts, heads, room, head_dim = k_BNSH.shape
    tile = min(KEYS if parts > 1 else KEYS_WHOLE, triton.next_power_of_2(room))
    scale = head_dim**-0.5
    places = (state.place_B, state.pad_B)
    arguments = (qkv_BD, k_BNSH, v_BNSH, *places, *outs, scale, heads, room)
    chunk = -(-room // parts // tile) * tile
    constants = (parts, chunk, tile, head_dim, triton.next_power_of_2(head_dim))
    launch_early(_attend, texts * heads * parts, arguments, constants, qkv_BD.device)


def join(parts_BNPH: Tensor, stats_BNP2: Tensor, dtype: torch.dtype) -> Tensor:
    """The attention whose parts `attend_in_parts` left: [B, N H]."""
    texts, heads, parts, head_dim = parts_BNPH.shape
    out_BD = parts_BNPH.new_empty(texts, heads * head_dim, dtype=dtype)
    sizes = (parts, head_dim)
    constants = (*sizes, *map(triton.next_power_of_2, sizes))
    launch_early(_join, texts * heads, (parts_BNPH, stats_BNP2, out_BD), constants, out_BD.device)
    return out_BD
