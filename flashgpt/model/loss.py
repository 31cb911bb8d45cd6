"""Output head and cross-entropy in one: the loss without the logits of a whole batch.

Rows go through in chunks: logits of a chunk, their softmax, and at once the gradient, in the same
buffer. So at most one chunk of logits exists, in the forward as in the backward pass, and the
softmax of each chunk is fp32 (or wider).

    loss = mean over counted rows of (logsumexp(x W^T) - (x W^T)[target])
    d loss / d logits = (softmax - one-hot) / number of counted rows

Legend: M rows (batch times positions), m a chunk of rows, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100
# On the CPU a chunk's logits stay in its caches (4 MiB in fp32), unless the vocabulary is so large
# that too few rows would be left to pay for reading the weight again.
CHUNK_LOGITS, CHUNK_MIN_ROWS = 2**20, 192
CHUNK_ROWS_CUDA = 8192


def linear_cross_entropy(x_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> Tensor:
    """Mean cross-entropy (nats per counted target) of the head `weight_VD` on `x_MD`; 0-d, fp32
    at least.

    Under autocast the products run in its dtype. Targets equal to -100 are not counted; without any
    counted target the loss is NaN, as in PyTorch. Differentiable once.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x_MD.dim() != 2 or weight_VD.dim() != 2 or x_MD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"weight must be [V, D] for x [M, D], "
            f"got {list(weight_VD.shape)} for {list(x_MD.shape)}"
        )
    if targets_M.shape != x_MD.shape[:1]:
        raise ValueError(f"targets must be [{x_MD.shape[0]}], got {list(targets_M.shape)}")
    device = x_MD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = x_MD.dtype
    need_grad = torch.is_grad_enabled() and (x_MD.requires_grad or weight_VD.requires_grad)
    loss: Tensor
    loss, _, _, _ = _forward(x_MD, weight_VD, targets_M, dtype, need_grad)
    return loss


def _chunk_rows(x_MD: Tensor, vocab: int) -> int:
    if x_MD.is_cuda:
        return CHUNK_ROWS_CUDA
    return max(CHUNK_MIN_ROWS, CHUNK_LOGITS // vocab)


@torch.library.custom_op("flashgpt::linear_cross_entropy", mutates_args=())
def _forward(
    x_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, dtype: torch.dtype, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean loss; gradients of the summed loss by x_MD and weight_VD (empty without need_grad);
    the number of counted targets.

    The 1 / number goes onto the gradients in backward, so that half-precision products see
    probabilities, not tiny fractions of them.
    """
    wide = torch.promote_types(dtype, torch.float32)
    counted_M = targets_M != IGNORE
    loss = torch.zeros((), dtype=wide, device=x_MD.device)
    dx_MD = torch.empty_like(x_MD) if need_grad else x_MD.new_empty(0)
    dw_VD = torch.zeros_like(weight_VD, dtype=wide) if need_grad else x_MD.new_empty(0)
    with torch.autocast(x_MD.device.type, enabled=False):
        weight = weight_VD.to(dtype)
        rows = _chunk_rows(x_MD, len(weight_VD))
        for start in range(0, len(x_MD), rows):
            m = slice(start, start + rows)
            x_mD, counted_m1 = x_MD[m].to(dtype), counted_M[m, None]
            target_m1 = torch.where(counted_m1, targets_M[m, None], 0)
            logits_mV = (x_mD @ weight.T).to(wide)
            softmax_mV = logits_mV.softmax(-1)
            # The largest probability is at least 1 / V, so its logarithm is exact enough.
            top_m1, where_m1 = softmax_mV.max(-1, keepdim=True)
            lse_m1 = logits_mV.gather(1, where_m1) - top_m1.log()
            loss += torch.where(counted_m1, lse_m1 - logits_mV.gather(1, target_m1), 0).sum()
            if need_grad:
                softmax_mV.scatter_add_(1, target_m1, -torch.ones_like(lse_m1))
                dlogits_mV = softmax_mV.to(dtype)
                dx_MD[m] = torch.where(counted_m1, dlogits_mV @ weight, 0)
                x_mD = torch.where(counted_m1, x_mD, 0)
                if dtype == wide:
                    dw_VD.addmm_(dlogits_mV.T, x_mD)
                else:
                    dw_VD += dlogits_mV.T @ x_mD
    total = counted_M.sum().to(wide)
    return loss / total, dx_MD, dw_VD.to(weight_VD.dtype), total


@torch.library.custom_op("flashgpt::linear_cross_entropy_backward", mutates_args=())
def _backward(dloss: Tensor, dx_MD: Tensor, dw_VD: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """An operator of its own, so that a second derivative is refused instead of wrong."""
    scale = dloss / total
    return dx_MD * scale.to(dx_MD.dtype), dw_VD * scale.to(dw_VD.dtype)


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    loss, total = x.new_empty((), dtype=wide), x.new_empty((), dtype=wide)
    if not need_grad:
        return loss, x.new_empty(0), weight.new_empty(0), total
    return loss, torch.empty_like(x), torch.empty_like(weight), total


@_backward.register_fake
def _(dloss: Tensor, dx: Tensor, dw: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dx), torch.empty_like(dw)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])


def _autograd(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx_MD, dw_VD = _backward(dloss, *ctx.saved_tensors)
    return dx_MD, dw_VD, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup)
