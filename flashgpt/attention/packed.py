"""q, k and v as a kernel may get them: three tensors, or views of the one that a projection gives.

A kernel that takes the packed tensor gives its gradient packed too: nothing is stacked or copied.
Packed means qkv_BT3NH in the place of q, and None for k and v.

Legend: B batch, T query positions, S key positions, N heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(
    q: Tensor, k_BNSH: Tensor | None = None, v_BNSH: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q_BNTH, k_BNSH, v_BNSH, of a packed tensor as views."""
    if k_BNSH is None or v_BNSH is None:
        q_BNTH, k_BNSH, v_BNSH = q.permute(2, 0, 3, 1, 4).unbind()
        return q_BNTH, k_BNSH, v_BNSH
    return q, k_BNSH, v_BNSH


def room(like_BNTH: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty [B, N, T, H] with the heads of a position side by side, as projections want it."""
    batch, heads, length, head_dim = like_BNTH.shape
    return like_BNTH.new_empty(batch, length, heads, head_dim, dtype=dtype).transpose(1, 2)


def room_for_gradients(q: Tensor, k_BNSH: Tensor | None, v_BNSH: Tensor | None) -> list[Tensor]:
    """Empty gradients, of one packed tensor or of three."""
    if k_BNSH is None or v_BNSH is None:
        return [torch.empty_like(q, memory_format=torch.contiguous_format)]
    return [room(x, x.dtype) for x in (q, k_BNSH, v_BNSH)]


def refuse_second_derivative(kernel: str) -> None:
    """For the backward operator of a kernel, which autograd would take for a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{kernel} has no second derivative; use_flash=False has")
