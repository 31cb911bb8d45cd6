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

Legend: B batch, T query positions, S key positions, N heads, H head dim; G = B * N, g a part of G,
t and s tiles of T and S.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flashgpt.attention.dropout import (
    Dropout,
    attention_column_keys,
    attention_row_keys,
    dropped,
)
from flashgpt.attention.request import Request

NAME = "blocked"
QUERY_TILE = 128  # rows of a tile
KEY_TILE = 512  # columns of a tile
TILE_SCORES = 2**18  # scores in flight at once: 1 MiB in fp32, about what a core's cache holds


def supports(request: Request) -> str | None:
    """None: any device, any dtype, any shape."""
    return None


@dataclasses.dataclass
class _Masks:
    """Which scores of a tile are out of reach, and which weights are dropped."""

    offset: int  # absolute position of the first query, S - T
    documents_GS: Tensor | None
    a_GT: Tensor | None
    b_GT: Tensor | None
    c_S: Tensor | None
    threshold: int

    def hide(self, scores: Tensor, g: slice, t: slice, s: slice) -> Tensor:
        """Fills invisible scores of a tile with -inf, in place."""
        first_query = self.offset + t.start
        if s.stop - 1 > first_query:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
            scores.masked_fill_(hidden.triu(first_query - s.start + 1), float("-inf"))
        if self.documents_GS is not None:
            queries = slice(first_query, self.offset + t.stop)
            own = self.documents_GS[g, queries, None]
            scores.masked_fill_(own != self.documents_GS[g, None, s], float("-inf"))
        return scores

    def drop(self, values: Tensor, g: slice, t: slice, s: slice) -> Tensor:
        """Zeroes dropped weights of a tile, in place."""
        if self.a_GT is None or self.b_GT is None or self.c_S is None:
            return values
        a, b = self.a_GT[g, t, None], self.b_GT[g, t, None]
        return values.masked_fill_(dropped(a, b, self.c_S[s], self.threshold), 0)


def _masks(
    q_BNTH: Tensor,
    keys: int,
    seed: Tensor | None,
    first_row: Tensor | None,
    layer: int,
    p: float,
    documents_BS: Tensor | None,
) -> tuple[_Masks, float]:
    """The masks of one call and the scale of kept weights."""
    batch, heads, queries, _ = q_BNTH.shape
    documents = None
    if documents_BS is not None:
        documents = documents_BS.repeat_interleave(heads, dim=0)
    masks = _Masks(keys - queries, documents, None, None, None, 0)
    if seed is None or first_row is None:
        return masks, 1.0
    dropout = Dropout(p, seed, first_row, layer)
    a, b = attention_row_keys(dropout, batch, heads, keys - queries, queries)
    masks.a_GT, masks.b_GT = a.flatten(0, 1), b.flatten(0, 1)
    masks.c_S, masks.threshold = attention_column_keys(dropout, keys), dropout.threshold
    return masks, dropout.scale


def _work(*tensors: Tensor) -> list[Tensor]:
    """Tensors [B, N, ., H] as contiguous [G, ., H] in the dtype of the computation."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [x.to(dtype).reshape(-1, *x.shape[2:]).contiguous() for x in tensors]


def _tiles(groups: int, queries: int, keys: int) -> Iterator[tuple[slice, slice, list[slice]]]:
    """(part of G, query tile, visible key tiles), none of them empty."""
    rows, columns = min(QUERY_TILE, queries), min(KEY_TILE, keys)
    step = max(1, TILE_SCORES // (rows * columns))
    for g in range(0, groups, step):
        for t in range(0, queries, rows):
            t_stop = min(t + rows, queries)
            seen = keys - queries + t_stop
            tiles = [slice(s, min(s + columns, seen)) for s in range(0, seen, columns)]
            yield slice(g, min(g + step, groups)), slice(t, t_stop), tiles


@torch.library.custom_op("flashgpt::blocked", mutates_args=())
def _forward(
    q_BNTH: Tensor,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    seed: Tensor | None,
    first_row: Tensor | None,
    layer: int,
    p: float,
    documents_BS: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out in q's dtype, lse, and out as computed (empty if that is q's dtype): backward subtracts
    two dot products that must cancel, and a rounded out would not let them."""
    keys = k_BNSH.shape[2]
    masks, scale = _masks(q_BNTH, keys, seed, first_row, layer, p, documents_BS)
    with torch.autocast(q_BNTH.device.type, enabled=False):
        q_GTH, k_GSH, v_GSH = _work(q_BNTH, k_BNSH, v_BNSH)
        q_GTH = q_GTH * q_GTH.shape[-1] ** -0.5
        out_GTH, lse_GT = torch.empty_like(q_GTH), q_GTH.new_empty(q_GTH.shape[:2])
        for g, t, tiles in _tiles(q_GTH.shape[0], q_GTH.shape[1], keys):
            q_gtH = q_GTH[g, t]
            m_gt1 = q_gtH.new_full((*q_gtH.shape[:2], 1), float("-inf"))
            l_gt1, acc_gtH = torch.zeros_like(m_gt1), torch.zeros_like(q_gtH)
            for s in tiles:
                p_gts = masks.hide(torch.bmm(q_gtH, k_GSH[g, s].mT), g, t, s)
                m_new = torch.maximum(m_gt1, p_gts.amax(-1, keepdim=True))
                # A row may see no key of its first tiles (documents): -inf - -inf is NaN.
                finite = m_new.masked_fill(m_new == float("-inf"), 0)
                p_gts.sub_(finite).exp_()
                alpha = (m_gt1 - finite).exp_()
                m_gt1 = m_new
                l_gt1.mul_(alpha).add_(p_gts.sum(-1, keepdim=True))
                acc_gtH.mul_(alpha).baddbmm_(masks.drop(p_gts, g, t, s), v_GSH[g, s])
            out_GTH[g, t] = acc_gtH * (scale / l_gt1)
            lse_GT[g, t] = (m_gt1 + l_gt1.log()).squeeze(-1)
    wide_BNTH = out_GTH.view(q_BNTH.shape)
    lse_BNT = lse_GT.view(q_BNTH.shape[:3])
    if wide_BNTH.dtype == q_BNTH.dtype:
        return wide_BNTH, lse_BNT, wide_BNTH.new_empty(0)
    return wide_BNTH.to(q_BNTH.dtype), lse_BNT, wide_BNTH


@torch.library.custom_op("flashgpt::blocked_backward", mutates_args=())
def _backward(
    dout_BNTH: Tensor,
    q_BNTH: Tensor,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    out_BNTH: Tensor,
    lse_BNT: Tensor,
    seed: Tensor | None,
    first_row: Tensor | None,
    layer: int,
    p: float,
    documents_BS: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    keys = k_BNSH.shape[2]
    masks, scale = _masks(q_BNTH, keys, seed, first_row, layer, p, documents_BS)
    with torch.autocast(q_BNTH.device.type, enabled=False):
        q_GTH, k_GSH, v_GSH, dout_GTH, out_GTH = _work(q_BNTH, k_BNSH, v_BNSH, dout_BNTH, out_BNTH)
        softmax_scale = q_GTH.shape[-1] ** -0.5
        delta_GT1 = (dout_GTH * out_GTH).sum(-1, keepdim=True)
        lse_GT1 = lse_BNT.reshape(*q_GTH.shape[:2], 1)
        q_GTH, dout_GTH = q_GTH * softmax_scale, dout_GTH * scale
        dq_GTH, dk_GSH, dv_GSH = (torch.zeros_like(x) for x in (q_GTH, k_GSH, v_GSH))
        for g, t, tiles in _tiles(q_GTH.shape[0], q_GTH.shape[1], keys):
            q_gtH, dout_gtH = q_GTH[g, t], dout_GTH[g, t]
            for s in tiles:
                k_gsH, v_gsH = k_GSH[g, s], v_GSH[g, s]
                p_gts = masks.hide(torch.bmm(q_gtH, k_gsH.mT), g, t, s)
                p_gts.sub_(lse_GT1[g, t]).exp_()
                ds_gts = masks.drop(torch.bmm(dout_gtH, v_gsH.mT), g, t, s)
                ds_gts.sub_(delta_GT1[g, t]).mul_(p_gts)
                dv_GSH[g, s].baddbmm_(masks.drop(p_gts, g, t, s).mT, dout_gtH)
                dk_GSH[g, s].baddbmm_(ds_gts.mT, q_gtH)
                dq_GTH[g, t].baddbmm_(ds_gts, k_gsH, alpha=softmax_scale)
    return tuple(  # type: ignore[return-value]
        x.view(like.shape).to(like.dtype)
        for x, like in ((dq_GTH, q_BNTH), (dk_GSH, k_BNSH), (dv_GSH, v_BNSH))
    )


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    wide = q.new_empty(0 if dtype == q.dtype else q.shape, dtype=dtype)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:3], dtype=dtype), wide


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, seed, first_row, layer, p, documents = inputs
    out, lse, wide = output
    out = wide if wide.numel() else out
    ctx.save_for_backward(q, k, v, out, lse, seed, first_row, documents)
    ctx.layer, ctx.p = layer, p


def _autograd(ctx: Any, dout: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, seed, first_row, documents = ctx.saved_tensors
    dq, dk, dv = _backward(dout, q, k, v, out, lse, seed, first_row, ctx.layer, ctx.p, documents)
    return dq, dk, dv, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup)


def attention(
    q_BNTH: Tensor,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    *,
    dropout: Dropout | None,
    documents_BS: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Blocked attention: out_BNTH in q's dtype, lse_BNT in fp32 at least (no gradient)."""
    seed, first_row, layer, p = None, None, 0, 0.0
    if dropout is not None:
        seed, first_row, layer, p = dropout.seed, dropout.first_row, dropout.layer, dropout.p
    out_BNTH, lse_BNT, _ = _forward(q_BNTH, k_BNSH, v_BNSH, seed, first_row, layer, p, documents_BS)
    return out_BNTH, lse_BNT.detach()
