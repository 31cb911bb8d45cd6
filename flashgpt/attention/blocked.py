"""Blocked attention: the flash algorithm in plain PyTorch, for what PyTorch's fused kernels cannot.

Serves any device and dtype, the shared dropout, documents and any T <= S. Scores exist one tile at
a time: the forward pass keeps a running maximum m and sum l per row (online softmax; Dao et al.,
"FlashAttention", NeurIPS 2022), the backward pass computes each tile again from the log-sum-exp,
and tiles above the causal diagonal are never touched. Memory is linear in T.

With s = q k^T / sqrt(H), p = exp(s - lse), z the dropout mask over its keep probability (1 without
dropout), and g = dout:

    out = (p z) v         dv = (p z)^T g       delta = rowsum(g * out)
    ds = p (z (g v^T) - delta)                 dq = ds k / sqrt(H)      dk = ds^T q / sqrt(H)

Both passes are one opaque operator each, so a compiler keeps them as they are. Half-precision
inputs are computed in fp32 here.

Legend: B batch, T query positions, S key positions, N heads, H head dim; b and n slices of B and N,
g the b * n sequences of a part, t and s tiles of T and S.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flashgpt.attention import tiles
from flashgpt.attention.dropout import Dropout, attention_keys, keep_scale
from flashgpt.attention.packed import room
from flashgpt.attention.request import Request


def supports(request: Request) -> str | None:
    """None, whatever the device, dtype and shape, except for masks that are not the shared ones."""
    return "drops by the shared masks only" if request.own_masks else None


def _load(x: Tensor, b: slice, n: slice, scale: float = 1.0) -> Tensor:
    """A part of [B, N, ., H] times `scale`: contiguous [g, ., H], in the computation's dtype."""
    part = x[b, n].to(torch.promote_types(x.dtype, torch.float32))
    room = torch.empty_like(part, memory_format=torch.contiguous_format)
    return torch.mul(part, scale, out=room).flatten(0, 1)


def _store(whole: Tensor, part: Tensor, factor: Tensor | float = 1.0) -> None:
    """Writes a part [g, ., H] times `factor` into its place [b, n, ., H]."""
    part = part.view(whole.shape)
    if isinstance(factor, Tensor):
        factor = factor.view(*whole.shape[:3], 1)
    if whole.dtype == part.dtype:
        torch.mul(part, factor, out=whole)
    else:
        whole.copy_(part.mul_(factor))


def _masks(
    queries: int,
    heads: int,
    keys: int,
    a_BNT: Tensor | None,
    b_BNT: Tensor | None,
    c_S: Tensor | None,
    threshold: int,
    documents_BS: Tensor | None,
) -> tiles.Masks:
    """The masks of a call."""
    document = None
    if documents_BS is not None:
        document = tiles.document_starts(documents_BS).repeat_interleave(heads, dim=0)
    a, b = (None if x is None else x.flatten(0, 1) for x in (a_BNT, b_BNT))
    return tiles.Masks(keys - queries, document, a, b, c_S, threshold)


@torch.library.custom_op("flashgpt::blocked", mutates_args=())
def forward(
    q_BNTH: Tensor,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    a_BNT: Tensor | None,
    b_BNT: Tensor | None,
    c_S: Tensor | None,
    threshold: int,
    documents_BS: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out in q's dtype, lse, and out as computed (empty if that is q's dtype): backward subtracts
    two dot products that must cancel, and a rounded out would not let them."""
    (batch, heads, queries, head_dim), keys = q_BNTH.shape, k_BNSH.shape[2]
    cut = tiles.cut(batch * heads, queries, keys, q_BNTH.device)
    masks = _masks(queries, heads, keys, a_BNT, b_BNT, c_S, threshold, documents_BS)
    scale = keep_scale(threshold)
    dtype = torch.promote_types(q_BNTH.dtype, torch.float32)
    out_BNTH, lse_BNT = room(q_BNTH, dtype), q_BNTH.new_empty(q_BNTH.shape[:3], dtype=dtype)
    with torch.autocast(q_BNTH.device.type, enabled=False):
        for b, n, g in cut.parts(batch, heads):
            q_gTH = _load(q_BNTH, b, n, head_dim**-0.5)
            k_gSH, v_gSH, masks_g = _load(k_BNSH, b, n), _load(v_BNSH, b, n), masks.part(g)
            for t, columns in masks_g.tiles(queries, cut):
                acc_gtH, l_gt1, m_gt1 = _softmax(q_gTH[:, t], k_gSH, v_gSH, masks_g, t, columns)
                _store(out_BNTH[b, n, t], acc_gtH, scale / l_gt1)
                lse_BNT[b, n, t] = l_gt1.log_().add_(m_gt1).view(lse_BNT[b, n, t].shape)
    if dtype == q_BNTH.dtype:
        return out_BNTH, lse_BNT, out_BNTH.new_empty(0)
    return out_BNTH.to(q_BNTH.dtype), lse_BNT, out_BNTH


def _softmax(
    q_gtH: Tensor,
    k_gSH: Tensor,
    v_gSH: Tensor,
    masks: tiles.Masks,
    t: slice,
    columns: list[slice],
) -> tuple[Tensor, Tensor, Tensor]:
    """Online softmax of one query tile: sum of p v, sum of p, maximum m; p = exp(score - m)."""
    acc_gtH = l_gt1 = m_gt1 = None
    for s in columns:
        tile = tiles.Tile(masks, t, s)
        p_gts = torch.bmm(q_gtH, k_gSH[:, s].mT)
        tile.hide(p_gts)
        m_new = p_gts.amax(-1, keepdim=True)
        if m_gt1 is not None:
            torch.maximum(m_new, m_gt1, out=m_new)
        # A row may see no key of its first tiles (documents): -inf - -inf is NaN.
        finite = m_new.masked_fill(m_new == -torch.inf, 0)
        tile.clear(_exp(p_gts.sub_(finite)))
        sum_gt1 = p_gts.sum(-1, keepdim=True)
        tile.drop(p_gts)
        if acc_gtH is None or l_gt1 is None or m_gt1 is None:
            l_gt1, acc_gtH = sum_gt1, torch.bmm(p_gts, v_gSH[:, s])
        else:
            alpha = m_gt1.sub_(finite).exp_()
            l_gt1.mul_(alpha).add_(sum_gt1)
            acc_gtH.mul_(alpha).baddbmm_(p_gts, v_gSH[:, s])
        m_gt1 = m_new
    assert acc_gtH is not None and l_gt1 is not None and m_gt1 is not None, "each row sees a key"
    return acc_gtH, l_gt1, m_gt1


def _exp(x: Tensor) -> Tensor:
    """exp(x) in place, between the smallest positive normal number and its inverse (1e-38, 1e38).

    Beyond, each exponential takes a hundred times as long on the CPU; a weight below 1e-38 of its
    row's largest counts as that.
    """
    limit = -math.ceil(math.log(torch.finfo(x.dtype).tiny))
    return x.clamp_(-limit, limit).exp_()


@torch.library.custom_op("flashgpt::blocked_backward", mutates_args=())
def backward(
    dout_BNTH: Tensor,
    q_BNTH: Tensor,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    out_BNTH: Tensor,
    lse_BNT: Tensor,
    a_BNT: Tensor | None,
    b_BNT: Tensor | None,
    c_S: Tensor | None,
    threshold: int,
    documents_BS: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, heads, queries, head_dim), keys = q_BNTH.shape, k_BNSH.shape[2]
    cut = tiles.cut(batch * heads, queries, keys, q_BNTH.device)
    masks = _masks(queries, heads, keys, a_BNT, b_BNT, c_S, threshold, documents_BS)
    dq_BNTH, dk_BNSH, dv_BNSH = (room(x, x.dtype) for x in (q_BNTH, k_BNSH, v_BNSH))
    if documents_BS is not None:  # some keys may be seen by no query
        dk_BNSH.zero_()
        dv_BNSH.zero_()
    with torch.autocast(q_BNTH.device.type, enabled=False):
        for b, n, g in cut.parts(batch, heads):
            q_gTH = _load(q_BNTH, b, n, head_dim**-0.5)
            k_gSH, v_gSH, dout_gTH = (_load(x, b, n) for x in (k_BNSH, v_BNSH, dout_BNTH))
            product = dout_gTH.view(out_BNTH[b, n].shape) * out_BNTH[b, n]
            delta_gT1 = product.sum(-1).view(*q_gTH.shape[:2], 1)
            lse_gT1 = lse_BNT[b, n].reshape(delta_gT1.shape)
            dout_gTH.mul_(keep_scale(threshold))
            dq, dk, dv = _gradients(
                q_gTH, k_gSH, v_gSH, dout_gTH, delta_gT1, lse_gT1, masks.part(g), cut
            )
            _store_tiles(dq_BNTH[b, n], dq, head_dim**-0.5)
            _store_tiles(dk_BNSH[b, n], dk)
            _store_tiles(dv_BNSH[b, n], dv)
    return dq_BNTH, dk_BNSH, dv_BNSH


def _gradients(
    q_gTH: Tensor,
    k_gSH: Tensor,
    v_gSH: Tensor,
    dout_gTH: Tensor,
    delta_gT1: Tensor,
    lse_gT1: Tensor,
    masks: tiles.Masks,
    cut: tiles.Cut,
) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, Tensor]]:
    """dq, dk and dv of a part, as tiles by their first position."""
    dq: dict[int, Tensor] = {}
    dk: dict[int, Tensor] = {}
    dv: dict[int, Tensor] = {}
    for t, columns in masks.tiles(q_gTH.shape[1], cut):
        q_gtH, dout_gtH = q_gTH[:, t], dout_gTH[:, t]
        for s in columns:
            tile = tiles.Tile(masks, t, s)
            p_gts = torch.bmm(q_gtH, k_gSH[:, s].mT)
            tile.clear(_exp(p_gts.sub_(lse_gT1[:, t])))
            ds_gts = torch.bmm(dout_gtH, v_gSH[:, s].mT)
            tile.drop(ds_gts).sub_(delta_gT1[:, t]).mul_(p_gts)
            _add(dv, s, tile.drop(p_gts).mT, dout_gtH)
            _add(dk, s, ds_gts.mT, q_gtH)
            _add(dq, t, ds_gts, k_gSH[:, s])
    return dq, dk, dv


def _add(totals: dict[int, Tensor], rows: slice, left: Tensor, right: Tensor) -> None:
    """Adds left right to the total of these rows, starting one where there is none.

    Totals are tensors of their own, because baddbmm_ is slow on a slice of a larger one.
    """
    if rows.start in totals:
        totals[rows.start][:, : rows.stop - rows.start].baddbmm_(left, right)
    else:
        totals[rows.start] = torch.bmm(left, right)


def _store_tiles(whole: Tensor, found: dict[int, Tensor], factor: float = 1.0) -> None:
    """Writes tiles [g, t, H], times `factor`, into [b, n, ., H]."""
    for start, tile in found.items():
        _store(whole[:, :, start : start + tile.shape[1]], tile, factor)


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    wide = q.new_empty(0) if dtype == q.dtype else room(q, dtype)
    return room(q, q.dtype), q.new_empty(q.shape[:3], dtype=dtype), wide


@backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return room(q, q.dtype), room(k, k.dtype), room(v, v.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, a, b, c, threshold, documents = inputs
    out, lse, wide = output
    out = wide if wide.numel() else out
    ctx.save_for_backward(q, k, v, out, lse, a, b, c, documents)
    ctx.threshold = threshold


def _autograd(ctx: Any, dout: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, a, b, c, documents = ctx.saved_tensors
    dq, dk, dv = backward(dout, q, k, v, out, lse, a, b, c, ctx.threshold, documents)
    return dq, dk, dv, None, None, None, None, None


forward.register_autograd(_autograd, setup_context=_setup)


def attention(
    q_BNTH: Tensor,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    *,
    dropout: Dropout | None,
    documents_BS: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Blocked attention: out_BNTH in q's dtype, lse_BNT in fp32 at least (no gradient)."""
    batch, heads, queries, _ = q_BNTH.shape
    a = b = c = None
    threshold = 0
    if dropout is not None:
        a, b, c = attention_keys(dropout, batch, heads, queries, k_BNSH.shape[2])
        threshold = dropout.threshold
    out_BNTH, lse_BNT, _ = forward(q_BNTH, k_BNSH, v_BNSH, a, b, c, threshold, documents_BS)
    return out_BNTH, lse_BNT.detach()
