"""The one door to attention: `attend`, the same contract whichever kernel serves it.

Checks the call once, names the kernel (`kernels.resolve`), runs it. Always causal, aligned
bottom-right: query t of T sees the keys s <= S - T + t. So whole sequences, chunks of a prefill and
single-token decoding are one rule.

Legend: B batch, T query positions, S key positions, N heads, H head dim.
"""

from __future__ import annotations

import contextlib
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
    tensors = (q_BNTH, k_BNSH, v_BNSH)
    out_BNTH, lse, weights = _serve(
        tensors, dropout, documents_BT, kernel, deterministic, mask_TS, return_lse
    )
    if not (return_weights or return_lse):
        return out_BNTH
    if lse is not None and lse.shape != q_BNTH.shape[:3]:
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
    if qkv_BT3NH.dim() != 5 or qkv_BT3NH.shape[2] != 3 or not min(qkv_BT3NH.shape[1:]):
        raise ValueError(
            f"qkv must be [B, T, 3, N, H], none but B empty, got {list(qkv_BT3NH.shape)}"
        )
    if qkv_BT3NH.dtype not in DTYPES:
        raise ValueError(f"qkv must be fp16, bf16, fp32 or fp64, got {qkv_BT3NH.dtype}")
    batch, length = qkv_BT3NH.shape[:2]
    _check_masks(batch, length, length, qkv_BT3NH, documents_BT, mask_TS)
    if not use_flash:
        kernel = _standard(kernel, "use_flash=False")
    return _serve((qkv_BT3NH,), dropout, documents_BT, kernel, deterministic, mask_TS, False)[0]


def _standard(kernel: str | None, asker: str) -> str:
    """The only kernel that serves `asker`."""
    if kernel not in (None, standard.NAME):
        raise ValueError(f"kernel must be 'standard' with {asker}, got {kernel!r}")
    return standard.NAME


def _serve(
    tensors: tuple[Tensor, ...],
    dropout: Dropout | None,
    documents_BT: Tensor | None,
    kernel: str | None,
    deterministic: bool,
    mask_TS: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out, lse and, from standard attention, weights, of q, k and v or of a packed tensor."""
    if mask_TS is not None and kernel != standard.NAME:
        raise ValueError("mask_TS is for standard attention only; leave it out, or use_flash=False")
    if dropout is not None and not dropout.threshold:
        dropout = None
    like = tensors[0]
    packed = len(tensors) == 1
    queries = like.shape[1] if packed else like.shape[2]
    keys = queries if packed else tensors[1].shape[2]
    name = kernels.resolve(
        like.device.type,
        like.dtype,
        like.shape[-1],
        bucket(queries),
        shape_of(queries, keys),
        dropout is not None,
        documents_BT is not None,
        torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
        deterministic,
        dropout is not None and dropout.own_masks,
        kernel,
    )
    served = kernels.KERNELS[name]
    if packed and not served.packed:
        tensors = split(like)
    if name == standard.NAME:
        with _no_autocast(like):
            return standard.attention(
                *tensors,
                dropout=dropout,
                documents_BS=documents_BT,
                mask_TS=mask_TS,
                need_lse=need_lse,
            )
    out_BNTH, lse = served.attention(*tensors, dropout=dropout, documents_BS=documents_BT)
    return out_BNTH, lse, None


def _no_autocast(like: Tensor) -> contextlib.AbstractContextManager[object]:
    """While entered, autocast does not change the dtype of what is computed from `like`.

    Nothing where it would not anyway: torch keeps no compiled code with such a switch in it.
    """
    kind = like.device.type
    if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) == like.dtype:
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def _check(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, mask: Tensor | None) -> None:
    sizes, key_sizes = q.shape, k.shape  # each look makes a new object
    if len(sizes) != 4 or len(key_sizes) != 4:
        raise ValueError(f"q, k, v must be [B, N, T, H], got {list(sizes)} and {list(key_sizes)}")
    if key_sizes != v.shape:
        raise ValueError(f"v must have k's shape {list(key_sizes)}, got {list(v.shape)}")
    (batch, heads, queries, head_dim), keys = sizes, key_sizes[2]
    if key_sizes != (batch, heads, keys, head_dim):
        raise ValueError(f"k must have q's B, N and H {list(sizes)}, got {list(key_sizes)}")
    if not 1 <= queries <= keys:
        raise ValueError(
            f"T must be in 1 .. S, so that no query is left without a key, "
            f"got T {queries} and S {keys}"
        )
    if not (heads and head_dim):
        raise ValueError(f"q, k, v must have heads and features, got {list(sizes)}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(
            f"q, k, v must share one dtype of fp16, bf16, fp32, fp64, "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must share a device, got {q.device}, {k.device}, {v.device}")
    if documents is not None or mask is not None:
        _check_masks(batch, queries, keys, q, documents, mask)


def _check_masks(
    batch: int,
    queries: int,
    keys: int,
    like: Tensor,
    documents: Tensor | None,
    mask: Tensor | None,
) -> None:
    if documents is not None:
        if documents.shape != (batch, keys):
            raise ValueError(
                f"documents must be [B, S] = {[batch, keys]}, got {list(documents.shape)}"
            )
        if documents.dtype not in INTEGERS:
            raise ValueError(f"documents must be integers, got {documents.dtype}")
        if documents.device != like.device:
            raise ValueError(f"documents must be on {like.device} as q is, got {documents.device}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (queries, keys)):
        raise ValueError(
            f"mask must be bool [T, S] = {[queries, keys]}, got {mask.dtype} {list(mask.shape)}"
        )
