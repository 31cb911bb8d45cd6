"""Our Triton kernels as one operator with a gradient: what they serve, and how PyTorch sees them.

The kernels are in triton_flash.py, imported with the first CUDA tensor. q, k and v come as three
tensors, or as views of the one packed tensor that a projection gives; then the gradient comes
packed too, and nothing is transposed, stacked or copied. On the CPU the operator is blocked
attention, so that it can be traced and tested there.

Legend: B batch, T query positions, S key positions, N heads, H head dim.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from flashgpt.attention import blocked, tiles
from flashgpt.attention.dropout import Dropout, attention_keys
from flashgpt.attention.packed import (
    refuse_second_derivative,
    room,
    room_for_gradients,
    split,
)
from flashgpt.attention.request import Request

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def supports(request: Request) -> str | None:
    """Reason why the Triton kernels cannot serve, or None."""
    if request.device != "cuda":
        return f"runs on CUDA, data is on {request.device}"
    if torch.version.hip is not None:
        return "is written for NVIDIA's GPUs"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    if request.dtype not in DTYPES:
        return f"has no {str(request.dtype).removeprefix('torch.')}"
    if request.head_dim % 8 or not 16 <= request.head_dim <= 128:
        return f"needs H divisible by 8 and from 16 to 128, got {request.head_dim}"
    if request.own_masks:
        return "drops by the shared masks only"
    if request.shape == "single" and request.dropout:
        if request.gradient:
            return "rounds out, which the gradient of a single dropped weight does not forgive"
        if request.dtype == torch.float32:
            return "errs more than the rule allows in fp32, where T is 1 and weights are dropped"
    return None


LIBRARY = torch.library.Library("flashgpt", "FRAGMENT")
_MASKS = "Tensor? a, Tensor? b, Tensor? c, int threshold, Tensor? first, Tensor? last"
LIBRARY.define(
    f"triton(Tensor q, Tensor? k, Tensor? v, {_MASKS}, bool need_low) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "triton_backward(Tensor dout, Tensor q, Tensor? k, Tensor? v, Tensor out, Tensor lse, "
    f"Tensor low, {_MASKS}) -> Tensor[]"
)
forward = torch.ops.flashgpt.triton.default
backward = torch.ops.flashgpt.triton_backward.default


def _forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, *masks: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """out_BNTH, lse_BNT, and what out lost by rounding (empty without `need_low`)."""
    from flashgpt.attention import triton_flash

    *keys, need_low = masks
    return triton_flash.forward(*split(q, k, v), triton_flash.Masks(*keys), need_low)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    low: Tensor,
    *masks: Any,
) -> list[Tensor]:
    """dq, dk and dv, or one packed gradient."""
    from flashgpt.attention import triton_flash

    grads = room_for_gradients(q, k, v)
    qkv, into = split(q, k, v), split(*grads)
    triton_flash.backward(dout, *qkv, out, lse, low, triton_flash.Masks(*masks), into)
    return grads


def _blocked(
    q: Tensor, k: Tensor | None, v: Tensor | None, *masks: Any
) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c, threshold, first, _, need_low = masks
    out, lse, wide = blocked.forward(*split(q, k, v), a, b, c, threshold, first)
    return out, lse, (wide - out).to(out.dtype) if need_low else out.new_empty(0)


def _blocked_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    low: Tensor,
    *masks: Any,
) -> list[Tensor]:
    wide = out.float() + low if low.numel() else out
    grads = blocked.backward(dout, *split(q, k, v), wide, lse, *masks[:-1])
    if k is not None:
        return list(grads)
    return [torch.stack([grad.transpose(1, 2) for grad in grads], dim=2)]


def _fake(
    q: Tensor, k: Tensor | None, v: Tensor | None, *masks: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q_BNTH, _, _ = split(q, k, v)
    out_BNTH = room(q_BNTH, q_BNTH.dtype)
    low_BNTH = torch.empty_like(out_BNTH) if masks[-1] else q_BNTH.new_empty(0)
    return out_BNTH, q_BNTH.new_empty(q_BNTH.shape[:3], dtype=torch.float32), low_BNTH


class _Gradient(torch.autograd.Function):
    """The operator with its gradient; a second derivative is refused."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, a, b, c, threshold, first, last, _ = inputs
        with torch._C._AutoDispatchBelowAutograd():
            out, lse, low = forward(*inputs)
        ctx.save_for_backward(q, k, v, out, lse, low, a, b, c, first, last)
        ctx.threshold = threshold
        ctx.mark_non_differentiable(lse, low)
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        return out, lse, low

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("triton")
        q, k, v, out, lse, low, a, b, c, first, last = ctx.saved_tensors
        grads = backward(dout, q, k, v, out, lse, low, a, b, c, ctx.threshold, first, last)
        return (*grads, *[None] * (10 - len(grads)))


LIBRARY.impl("triton", _forward, "CUDA")
LIBRARY.impl("triton", _blocked, "CPU")
LIBRARY.impl("triton", _Gradient.apply, "Autograd")
LIBRARY.impl("triton_backward", _backward, "CUDA")
LIBRARY.impl("triton_backward", _blocked_backward, "CPU")
torch.library.register_fake("flashgpt::triton", _fake, lib=LIBRARY)
torch.library.register_fake(
    "flashgpt::triton_backward",
    lambda dout, q, k, v, *_: room_for_gradients(q, k, v),
    lib=LIBRARY,
)


def attention(
    q: Tensor,
    k_BNSH: Tensor | None = None,
    v_BNSH: Tensor | None = None,
    *,
    dropout: Dropout | None,
    documents_BS: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention of q_BNTH, k_BNSH, v_BNSH, or of a packed qkv_BT3NH alone: out_BNTH in q's dtype,
    lse_BNT in fp32 (no gradient)."""
    if k_BNSH is None:
        batch, queries, _, heads, _ = q.shape
        keys = queries
    else:
        (batch, heads, queries, _), keys = q.shape, k_BNSH.shape[2]
    a = b = c = first = last = None
    threshold = 0
    if dropout is not None:
        a, b, c = attention_keys(dropout, batch, heads, queries, keys)
        threshold = dropout.threshold
    if documents_BS is not None:
        first, last = tiles.document_starts(documents_BS), tiles.document_ends(documents_BS)
    gradient = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k_BNSH, v_BNSH)
    )
    need_low = gradient and q.dtype != torch.float32
    masks = (a, b, c, threshold, first, last, need_low)
    out_BNTH, lse_BNT, _ = forward(q, k_BNSH, v_BNSH, *masks)
    return out_BNTH, lse_BNT
