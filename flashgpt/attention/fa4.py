"""FlashAttention-4, through the optional package flash-attn-4 (extra `fa4`): Hopper and newer.

Its forward pass cuts queries into tiles of 192, which wastes most on short texts; there cuDNN's
forward pass comes before its backward pass. Both give the same out and lse up to rounding.

Legend: B batch, T query positions, S key positions, N heads, H head dim.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from typing import Any

import torch
from torch import Tensor

from flashgpt.attention.dropout import Dropout
from flashgpt.attention.packed import (
    refuse_second_derivative,
    room,
    room_for_gradients,
    split,
)
from flashgpt.attention.request import Request
from flashgpt.attention.sdpa import HALF_TYPES, aten

CUDNN_UP_TO = 2048  # tokens; measured on an H100 (torch 2.11, cuDNN 9.19)


@functools.cache
def _missing() -> str | None:
    """Why the package cannot be used on this machine, or None; imports it, which takes seconds."""
    try:
        importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return "needs the package flash-attn-4: pip install 'flashgpt[fa4]'"
    if torch.cuda.get_device_capability() < (9, 0):
        return f"needs a Hopper GPU or newer, got {torch.cuda.get_device_name()}"
    try:
        importlib.import_module("flash_attn.cute.interface")
    except (ImportError, RuntimeError, OSError) as error:
        return f"flash-attn-4 cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    return None


def supports(request: Request) -> str | None:
    """Reason why FlashAttention-4 cannot serve, or None."""
    if request.device != "cuda":
        return f"runs on CUDA, data is on {request.device}"
    if request.dtype not in HALF_TYPES:
        return f"has no {str(request.dtype).removeprefix('torch.')}"
    if request.head_dim % 8 or request.head_dim > 128:
        return f"needs H divisible by 8 and <= 128, got {request.head_dim}"
    if request.dropout:
        return "has no dropout"
    if request.documents:
        return "has no document mask"
    if request.deterministic and request.gradient:
        return "its backward adds up dQ in no fixed order"
    return _missing()


LIBRARY = torch.library.Library("flashgpt", "FRAGMENT")
LIBRARY.define("fa4(Tensor q, Tensor? k, Tensor? v) -> (Tensor, Tensor)")
LIBRARY.define(
    "fa4_backward(Tensor dout, Tensor q, Tensor? k, Tensor? v, Tensor out, Tensor lse) -> Tensor[]"
)
forward = torch.ops.flashgpt.fa4.default
backward = torch.ops.flashgpt.fa4_backward.default


def _forward(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor]:
    """out_BNTH and lse_BNT."""
    q_BNTH, k_BNSH, v_BNSH = split(q, k, v)
    if not q_BNTH.numel():
        return _fake(q, k, v)
    queries, keys = q_BNTH.shape[2], k_BNSH.shape[2]
    if 1 < queries == keys <= CUDNN_UP_TO:
        cudnn = aten._scaled_dot_product_cudnn_attention.default
        out_BNTH, lse_BNT1, *_ = cudnn(q_BNTH, k_BNSH, v_BNSH, None, True, 0.0, True)
        # Laid out as q is, which is as `_fake` says for views of the packed tensor only.
        out_BNTH = out_BNTH.transpose(1, 2).contiguous().transpose(1, 2)
        return out_BNTH, lse_BNT1.view(q_BNTH.shape[:3])
    from flash_attn.cute.interface import _flash_attn_fwd

    q_BTNH, k_BSNH, v_BSNH = (x.transpose(1, 2) for x in (q_BNTH, k_BNSH, v_BNSH))
    out_BTNH, lse_BNT, *_ = _flash_attn_fwd(q_BTNH, k_BSNH, v_BSNH, causal=True, return_lse=True)
    return out_BTNH.transpose(1, 2), lse_BNT


def _backward(
    dout: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, out: Tensor, lse: Tensor
) -> list[Tensor]:
    """dq, dk and dv, or one packed gradient."""
    from flash_attn.cute.interface import _flash_attn_bwd

    grads = room_for_gradients(q, k, v)
    qkv, into = split(q, k, v), split(*grads)
    inputs = [x.transpose(1, 2) for x in (*qkv, out, dout)]
    dq, dk, dv = (x.transpose(1, 2) for x in into)
    _flash_attn_bwd(*inputs, lse, causal=True, dq=dq, dk=dk, dv=dv)
    return grads


def _fake(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor]:
    q_BNTH, _, _ = split(q, k, v)
    return room(q_BNTH, q_BNTH.dtype), q_BNTH.new_empty(q_BNTH.shape[:3], dtype=torch.float32)


class _Gradient(torch.autograd.Function):
    """The operator with its gradient; a second derivative is refused."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("fa4")
        grads = backward(dout, *ctx.saved_tensors)
        return (*grads, *[None] * (3 - len(grads)))


LIBRARY.impl("fa4", _forward, "CUDA")
LIBRARY.impl("fa4", _Gradient.apply, "Autograd")
LIBRARY.impl("fa4_backward", _backward, "CUDA")
torch.library.register_fake("flashgpt::fa4", _fake, lib=LIBRARY)
torch.library.register_fake(
    "flashgpt::fa4_backward",
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
    """FlashAttention-4 of q_BNTH, k_BNSH, v_BNSH, or of a packed qkv_BT3NH alone: out_BNTH in q's
    dtype, lse_BNT in fp32 (no gradient)."""
    assert dropout is None and documents_BS is None, "refused before"
    out_BNTH, lse_BNT = forward(q, k_BNSH, v_BNSH)
    return out_BNTH, lse_BNT
