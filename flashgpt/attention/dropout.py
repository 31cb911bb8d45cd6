"""Dropout whose mask is a pure function, so that every kernel on every device draws the same one.

Owns the masks: which attention weight and which activation is dropped. Owns no random state: a mask
depends on (seed, layer, global batch row, head, position) and on nothing else, so block size,
sequence length, device, process count, eager or compiled do not matter.

An attention weight (i, j) is kept if

    (a_i * c_j + b_i) mod 2^32  >=  floor(p * 2^32)

with row keys (a_i | 1, b_i) and a column key c_j from Philox4x32-7 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011). In a row this is the multiply-add-shift family of
Dietzfelbinger (STACS 1996), pairwise independent in its high bits; rare column triples with
c_i + c_k = 2 c_j are dependent, which is harmless here. The cost is one integer multiply-add per
weight; Philox runs per row and per column only.

Legend: B batch, T query positions, S key positions, N heads, D features.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
HALF = 2**31
ATTENTION = 0  # third counter word of its row keys; column keys are one further
EMBEDDING, ATTENTION_OUTPUT, MLP_OUTPUT = 0, 1, 2


def keep_scale(threshold: int) -> float:
    """1 / (probability that a value is kept)."""
    return 2**32 / (2**32 - threshold)


@dataclasses.dataclass(frozen=True)
class Dropout:
    """What a dropout mask is a function of.

    Attributes:
        p: probability that a value is dropped, in [0, 1). What is really used is the exact
            fraction floor(p * 2^32) / 2^32.
        seed: 64 bits, 0-d int64 tensor on the device of the data.
        first_row: row of the first sequence in the GLOBAL batch of this step (rank and micro-step
            included), 0-d int64 tensor on the device of the data.
        layer: index of the transformer block.
        own_masks: attention weights are dropped by the kernel's own generator (PyTorch's) instead
            of the shared masks; then they depend on the kernel.
    """

    p: float
    seed: Tensor
    first_row: Tensor
    layer: int = 0
    own_masks: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"dropout p must be in [0, 1), got {self.p}")

    @property
    def threshold(self) -> int:
        """Draws below this, of 2^32, are dropped."""
        return int(self.p * 2**32)

    @property
    def scale(self) -> float:
        """1 / (exact probability that a value is kept)."""
        return keep_scale(self.threshold)

    def at(self, layer: int) -> Dropout:
        """The same draw for another layer."""
        return Dropout(self.p, self.seed, self.first_row, layer, self.own_masks)

    def with_own_masks(self) -> Dropout:
        """The same, but each kernel draws attention masks of its own."""
        return Dropout(self.p, self.seed, self.first_row, self.layer, own_masks=True)


@torch.library.custom_op("flashgpt::draw_seed", mutates_args=())
def _draw_seed(like: Tensor) -> Tensor:
    seed = torch.randint(-(2**63), 2**63 - 1, (), generator=torch.default_generator)
    return seed.to(like.device)


@_draw_seed.register_fake
def _(like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=like.device)


def fresh(p: float, like: Tensor) -> Dropout:
    """A Dropout whose seed comes from torch's default CPU generator, for a call nobody seeded.

    Equal `torch.manual_seed` gives equal masks, eager and compiled: the drawing is one opaque
    operation, which a compiler neither replaces by its own generator nor repeats in backward.
    """
    seed = _draw_seed(like)
    return Dropout(p, seed, torch.zeros((), dtype=torch.int64, device=like.device))


def philox(
    c0: Tensor | int, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-7: four words in [0, 2^32), as int64, for counter (c0, c1, c2, c3) and key `seed`.

    Counter words broadcast against each other. Runs in int64; torch's own uint32 has no arithmetic.
    A product of two words would overflow there, which compiled C++ may turn into anything (g++
    drops the mask after the shift): so the factors are lowered by 2^32, and x * 2^32 is put back.
    """
    # Numbers are filled in on the device: a copy from the host would wait for it.
    x0, x1, x2, x3 = (
        (c if isinstance(c, Tensor) else torch.full_like(seed, c)) & MASK32
        for c in (c0, c1, c2, c3)
    )
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(7):
        p0, p1 = x0 * (0xD2511F53 - 2**32), x2 * (0xCD9E8D57 - 2**32)
        x0, x1, x2, x3 = (
            (((p1 >> 32) + x2) & MASK32) ^ x1 ^ k0,
            p1 & MASK32,
            (((p0 >> 32) + x0) & MASK32) ^ x3 ^ k1,
            p0 & MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return x0, x1, x2, x3


def _signed(word: Tensor) -> Tensor:
    """The int32 with the bits of a word in [0, 2^32)."""
    return (((word + HALF) & MASK32) - HALF).to(torch.int32)


class Keys(NamedTuple):
    """What the mask of one call is made of, int32: kernels read these tables.

    Attributes:
        a_BNT, b_BNT: of each row; b is lowered by 2^31.
        c_S: of each column.
    """

    a_BNT: Tensor
    b_BNT: Tensor
    c_S: Tensor


LIBRARY = torch.library.Library("flashgpt", "FRAGMENT")
LIBRARY.define(
    "dropout_keys(Tensor seed, Tensor first_row, int layer, int site, int batch, int heads, "
    "int start, int rows, int columns) -> (Tensor, Tensor, Tensor)"
)
_keys = torch.ops.flashgpt.dropout_keys.default


def _keys_in_pytorch(
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
    """Keys of rows start .. start + rows - 1 at counter (row, (first_row + b) * heads + n, layer,
    site), and of columns 0 .. columns - 1 at (column, 0, layer, site + 1)."""
    device = seed.device
    row_B11 = (torch.arange(batch, device=device) + first_row)[:, None, None]
    head_N1 = torch.arange(heads, device=device)[:, None]
    position_T = torch.arange(start, start + rows, device=device)
    word0, word1, _, _ = philox(position_T, row_B11 * heads + head_N1, layer, site, seed)
    column, _, _, _ = philox(torch.arange(columns, device=device), 0, layer, site + 1, seed)
    return _signed(word0 | 1), (word1 - HALF).to(torch.int32), _signed(column)


def _keys_on_cuda(seed: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same in one launch, where Triton is there."""
    try:
        from flashgpt.attention import triton_keys
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return _keys_in_pytorch(seed, *args)
    return triton_keys.keys(seed, *args)


def _fake_keys(
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
    a_BNT = seed.new_empty(batch, heads, rows, dtype=torch.int32)
    return a_BNT, torch.empty_like(a_BNT), seed.new_empty(columns, dtype=torch.int32)


LIBRARY.impl("dropout_keys", _keys_in_pytorch, "CompositeExplicitAutograd")
LIBRARY.impl("dropout_keys", _keys_on_cuda, "CUDA")
torch.library.register_fake("flashgpt::dropout_keys", _fake_keys, lib=LIBRARY)


def attention_keys(dropout: Dropout, batch: int, heads: int, queries: int, keys: int) -> Keys:
    """Row and column keys. Positions are absolute: the first of T queries is at S - T."""
    seed, first_row, start = dropout.seed, dropout.first_row, keys - queries
    return Keys(
        *_keys(seed, first_row, dropout.layer, ATTENTION, batch, heads, start, queries, keys)
    )


def keep_bits(a: Tensor, b: Tensor, c: Tensor, threshold: int) -> Tensor:
    """1 where a * c + b says that a value is kept, else 0 (int32); a, b, c broadcast.

    int32 arithmetic wraps modulo 2^32, and with b lowered by 2^31 the signed comparison orders as
    the unsigned one of the definition does. In three steps of one dtype, because the CPU
    vectorises those alone: a bool result, or one `addcmul`, takes ten times as long.
    """
    return torch.mul(a, c).add_(b).ge_(threshold - HALF)


def attention_keep(dropout: Dropout, batch: int, heads: int, queries: int, keys: int) -> Tensor:
    """The whole attention mask keep_BNTS (bool, True = kept), bottom-right aligned."""
    a_BNT, b_BNT, c_S = attention_keys(dropout, batch, heads, queries, keys)
    return keep_bits(a_BNT[..., None], b_BNT[..., None], c_S, dropout.threshold).bool()


def element_keep(
    dropout: Dropout, site: int, batch: int, start: int, count: int, dim: int
) -> Tensor:
    """The mask keep_BTD (bool) of an elementwise site; `start` is the first absolute position."""
    where = (dropout.layer, 2 + 2 * site, batch, 1, start, count, dim)
    a_B1T, b_B1T, c_D = _keys(dropout.seed, dropout.first_row, *where)
    return keep_bits(a_B1T[:, 0, :, None], b_B1T[:, 0, :, None], c_D, dropout.threshold).bool()


def drop_elements(x_BTD: Tensor, dropout: Dropout | None, site: int, start: int = 0) -> Tensor:
    """Drops single activations of x_BTD; without a Dropout x_BTD itself.

    Args:
        site: EMBEDDING, ATTENTION_OUTPUT or MLP_OUTPUT.
        start: absolute position of the first token.
    """
    if dropout is None or not dropout.threshold:
        return x_BTD
    batch, count, dim = x_BTD.shape
    keep_BTD = element_keep(dropout, site, batch, start, count, dim)
    return torch.where(keep_BTD, x_BTD * dropout.scale, 0)
