"""Keys and values of the tokens so far, in memory that is allocated once.

Rows of different lengths end together: row b begins after `pads[b]` positions that hold no text,
so that one step writes one position for all of them. Its token at position s of the cache is token
s - pads[b] of its text; where anything is padded, `documents` hides the rest from it.

Legend: L layers, B batch, T new positions, S positions so far, N heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashgpt.config import GPTConfig


class KVCache:
    """Room for the positions of a batch; implements `flashgpt.model.gpt2.Cache`.

    Args:
        pads: positions before each row's text; none when left out.
        capacity: positions there is room for; `context_length` when left out.
    """

    def __init__(
        self,
        cfg: GPTConfig,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        pads: Sequence[int] = (),
        capacity: int | None = None,
    ) -> None:
        room = cfg.context_length if capacity is None else capacity
        shape = (cfg.n_layers, batch, cfg.n_heads, room, cfg.head_dim)
        self.cfg = cfg
        self.k_LBNSH = torch.empty(shape, device=device, dtype=dtype)
        self.v_LBNSH = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0
        self.pads = tuple(pads) or (0,) * batch

    def layer(self, index: int) -> LayerKV:
        """The part of one transformer block."""
        return LayerKV(self.k_LBNSH[index], self.v_LBNSH[index], self.length)

    def advance(self, tokens: int) -> None:
        """Counts positions that all layers now hold."""
        self.length += tokens


class Source(NamedTuple):
    """Where a row of a new cache comes from."""

    cache: KVCache
    row: int


def gather(sources: Sequence[Source], capacity: int) -> KVCache:
    """A new cache whose rows are copies of these, padded to the longest text and no more."""
    lengths = [source.cache.length - source.cache.pads[source.row] for source in sources]
    end, like = max(lengths), sources[0].cache
    pads = [end - length for length in lengths]
    device, dtype = like.k_LBNSH.device, like.k_LBNSH.dtype
    made = KVCache(like.cfg, len(sources), device, dtype, pads=pads, capacity=capacity)
    for row, (source, pad) in enumerate(zip(sources, pads, strict=True)):
        begin = source.cache.pads[source.row]
        for whole, part in (
            (made.k_LBNSH, source.cache.k_LBNSH),
            (made.v_LBNSH, source.cache.v_LBNSH),
        ):
            # A weight of 0 does not silence a NaN, which fresh memory may hold.
            whole[:, row, :, :pad] = 0
            whole[:, row, :, pad:end] = part[:, source.row, :, begin : source.cache.length]
    made.length = end
    return made


class LayerKV:
    """One layer of a KVCache."""

    def __init__(self, k_BNSH: Tensor, v_BNSH: Tensor, length: int) -> None:
        self.k_BNSH, self.v_BNSH, self.length = k_BNSH, v_BNSH, length

    def extend(self, k_BNTH: Tensor, v_BNTH: Tensor) -> tuple[Tensor, Tensor]:
        """Writes new positions; returns all so far as views: k_BNSH, v_BNSH."""
        end = self.length + k_BNTH.shape[2]
        self.k_BNSH[:, :, self.length : end] = k_BNTH
        self.v_BNSH[:, :, self.length : end] = v_BNTH
        return self.k_BNSH[:, :, :end], self.v_BNSH[:, :, :end]
