"""The draw of the next token of a few texts, in Triton: `sampling.sample` in one kernel.

Weights are e = exp((logit - largest) / temperature), so probabilities but for their sum. top-k,
top-p and min-p each keep what is at least some weight. top-k's is the largest t with k weights of
at least t, top-p's the largest with enough of the sum; both are found by halving an interval of
floats, which as bits are in order.

With top-k few logits matter. The k largest of the tiles' largest logits, which the product with the
head left, are k weights of different tokens, so all that top-k keeps stands in tiles whose largest
is at least the least of these. Where ties make that too many tiles, all logits are looked at.

One program has one text. Source: the order of the limits is that of flashgpt.generation.sampling.

Legend: B texts, P tiles of the vocabulary, V vocabulary, S random numbers of a text.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashgpt.attention.triton_launch import launch
from flashgpt.generation.triton_step import State
from flashgpt.runconfig import SampleConfig

LOG2E = 1.4426950408889634
NONE = tl.constexpr(-float("inf"))
ONE = tl.constexpr(0x3F800000)  # the bits of 1.0, the largest weight
HALVINGS = tl.constexpr(30)  # of 0 .. ONE
ALL = 4096  # logits looked at together where there is no top-k
MOST_TOP_K = 512
WARPS = 8


@triton.jit
def _chunk(logits, tiles, start, count, listed, peak, factor, vocab, rows, slots: tl.constexpr):
    """Ids of `slots` tiles from `start` on, in order, and their weights: [slots, rows]."""
    slot = start + tl.arange(0, slots)
    tile = slot
    if listed:
        tile = tl.load(tiles + slot, mask=slot < count, other=0)
    ids = tile[:, None] * rows + tl.arange(0, rows)[None, :]
    mask = (slot < count)[:, None] & (ids < vocab)
    x = tl.load(logits + ids, mask=mask, other=NONE)
    return ids, tl.exp2((x - peak) * factor)


@triton.jit
def _least(
    wanted, logits, tiles, count, listed, peak, factor, vocab, limit,
    rows: tl.constexpr, slots: tl.constexpr, counting: tl.constexpr,
):  # fmt: skip
    """The largest t, of at least `limit`, whose weights of at least t reach `wanted`.

    In number with `counting`, else in sum.
    """
    low, high = tl.full([], 0, tl.int32), tl.full([], ONE + 1, tl.int32)
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        t = tl.maximum(middle.to(tl.float32, bitcast=True), limit)
        found = 0.0
        for start in range(0, count, slots):
            e = _chunk(logits, tiles, start, count, listed, peak, factor, vocab, rows, slots)[1]
            found += tl.sum(tl.where(e >= t, 1.0 if counting else e, 0.0))
        if found >= wanted:
            low = middle
        else:
            high = middle
    return low.to(tl.float32, bitcast=True)


@triton.jit
def _draw(
    logits_BV, best_BP2, tiles_BP, uniform_BS, drawn_B, id_B, factor, min_p, top_p, vocab, count,
    numbers, top_k: tl.constexpr, with_top_p: tl.constexpr, rows: tl.constexpr,
    slots: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    logits, tiles = logits_BV + b.to(tl.int64) * vocab, tiles_BP + b * count
    p = tl.arange(0, width)
    top = tl.load(best_BP2 + (b * count + p) * 2, mask=p < count, other=NONE)
    peak = tl.max(top, 0)
    listed = False
    looked = count
    if top_k > 0:
        e_top = tl.exp2((top - peak) * factor)
        low, high = tl.full([], 0, tl.int32), tl.full([], ONE + 1, tl.int32)
        for _ in range(HALVINGS):
            middle = (low + high) // 2
            found = tl.sum(tl.where(e_top >= middle.to(tl.float32, bitcast=True), 1, 0))
            if found >= top_k:
                low = middle
            else:
                high = middle
        chosen = (e_top >= low.to(tl.float32, bitcast=True)) & (p < count)
        place = tl.cumsum(chosen.to(tl.int32), 0)
        number = tl.max(place, 0)
        listed = number <= slots
        if listed:
            looked = number
        tl.store(tiles + place - 1, p, mask=chosen & listed)
        tl.debug_barrier()
    least = min_p
    if top_k > 0:
        least_k = _least(
            top_k, logits, tiles, looked, listed, peak, factor, vocab, 0.0, rows, slots, True
        )
        least = tl.maximum(least, least_k)
    else:
        least_k = 0.0
    if with_top_p:
        total = 0.0
        for start in range(0, looked, slots):
            e = _chunk(logits, tiles, start, looked, listed, peak, factor, vocab, rows, slots)[1]
            total += tl.sum(tl.where(e >= least_k, e, 0.0))
        least_p = _least(
            top_p * total, logits, tiles, looked, listed, peak, factor, vocab, least_k, rows,
            slots, False,
        )  # fmt: skip
        least = tl.maximum(least, least_p)
    total = tl.full([], 0.0, tl.float64)
    for start in range(0, looked, slots):
        e = _chunk(logits, tiles, start, looked, listed, peak, factor, vocab, rows, slots)[1]
        total += tl.sum(tl.where(e >= least, e, 0.0).to(tl.float64))
    target = tl.load(uniform_BS + b * numbers + tl.load(drawn_B + b)) * total
    before = tl.full([], 0.0, tl.float64)
    found_id, last_id = vocab, 0
    for start in range(0, looked, slots):
        ids, e = _chunk(logits, tiles, start, looked, listed, peak, factor, vocab, rows, slots)
        weight = tl.reshape(tl.where(e >= least, e, 0.0), [slots * rows]).to(tl.float64)
        id_ = tl.reshape(ids, [slots * rows])
        border = before + tl.cumsum(weight, 0)
        found_id = tl.minimum(
            found_id, tl.min(tl.where((border > target) & (weight > 0), id_, vocab))
        )
        last_id = tl.maximum(last_id, tl.max(tl.where(weight > 0, id_, 0)))
        before += tl.sum(weight)
    # Sums in another order may leave the target behind the last border.
    tl.store(id_B + b, tl.minimum(found_id, last_id).to(tl.int64))


def serves(config: SampleConfig) -> bool:
    """Whether `draw` can."""
    return config.temperature > 0 and 0 <= config.top_k <= MOST_TOP_K


def draw(
    logits_BV: Tensor, best_BP2: Tensor, state: State, uniform_BS: Tensor, config: SampleConfig
) -> None:
    """Writes the next token of each text to `state.id_B`.

    Args:
        logits_BV: fp32, contiguous.
        best_BP2: the largest logit of each of P tiles of V.
        uniform_BS: u in [0, 1), of each text one for each token to be drawn.
    """
    (texts, vocab), tiles = logits_BV.shape, best_BP2.shape[1]
    rows = triton.next_power_of_2(-(-vocab // tiles))
    top_k = config.top_k if config.top_k < vocab else 0
    slots = max(triton.next_power_of_2(top_k) if top_k else ALL // rows, 1)
    top_p = 1.0 if config.top_p is None else config.top_p
    arguments = (
        *(
            logits_BV,
            best_BP2,
            torch.empty(texts, tiles, dtype=torch.int32, device=logits_BV.device),
        ),
        *(uniform_BS, state.drawn_B, state.id_B, LOG2E / config.temperature),
        *(config.min_p or 0.0, top_p, vocab, tiles, uniform_BS.shape[1]),
    )
    constants = (top_k, top_p < 1, rows, slots, triton.next_power_of_2(tiles))
    launch(_draw, texts, arguments, constants, logits_BV.device, num_warps=WARPS)
