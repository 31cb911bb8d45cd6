"""One transformer block of GPT-2: attention and feed-forward, each after a LayerNorm and residual.

Legend: B batch, T query positions, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from flashgpt.attention.dropout import ATTENTION_OUTPUT, MLP_OUTPUT, Dropout, drop_elements, fresh
from flashgpt.attention.heads import LayerCache, MultiHeadAttention
from flashgpt.config import GPTConfig
from flashgpt.model import mlp

LAYER_NORM_EPS = 1e-5


class FeedForward(nn.Module):
    """D -> 4 D -> GELU -> D, x_BTD -> out_BTD."""

    def __init__(self, emb_dim: int, activation: str) -> None:
        super().__init__()
        self.c_fc = nn.Linear(emb_dim, 4 * emb_dim)
        self.gelu = nn.GELU(approximate="tanh" if activation == "gelu_new" else "none")
        self.c_proj = nn.Linear(4 * emb_dim, emb_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if mlp.serves(x_BTD, self.c_fc, self.gelu, self.c_proj):
            return mlp.feed_forward(x_BTD, self.c_fc, self.gelu, self.c_proj)
        out: Tensor = self.c_proj(self.gelu(self.c_fc(x_BTD)))
        return out


class TransformerBlock(nn.Module):
    """x + attention(LayerNorm(x)), then x + feed-forward(LayerNorm(x)); x_BTD -> out_BTD.

    Args:
        cfg: the cfg dict, or a GPTConfig. An absent `use_flash` means on.

    Raises:
        ValueError: a missing key or a wrong value.
    """

    def __init__(self, cfg: Mapping[str, Any] | GPTConfig) -> None:
        super().__init__()
        if not isinstance(cfg, GPTConfig):
            cfg = GPTConfig.from_dict({**cfg, "use_flash": cfg.get("use_flash", True)})
        self.ln_1 = nn.LayerNorm(cfg.emb_dim, eps=LAYER_NORM_EPS)
        self.attn = MultiHeadAttention(
            d_in=cfg.emb_dim,
            d_out=cfg.emb_dim,
            context_length=cfg.context_length,
            dropout=cfg.drop_rate,
            num_heads=cfg.n_heads,
            qkv_bias=cfg.qkv_bias,
            use_flash=cfg.use_flash,
        )
        self.ln_2 = nn.LayerNorm(cfg.emb_dim, eps=LAYER_NORM_EPS)
        self.mlp = FeedForward(cfg.emb_dim, cfg.activation)
        self.drop_rate = cfg.drop_rate

    def forward(
        self,
        x_BTD: Tensor,
        dropout: Dropout | None = None,
        documents_BT: Tensor | None = None,
        cache: LayerCache | None = None,
        start: int = 0,
    ) -> Tensor:
        """The block.

        Args:
            dropout: which masks to draw while training; a fresh seed when left out.
            documents_BT: integer document of each token; tokens see their own document only.
            cache: keys and values of the tokens before; is extended.
            start: absolute position of the first token.
        """
        draw = None
        if self.training and self.drop_rate > 0:
            draw = fresh(self.drop_rate, x_BTD) if dropout is None else dropout
        out_BTD = self.attn(self.ln_1(x_BTD), draw, documents_BT, cache)
        x_BTD = x_BTD + drop_elements(out_BTD, draw, ATTENTION_OUTPUT, start)
        out_BTD = self.mlp(self.ln_2(x_BTD))
        return x_BTD + drop_elements(out_BTD, draw, MLP_OUTPUT, start)
