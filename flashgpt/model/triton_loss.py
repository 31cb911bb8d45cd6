"""The cross-entropy of rows of logits in Triton: losses, and in place of the logits their gradient.

Owns the kernel and its launch; the products around it are in loss.py, which imports this file when
the first CUDA tensor comes, for it needs Triton.

With x the logits of a row, t its target, top = max(x) and total = sum of exp(x - top):

    loss = (top - x[t]) + log(total)          p = exp(x - top) / total        dx = p - one-hot(t)

top and total stay apart: their sum, the log-sum-exp, would round at the size of the logits.

One program has one row and reads it twice, the second time from the L2 cache. The first pass keeps
a peak and a total for each piece of 16 bytes in a tile, online (Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018), and joins them at its end. Sums are in fp32, and nothing
is added up across rows, so results repeat bit for bit.

Legend: M rows, C columns: the vocabulary and what pads it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
NONE = tl.constexpr(-float("inf"))

# Pieces of 16 bytes in a tile, and warps of a program. The rows of all programs under way must fit
# the L2 cache (100 kB each at GPT-2's vocabulary in half precision): two an SM with 32 warps.
PIECES, WARPS = 1024, 32


@triton.jit
def _tile(logits, start, size: tl.constexpr, offset, vocab, columns):
    """Logits from column `start` on in fp32, -inf from `vocab` on."""
    if start + size <= vocab:
        x = tl.load(logits + start + offset)
    else:
        # Bounded by `columns`, whose divisors the compiler knows: loads stay wide.
        x = tl.load(logits + start + offset, mask=start + offset < columns, other=0.0)
        x = tl.where(start + offset < vocab, x, NONE)
    return x.to(tl.float32)


@triton.jit
def _row(
    logits,
    targets,
    losses,
    stride,
    vocab,
    columns,
    ignore: tl.constexpr,
    gradient: tl.constexpr,
    pieces: tl.constexpr,
    width: tl.constexpr,
):
    """One row: its loss, and with `gradient` dx over its logits. Tiles are [pieces, width]."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    kind = logits.dtype.element_ty
    target = tl.load(targets + row)
    size: tl.constexpr = pieces * width
    offset = tl.arange(0, pieces)[:, None] * width + tl.arange(0, width)[None, :]
    if target == ignore:
        tl.store(losses + row, 0.0)
        if gradient:
            zeros = tl.zeros([pieces, width], kind)
            for start in range(0, columns, size):
                tl.store(logits + start + offset, zeros, mask=start + offset < columns)
    else:
        known = (target >= 0) & (target < vocab)
        x_target = tl.load(logits + target, mask=known, other=0.0).to(tl.float32)

        peak = tl.full([pieces], LOWEST, tl.float32)
        total = tl.zeros([pieces], tl.float32)
        for start in range(0, vocab, size):
            x = _tile(logits, start, size, offset, vocab, columns)
            higher = tl.maximum(peak, tl.max(x, 1))
            total = total * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher[:, None]), 1)
            peak = higher
        top = tl.max(peak, 0)
        total = tl.sum(total * tl.exp(peak - top), 0)
        total = tl.where(known, total, float("nan"))
        tl.store(losses + row, (top - x_target) + tl.log(total))

        if gradient:
            scale = 1.0 / total
            tl.debug_barrier()  # all threads hold x_target before one of them writes over it
            for start in range(0, columns, size):
                p = tl.exp(_tile(logits, start, size, offset, vocab, columns) - top) * scale
                tl.store(logits + start + offset, p.to(kind), mask=start + offset < columns)
            tl.debug_barrier()  # p stands at the target before it is replaced
            dx_target = tl.exp(x_target - top) * scale - 1.0
            tl.store(logits + target, dx_target.to(kind), mask=known)


def cross_entropy_(
    logits_MC: Tensor, targets_M: Tensor, losses_M: Tensor, vocab: int, ignore: int, gradient: bool
) -> None:
    """Writes the loss of each row and, with `gradient`, d loss / d logits over the logits.

    Args:
        logits_MC: fp32, fp16 or bf16; the columns of a row adjacent. Those from `vocab` on are
            padding: they count as -inf, and their gradient is 0.
        targets_M: adjacent. `ignore` makes loss and gradient 0; any other value outside
            0 .. vocab - 1 makes them NaN.
        losses_M: fp32, adjacent.
    """
    with torch.cuda.device_of(logits_MC):
        _row[(len(logits_MC),)](
            logits_MC,
            targets_M,
            losses_M,
            logits_MC.stride(0),
            vocab,
            logits_MC.shape[1],
            ignore,
            gradient,
            PIECES,
            16 // logits_MC.element_size(),
            num_warps=WARPS,
        )
