"""Output head and cross-entropy in one: the loss without the logits of a whole batch.

Rows go through in chunks: logits of a chunk, their softmax, and at once the gradient, in the same
buffer. So at most one chunk of logits exists, in the forward as in the backward pass, and the
softmax of each chunk is fp32 (or wider).

`_plain` does so in PyTorch's operators, on any device; `_fused`, on CUDA, with one Triton kernel
(triton_loss.py) between the three products: the logits stay in the dtype of the products, and are
read and written once.

    loss = mean over counted rows of (logsumexp(x W^T) - (x W^T)[target])
    d loss / d logits = (softmax - one-hot) / number of counted rows

Legend: M rows (batch times positions), m a chunk of rows, D model width, V vocabulary, C columns:
V and what pads it.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from flashgpt.model import precision

IGNORE = -100
# On the CPU a chunk's logits stay in its caches (4 MiB in fp32), unless the vocabulary is so large
# that too few rows would be left to pay for reading the weight again.
CHUNK_LOGITS, CHUNK_MIN_ROWS = 2**20, 192
CHUNK_ROWS_CUDA = 8192
# On CUDA with Triton: 1.6 GB of half-precision logits at GPT-2's vocabulary. Each chunk reads and
# writes the weight's gradient once, which is little beside so many logits.
CHUNK_ROWS_TRITON = 16384
# Products are fast when rows start at multiples of 128 bytes.
COLUMNS_MULTIPLE = 64


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
    dtype = precision.of_products(x_MD)
    need_grad = torch.is_grad_enabled() and (x_MD.requires_grad or weight_VD.requires_grad)
    loss: Tensor
    loss, _, _, _ = _forward(x_MD, weight_VD, targets_M, dtype, need_grad)
    return loss


def chunk_bytes(device: torch.device, vocab: int, dtype: torch.dtype, rows: int) -> int:
    """Bytes of the logits, and of what is made of them, that exist at once in a training step.

    They grow with the rows up to some thousands of them and no further.

    Args:
        dtype: of the products.
        rows: that go through the head in one pass.
    """
    if device.type == "cuda" and _has_kernel(dtype):
        return min(rows, CHUNK_ROWS_TRITON) * _columns(vocab) * dtype.itemsize
    wide = torch.promote_types(dtype, torch.float32)
    chunk = _chunk_rows(device, vocab)
    # Logits and softmax; the softmax of one chunk is let go when that of the next is there.
    counted = 2 * min(rows, chunk) + min(max(rows - chunk, 0), chunk)
    return counted * vocab * wide.itemsize


def _chunk_rows(device: torch.device, vocab: int) -> int:
    if device.type == "cuda":
        return CHUNK_ROWS_CUDA
    return max(CHUNK_MIN_ROWS, CHUNK_LOGITS // vocab)


def _columns(vocab: int) -> int:
    return -(-vocab // COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE


@torch.library.custom_op("flashgpt::linear_cross_entropy", mutates_args=())
def _forward(
    x_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, dtype: torch.dtype, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean loss; gradients of the summed loss by x_MD and weight_VD (empty without need_grad);
    the number of counted targets.

    The 1 / number goes onto the gradients in backward, so that half-precision products see
    probabilities, not tiny fractions of them.
    """
    serves = _fused if x_MD.is_cuda and _kernel_takes(weight_VD, dtype) else _plain
    return serves(x_MD, weight_VD, targets_M, dtype, need_grad)


def _plain(
    x_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, dtype: torch.dtype, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    counted_M = targets_M != IGNORE
    loss = torch.zeros((), dtype=wide, device=x_MD.device)
    dx_MD = torch.empty_like(x_MD) if need_grad else x_MD.new_empty(0)
    dw_VD = torch.zeros_like(weight_VD, dtype=wide) if need_grad else x_MD.new_empty(0)
    with torch.autocast(x_MD.device.type, enabled=False):
        weight = weight_VD.to(dtype)
        rows = _chunk_rows(x_MD.device, len(weight_VD))
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


def _kernel_takes(weight_VD: Tensor, dtype: torch.dtype) -> bool:
    return weight_VD.is_contiguous() and _has_kernel(dtype)


def _has_kernel(dtype: torch.dtype) -> bool:
    return (
        dtype in (torch.float32, torch.float16, torch.bfloat16)
        # Before, addmm added half-precision products to nothing in fp32.
        and torch.__version__ >= (2, 10)  # type: ignore[operator]
        and _triton_is_installed()
    )


@functools.cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


def _fused(
    x_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, dtype: torch.dtype, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from flashgpt.model.triton_loss import cross_entropy_

    (count, width), vocab = x_MD.shape, len(weight_VD)
    columns = _columns(vocab)
    make = functools.partial(torch.empty, device=x_MD.device)
    weight_CD = make(columns, width, dtype=dtype)
    weight_CD[:vocab] = weight_VD
    weight_CD[vocab:] = 0
    chunk_mC = make(min(CHUNK_ROWS_TRITON, count), columns, dtype=dtype)
    loss_M = make(count, dtype=torch.float32)
    if need_grad:
        dx_MD = torch.empty_like(x_MD, dtype=dtype if x_MD.dtype == dtype else torch.float32)
        dw_CD = make(columns, width, dtype=torch.float32)
    else:
        dx_MD, dw_CD = x_MD.new_empty(0), weight_VD.new_empty(0)
    counted_M, targets_M = targets_M != IGNORE, targets_M.contiguous()
    with torch.autocast(x_MD.device.type, enabled=False):
        for start in range(0, max(count, 1), CHUNK_ROWS_TRITON):
            m = slice(start, start + CHUNK_ROWS_TRITON)
            # Rows that are not counted may hold anything, also NaN.
            x_mD = torch.where(counted_M[m, None], x_MD[m].to(dtype), 0)
            logits_mC = chunk_mC[: len(x_mD)]
            torch.mm(x_mD, weight_CD.T, out=logits_mC)
            cross_entropy_(logits_mC, targets_M[m], loss_M[m], vocab, IGNORE, need_grad)
            if need_grad:
                dlogits_mC = logits_mC
                _multiply(dlogits_mC, weight_CD, dx_MD[m], add=False)
                _multiply(dlogits_mC.T, x_mD, dw_CD, add=start > 0)
    total = counted_M.sum().to(torch.float32)
    dw_VD = dw_CD[:vocab].to(weight_VD.dtype)
    return loss_M.sum() / total, dx_MD.to(x_MD.dtype), dw_VD, total


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """out = a b, or with `add` out + a b, in the dtype of `out`: theirs or fp32."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=int(add), out=out)


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    loss, total = x.new_empty((), dtype=wide), x.new_empty((), dtype=wide)
    if not need_grad:
        return loss, x.new_empty(0), weight.new_empty(0), total
    return loss, torch.empty_like(x), torch.empty_like(weight), total


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])


def _autograd(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("the loss in one pass with its output head has no second derivative")
    *gradients, total = ctx.saved_tensors
    # As an array of one element, not a number, fp32 makes the product fp32: rounded once.
    scale = (dloss / total).reshape(1)
    dx_MD, dw_VD = (torch.mul(d, scale, out=torch.empty_like(d)) for d in gradients)
    return dx_MD, dw_VD, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup)
