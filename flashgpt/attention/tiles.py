"""How blocked attention cuts its work, and which scores of a tile are hidden or dropped.

Legend: B batch, T query positions, S key positions, N heads, G = B * N; b, n, g, t, s slices of
them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from flashgpt.attention.dropout import keep_bits

TILE = 128  # rows of a tile, and its columns at least
# Scores in flight at once: what fits into the caches of a thread beside the other operands (0.5 MiB
# in fp32), and what keeps a GPU busy.
SCORES_PER_THREAD = 2**17
SCORES_ON_A_GPU = 2**24


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the work is cut: `groups` sequences at a time, tiles of `rows` x `columns` scores."""

    groups: int
    rows: int
    columns: int

    def parts(self, batch: int, heads: int) -> Iterator[tuple[slice, slice, slice]]:
        """Slices of B, of N and of G that hold `groups` sequences at most."""
        rows, columns = max(1, self.groups // heads), min(self.groups, heads)
        for b in range(0, batch, rows):
            for n in range(0, heads, columns):
                b_end, n_end = min(b + rows, batch), min(n + columns, heads)
                g = slice(b * heads + n, (b_end - 1) * heads + n_end)
                yield slice(b, b_end), slice(n, n_end), g


def cut(sequences: int, queries: int, keys: int, device: torch.device) -> Cut:
    """The cut of a call of B * N sequences. Square tiles waste least above the diagonal and have
    the fastest products; few sequences get wider ones, to have as many scores in flight.
    """
    on_cpu = device.type == "cpu"
    scores = SCORES_PER_THREAD * torch.get_num_threads() if on_cpu else SCORES_ON_A_GPU
    rows, sequences = min(TILE, queries), max(1, sequences)
    columns = max(1, scores // (rows * sequences * TILE)) * TILE
    return Cut(max(1, scores // (rows * min(columns, keys))), rows, columns)


class Tile:
    """One tile of scores: which are hidden, which weights are dropped.

    Works on the bits of whole tiles, in place: on the CPU torch's boolean kernels (`masked_fill`,
    `where`) take one element at a time, which is ten times slower.
    """

    def __init__(self, masks: Masks, t: slice, s: slice) -> None:
        self._masks, self._t, self._s = masks, t, s
        self._positions = slice(masks.offset + t.start, masks.offset + t.stop)

    def hide(self, scores_gts: Tensor) -> None:
        """Sets scores of invisible keys to -inf, NaN included."""
        infinity = scores_gts.new_full((), -torch.inf)
        for block_gts, diagonal in self._diagonal(scores_gts):
            above = infinity.expand(block_gts.shape[1:]).triu(diagonal + 1)
            block_gts.tril_(diagonal).add_(above)
        if (same_gts := self._same_document) is not None:
            bits = _bits(scores_gts).mul_(same_gts)
            bits.bitwise_or_((same_gts - 1).to(bits.dtype).bitwise_and_(_bits(infinity)))

    def clear(self, values_gts: Tensor) -> None:
        """Sets values of invisible keys to 0, NaN included."""
        for block_gts, diagonal in self._diagonal(values_gts):
            block_gts.tril_(diagonal)
        if self._same_document is not None:
            _bits(values_gts).mul_(self._same_document)

    def drop(self, values_gts: Tensor) -> Tensor:
        """Sets values of dropped weights to 0, NaN included."""
        if self._keep is not None:
            _bits(values_gts).mul_(self._keep)
        return values_gts

    def _diagonal(self, tile_gts: Tensor) -> Iterator[tuple[Tensor, int]]:
        """The columns that not all queries see, with their diagonal; if there are any."""
        own = self._positions.start  # last position that the first query sees
        if self._s.stop - 1 > own:
            begin = max(own, self._s.start)
            yield tile_gts[..., begin - self._s.start :], own - begin

    @functools.cached_property
    def _same_document(self) -> Tensor | None:
        """same_gts: 1 where query and key share a document, else 0; None without documents."""
        document_GS = self._masks.document_GS
        if document_GS is None:
            return None
        return torch.sub(document_GS[:, self._positions, None], document_GS[:, None, self._s]).eq_(
            0
        )

    @functools.cached_property
    def _keep(self) -> Tensor | None:
        """keep_gts: 1 where a weight is kept, 0 where it is dropped; None without dropout."""
        a_GT, b_GT, c_S = self._masks.a_GT, self._masks.b_GT, self._masks.c_S
        if a_GT is None or b_GT is None or c_S is None:
            return None
        t = self._t
        return keep_bits(a_GT[:, t, None], b_GT[:, t, None], c_S[self._s], self._masks.threshold)


@dataclasses.dataclass(frozen=True)
class Masks:
    """What a call, or a part g of it, may not see, and what it drops.

    Attributes:
        offset: absolute position of the first query, S - T.
        document_GS: first position of each key's document; None without documents.
        a_GT, b_GT, c_S: keys of the dropout law; None without dropout.
        threshold: of the dropout law.
    """

    offset: int
    document_GS: Tensor | None
    a_GT: Tensor | None
    b_GT: Tensor | None
    c_S: Tensor | None
    threshold: int

    def part(self, g: slice) -> Masks:
        """Those of a part."""
        document, a, b = (
            None if x is None else x[g] for x in (self.document_GS, self.a_GT, self.b_GT)
        )
        return dataclasses.replace(self, document_GS=document, a_GT=a, b_GT=b)

    def tiles(self, queries: int, cut: Cut) -> Iterator[tuple[slice, list[slice]]]:
        """Query tiles, last one first, and the key tiles that each one sees.

        In this order a key tile is never wider than it was before.
        """
        for start in reversed(range(0, queries, cut.rows)):
            t = slice(start, min(start + cut.rows, queries))
            end, first = self.offset + t.stop, self._first_key(t)
            columns = range(first - first % cut.columns, end, cut.columns)
            yield t, [slice(s, min(s + cut.columns, end)) for s in columns]

    def _first_key(self, t: slice) -> int:
        """A position before which no query of the tile sees a key."""
        if self.document_GS is None or self.document_GS.device.type != "cpu":
            return 0  # off the CPU asking would make the host wait
        return int(self.document_GS[:, self.offset + t.start : self.offset + t.stop].min())


def document_starts(documents_BS: Tensor) -> Tensor:
    """first_BS (int32): the first position with the same id; ids need not be in order."""
    ids, position = documents_BS.sort(dim=1, stable=True)
    run = torch.arange(ids.shape[1], device=ids.device).repeat(ids.shape[0], 1)
    run[:, 1:].masked_fill_(ids[:, 1:] == ids[:, :-1], 0)
    first = position.gather(1, run.cummax(dim=1).values)
    return torch.empty_like(first).scatter_(1, position, first).to(torch.int32)


def document_ends(documents_BS: Tensor) -> Tensor:
    """last_BS (int32): the last position with the same id."""
    return documents_BS.shape[1] - 1 - document_starts(documents_BS.flip(1)).flip(1)


def _bits(x: Tensor) -> Tensor:
    """The same memory as integers: times 1 or 0 they are x or 0, even for NaN."""
    return x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)
