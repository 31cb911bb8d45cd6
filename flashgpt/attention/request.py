"""What an attention call asks of a kernel, reduced to the few facts that decide who serves it."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

T_BUCKETS = (1, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
Shape = Literal["square", "single", "chunk"]


@dataclasses.dataclass(frozen=True)
class Request:
    """Facts that `supports` and `choose` may use; few, so that the choice can be cached.

    Attributes:
        device: device type, "cpu" or "cuda".
        dtype: of q, k and v.
        head_dim: features per head.
        t_bucket: smallest entry of T_BUCKETS that holds the query count (the last one beyond it).
        shape: square (T == S), single (T == 1) or chunk (1 < T < S).
        dropout: attention weights are dropped.
        documents: packed documents must not see each other.
        gradient: a backward pass will follow.
        deterministic: only kernels whose backward is proven to repeat bit for bit.
        own_masks: dropout masks are the kernel's own, not the shared ones.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    t_bucket: int
    shape: Shape
    dropout: bool
    documents: bool
    gradient: bool
    deterministic: bool
    own_masks: bool = False

    def __str__(self) -> str:
        parts = [self.device, str(self.dtype).removeprefix("torch."), f"H {self.head_dim}"]
        parts += [f"T <= {self.t_bucket}", self.shape]
        flags = ("dropout", "own_masks", "documents", "gradient", "deterministic")
        parts += [flag.replace("_", " ") for flag in flags if getattr(self, flag)]
        return ", ".join(parts)


def bucket(queries: int) -> int:
    """The T_BUCKETS entry of a query count."""
    for limit in T_BUCKETS:
        if queries <= limit:
            return limit
    return T_BUCKETS[-1]


def shape_of(queries: int, keys: int) -> Shape:
    """How T and S relate; T == S == 1 counts as single."""
    if queries == 1:
        return "single"
    return "square" if queries == keys else "chunk"
