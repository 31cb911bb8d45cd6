"""Standard attention: the definition that every other kernel is judged against, and readable.

    scores = q k^T / sqrt(H);  weights = softmax(scores where key s is visible);  out = weights v

Query t of T sees the keys s <= S - T + t. The softmax is computed in fp32 at least. Keeps [T, S]
scores for the backward pass: memory is quadratic in T.

Legend: B batch, T query positions, S key positions, N heads, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashgpt.attention.dropout import Dropout, attention_keep
from flashgpt.attention.request import Request

NAME = "standard"


def supports(request: Request) -> str | None:
    """None: any device, any dtype, any option."""
    return None


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """visible_TS (bool): True where the query may see the key; aligned bottom-right."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def attention(
    q_BNTH: Tensor,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    *,
    dropout: Dropout | None,
    documents_BS: Tensor | None,
    mask_TS: Tensor | None = None,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Standard attention.

    Returns:
        out_BNTH in q's dtype, lse_BNT (log-sum-exp of the visible scores, fp32 at least; None
        without `need_lse`) and weights_BNTS in q's dtype, after dropout.
    """
    batch, heads, queries, head_dim = q_BNTH.shape
    keys = k_BNSH.shape[-2]
    if mask_TS is None:
        mask_TS = causal_mask(queries, keys, q_BNTH.device)
    visible = mask_TS
    if documents_BS is not None:
        same_BTS = documents_BS[:, keys - queries :, None] == documents_BS[:, None, :]
        visible = mask_TS & same_BTS[:, None]
    scores_BNTS = (q_BNTH * head_dim**-0.5) @ k_BNSH.transpose(-2, -1)
    scores_BNTS = scores_BNTS.masked_fill(~visible, float("-inf"))
    wide = torch.promote_types(scores_BNTS.dtype, torch.float32)
    weights_BNTS = torch.softmax(scores_BNTS, dim=-1, dtype=wide)
    lse_BNT = torch.logsumexp(scores_BNTS.detach().to(wide), dim=-1) if need_lse else None
    if dropout is not None and dropout.own_masks:
        weights_BNTS = torch.nn.functional.dropout(weights_BNTS, dropout.p)
    elif dropout is not None:
        keep_BNTS = attention_keep(dropout, batch, heads, queries, keys)
        weights_BNTS = torch.where(keep_BNTS, weights_BNTS * dropout.scale, 0)
    weights_BNTS = weights_BNTS.to(v_BNSH.dtype)
    return weights_BNTS @ v_BNSH, lse_BNT, weights_BNTS
