"""The keys of the dropout law in one launch: Philox4x32-7 in Triton, by Triton's own `tl.philox`.

dropout.py owns the law and the definition; this file is imported when the first CUDA tensor comes.

Legend: B batch, T rows (query positions), S columns (key positions), N heads.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashgpt.attention.triton_launch import launch

ROUNDS = tl.constexpr(7)
BLOCK = 1024


@triton.jit(do_not_specialize=["layer", "site", "start"])
def _keys(
    Seed, FirstRow, A, B, C, layer, site, heads, start, rows, columns, total,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """a and b of row i = g * rows + t at counter (start + t, global g, layer, site), then c of
    column j at (j, 0, layer, site + 1)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    of_row = i < total
    g = tl.load(FirstRow) * heads + i // rows
    word0, word1, _, _ = tl.philox(
        tl.load(Seed),
        tl.where(of_row, start + i % rows, i - total).to(tl.uint32),
        tl.where(of_row, g, 0).to(tl.uint32),
        tl.full([BLOCK], layer, tl.uint32),
        tl.where(of_row, site, site + 1).to(tl.uint32),
        ROUNDS,
    )
    tl.store(A + i, (word0 | 1).to(tl.int32, bitcast=True), of_row)
    tl.store(B + i, (word1 ^ 0x80000000).to(tl.int32, bitcast=True), of_row)
    at_column = (i >= total) & (i < total + columns)
    tl.store(C + i - total, word0.to(tl.int32, bitcast=True), at_column)


def keys(
    seed: Tensor,
    first_row: Tensor,
    layer: int,
    site: int,
    batch: int,
    heads: int,
    start: int,
    rows: int,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """a_BNT, b_BNT (lowered by 2^31) and c_S, int32, as `dropout._keys` defines them."""
    a_BNT = torch.empty(batch, heads, rows, dtype=torch.int32, device=seed.device)
    b_BNT = torch.empty_like(a_BNT)
    c_S = torch.empty(columns, dtype=torch.int32, device=seed.device)
    total = a_BNT.numel()
    tables = (a_BNT, b_BNT, c_S)
    numbers = (layer, site, heads, start, rows, columns, total)
    programs = math.ceil((total + columns) / BLOCK)
    launch(_keys, programs, (seed, first_row, *tables, *numbers), (BLOCK,), seed.device)
    return tables
