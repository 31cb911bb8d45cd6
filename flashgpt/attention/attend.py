"""The one door to attention: `attend`, the same contract whichever kernel serves it.

Checks the call once, names the kernel (`kernels.resolve`), runs it. Always causal, aligned
bottom-right: query t of T sees the keys s <= S - T + t. So whole sequences, chunks of a prefill and
single-token decoding are one rule.

Legend: B batch, T query positions, S key positions, N heads, H head dim.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from flashgpt.attention import kernels, standard
from flashgpt.attention.dropout import Dropout
from flashgpt.attention.packed import split
from flashgpt.attention.request import bucket, shape_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Attended(NamedTuple):
    """What `attend` returns when more than the output is asked for."""

    out_BNTH: Tensor
    weights_BNTS: Tensor | None
    lse_BNT: Tensor | None


@overload
def attend(
    q_BNTH: Tensor,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    *,
    use_flash: bool = ...,
    dropout: Dropout | None = ...,
    documents_BT: Tensor | None = ...,
    kernel: str | None = ...,
    deterministic: bool = ...,
    return_weights: Literal[False] = ...,
    return_lse: Literal[False] = ...,
    mask_TS: Tensor | None = ...,
) -> Tensor: ...
@overload
def attend(
    q_BNTH: Tensor,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    *,
    use_flash: bool = ...,
    dropout: Dropout | None = ...,
    documents_BT: Tensor | None = ...,
    kernel: str | None = ...,
    deterministic: bool = ...,
    return_weights: bool = ...,
    return_lse: bool = ...,
    mask_TS: Tensor | None = ...,
) -> Tensor | Attended: ...
def attend(
    q_BNTH: Tensor,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    *,
    use_flash: bool = True,
    dropout: Dropout | None = None,
    documents_BT: Tensor | None = None,
    kernel: str | None = None,
    deterministic: bool = False,
    return_weights: bool = False,
    return_lse: bool = False,
    mask_TS: Tensor | None = None,
) -> Tensor | Attended:
    """Causal attention: softmax(q k^T / sqrt(H)) v, by the fastest kernel or by standard attention.

    Args:
        q_BNTH, k_BNSH, v_BNSH: queries, keys, values, T <= S; any strides, same dtype and device.
        use_flash: False means standard attention.
        dropout: drops attention weights; the caller passes it in training only.
        documents_BT: integer document of each key, [B, S]; a query sees its own document only.
        kernel: pins a kernel by name, also in cases known to be bad (kernels.KNOWN_BAD).
        deterministic: only kernels whose backward repeats bit for bit.
        return_weights: also the weights after dropout [B, N, T, S] (standard attention serves it).
        return_lse: also the log-sum-exp of the visible scores [B, N, T], fp32 at least, detached.
        mask_TS: ready causal mask (bool, True = visible) that standard attention uses.

    Returns:
        out_BNTH in q's dtype; `Attended` when weights or lse are asked for.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, T > S, `use_flash=False` or
            `return_weights` with another kernel named, `mask_TS` without standard attention, or a
            pinned kernel that cannot serve the call.
    """
    _check(q_BNTH, k_BNSH, v_BNSH, documents_BT, mask_TS)
    if return_weights or not use_flash:
        kernel = _standard(kernel, "return_weights=True" if use_flash else "use_flash=False")
    parts = (q_BNTH, k_BNSH, v_BNSH)
    out_BNTH, lse, weights = _serve(
        parts, parts, dropout, documents_BT, kernel, deterministic, mask_TS
    )
    if not (return_weights or return_lse):
        return out_BNTH
    if lse.shape != q_BNTH.shape[:3]:
        lse = lse.reshape(*q_BNTH.shape[:2], -1)[..., : q_BNTH.shape[2]]
    return Attended(out_BNTH, weights if return_weights else None, lse if return_lse else None)


def attend_packed(
    qkv_BT3NH: Tensor,
    *,
    use_flash: bool = True,
    dropout: Dropout | None = None,
    documents_BT: Tensor | None = None,
    kernel: str | None = None,
    deterministic: bool = False,
    mask_TS: Tensor | None = None,
) -> Tensor:
    """`attend` on the packed projection of a whole sequence (T == S): out_BNTH.

    The same numbers; a kernel that takes the packed tensor (triton, fa4) gives its gradient packed,
    where three gradients would have to be put together by a copy. Args and Raises: those of
    `attend`.
    """
    if qkv_BT3NH.dim() != 5 or qkv_BT3NH.shape[2] != 3:
        raise ValueError(f"qkv must be [B, T, 3, N, H], got {list(qkv_BT3NH.shape)}")
    parts = split(qkv_BT3NH)
    _check(*parts, documents_BT, mask_TS)
    if not use_flash:
        kernel = _standard(kernel, "use_flash=False")
    packed = (qkv_BT3NH,)
    return _serve(parts, packed, dropout, documents_BT, kernel, deterministic, mask_TS)[0]


def _standard(kernel: str | None, asker: str) -> str:
    """The only kernel that serves `asker`."""
    if kernel not in (None, standard.NAME):
        raise ValueError(f"kernel must be 'standard' with {asker}, got {kernel!r}")
    return standard.NAME


def _serve(
    parts: tuple[Tensor, Tensor, Tensor],
    packed: tuple[Tensor, ...],
    dropout: Dropout | None,
    documents_BT: Tensor | None,
    kernel: str | None,
    deterministic: bool,
    mask_TS: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """out, lse and, from standard attention, weights; `packed` goes to kernels that take it."""
    if mask_TS is not None and kernel != standard.NAME:
        raise ValueError("mask_TS is for standard attention only; leave it out, or use_flash=False")
    if dropout is not None and not dropout.threshold:
        dropout = None
    q_BNTH, k_BNSH, v_BNSH = parts
    queries, keys = q_BNTH.shape[2], k_BNSH.shape[2]
    name = kernels.resolve(
        q_BNTH.device.type,
        q_BNTH.dtype,
        q_BNTH.shape[3],
        bucket(queries),
        shape_of(queries, keys),
        dropout is not None,
        documents_BT is not None,
        torch.is_grad_enabled()
        and (q_BNTH.requires_grad or k_BNSH.requires_grad or v_BNSH.requires_grad),
        deterministic,
        dropout is not None and dropout.own_masks,
        kernel,
    )
    if name == standard.NAME:
        with torch.autocast(q_BNTH.device.type, enabled=False):  # out in q's dtype, as elsewhere
            return standard.attention(
                *parts, dropout=dropout, documents_BS=documents_BT, mask_TS=mask_TS
            )
    served = kernels.KERNELS[name]
    tensors = packed if served.packed else parts
    out_BNTH, lse = served.attention(*tensors, dropout=dropout, documents_BS=documents_BT)
    return out_BNTH, lse, None


def _check(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, mask: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q, k, v must be [B, N, T, H], got {list(q.shape)} and {list(k.shape)}")
    if k.shape != v.shape:
        raise ValueError(f"v must have k's shape {list(k.shape)}, got {list(v.shape)}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k must have q's B, N and H {list(q.shape)}, got {list(k.shape)}")
    if not 1 <= q.shape[2] <= k.shape[2]:
        raise ValueError(
            f"T must be in 1 .. S, so that no query is left without a key, "
            f"got T {q.shape[2]} and S {k.shape[2]}"
        )
    if not (q.shape[1] and q.shape[3]):
        raise ValueError(f"q, k, v must have heads and features, got {list(q.shape)}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(
            f"q, k, v must share one dtype of fp16, bf16, fp32, fp64, "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must share a device, got {q.device}, {k.device}, {v.device}")
    if documents is not None:
        if documents.shape != (k.shape[0], k.shape[2]):
            raise ValueError(
                f"documents must be [B, S] = {[k.shape[0], k.shape[2]]}, "
                f"got {list(documents.shape)}"
            )
        if documents.dtype not in INTEGERS:
            raise ValueError(f"documents must be integers, got {documents.dtype}")
        if documents.device != q.device:
            raise ValueError(f"documents must be on {q.device} as q is, got {documents.device}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (q.shape[2], k.shape[2])):
        raise ValueError(
            f"mask must be bool [T, S] = {[q.shape[2], k.shape[2]]}, "
            f"got {mask.dtype} {list(mask.shape)}"
        )
