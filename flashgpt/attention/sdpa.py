"""PyTorch's fused kernels, each pinned: a name here means one kernel, never a fallback.

Calls the aten operator behind `torch.nn.functional.scaled_dot_product_attention` itself, so nothing
is chosen behind our back, the log-sum-exp comes out, and a compiler bakes in what was named.
PyTorch's `is_causal` is aligned top-left; that is right for T == S only, and a single query needs
no mask, so these kernels serve just those two shapes.

Legend: B batch, T query positions, S key positions, N heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashgpt.attention.dropout import Dropout
from flashgpt.attention.request import Request

aten = torch.ops.aten
HALF_TYPES = (torch.float16, torch.bfloat16)


def _common(request: Request) -> str | None:
    if request.dropout and not request.own_masks:
        return "PyTorch's kernels cannot draw the shared dropout mask"
    if request.documents:
        return "PyTorch's kernels have no document mask"
    if request.shape == "chunk":
        return "PyTorch's causal mask is aligned top-left, wrong for 1 < T < S"
    return None


def supports_cpu(request: Request) -> str | None:
    """Reason why PyTorch's CPU flash kernel cannot serve, or None."""
    if request.device != "cpu":
        return f"runs on the CPU, data is on {request.device}"
    return "has no dropout" if request.own_masks else _common(request)


def _cuda(request: Request, dtypes: tuple[torch.dtype, ...], max_head_dim: int) -> str | None:
    if request.device != "cuda":
        return f"runs on CUDA, data is on {request.device}"
    if request.dtype not in dtypes:
        return f"has no {str(request.dtype).removeprefix('torch.')}"
    if request.head_dim % 8 or request.head_dim > max_head_dim:
        return f"needs H divisible by 8 and <= {max_head_dim}, got {request.head_dim}"
    return _common(request)


def supports_flash(request: Request) -> str | None:
    """Reason why FlashAttention-2 cannot serve, or None."""
    if request.deterministic and request.gradient:
        return "its backward adds up dQ in no fixed order"
    return _cuda(request, HALF_TYPES, 256)


def supports_efficient(request: Request) -> str | None:
    """Reason why the memory-efficient kernel cannot serve, or None."""
    if request.deterministic and request.gradient:
        return "its backward adds up dQ in no fixed order"
    return _cuda(request, (*HALF_TYPES, torch.float32), 256)


def supports_cudnn(request: Request) -> str | None:
    """Reason why cuDNN cannot serve, or None."""
    if request.deterministic and request.gradient:
        return "its backward is not proven deterministic"
    if request.shape == "single":
        return "refuses a single query and key"
    if request.own_masks:
        return "drops with a probability in sixteenths"
    return _cuda(request, HALF_TYPES, 128)


def _pinned(operator: Any, *options: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """The table's form of an operator (q, k, v, *options, p, causal) -> (out, lse, ...)."""

    def attention(
        q_BNTH: Tensor,
        k_BNSH: Tensor,
        v_BNSH: Tensor,
        *,
        dropout: Dropout | None,
        documents_BS: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        assert documents_BS is None and (dropout is None or dropout.own_masks), "refused before"
        p = 0.0 if dropout is None else dropout.p
        # The operators take no notice of the last stride (the CPU one reads other memory), so the H
        # features of a row must lie side by side, as F.sdpa makes sure of.
        q, k, v = q_BNTH, k_BNSH, v_BNSH
        if not q.stride(3) == k.stride(3) == v.stride(3) == 1:
            q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        found = operator(q, k, v, *options, p, q.shape[2] > 1)
        return found[0], found[1]  # of lse some pad T, and cuDNN adds a last dimension of 1

    return attention


# out_BNTH, lse_BNT of PyTorch's CPU flash kernel, of FlashAttention-2 as built into PyTorch, of the
# memory-efficient (CUTLASS) kernel, and of cuDNN's, which never gets a mask tensor: its backward
# pass has NaN bugs there.
attention_cpu = _pinned(aten._scaled_dot_product_flash_attention_for_cpu.default)
attention_flash = _pinned(aten._scaled_dot_product_flash_attention.default)
attention_efficient = _pinned(aten._scaled_dot_product_efficient_attention.default, None, True)
attention_cudnn = _pinned(aten._scaled_dot_product_cudnn_attention.default, None, True)
