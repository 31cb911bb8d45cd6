"""Keys and values of the tokens so far, in memory that is allocated once.

Legend: L layers, B batch, T new positions, S positions so far, N heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashgpt.config import GPTConfig


class KVCache:
    """Room for `context_length` positions; implements `flashgpt.model.gpt2.Cache`."""

    def __init__(
        self, cfg: GPTConfig, batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (cfg.n_layers, batch, cfg.n_heads, cfg.context_length, cfg.head_dim)
        self.k_LBNSH = torch.empty(shape, device=device, dtype=dtype)
        self.v_LBNSH = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def layer(self, index: int) -> LayerKV:
        """The part of one transformer block."""
        return LayerKV(self.k_LBNSH[index], self.v_LBNSH[index], self.length)

    def advance(self, tokens: int) -> None:
        """Counts positions that all layers now hold."""
        self.length += tokens

    def clear(self) -> None:
        """Forgets all positions; the memory stays."""
        self.length = 0


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
