"""Multi-head attention as a module: projections, heads, and the switch `use_flash`.

Legend: B batch, T query positions, S key positions, N heads, H head dim, D model width.
"""

from __future__ import annotations

import functools
from types import EllipsisType
from typing import Protocol

from torch import Tensor, nn

from flashgpt.attention import kernels
from flashgpt.attention.attend import attend, attend_packed
from flashgpt.attention.dropout import Dropout, fresh
from flashgpt.attention.packed import split
from flashgpt.attention.standard import NAME as STANDARD
from flashgpt.attention.standard import causal_mask


class LayerCache(Protocol):
    """Keys and values of the tokens before, for one layer."""

    def extend(self, k_BNTH: Tensor, v_BNTH: Tensor) -> tuple[Tensor, Tensor]:
        """Adds new keys and values, returns all of them so far: k_BNSH, v_BNSH."""


class MultiHeadAttention(nn.Module):
    """Causal multi-head self-attention, x_BTD -> out_BTD.

    The weights are the same for both settings of the switch. With `use_flash=False` the module
    holds a causal-mask buffer, which is never part of the state dict.

    Args:
        d_in: features that come in.
        d_out: features that go out, all heads together.
        context_length: longest sequence (tokens).
        dropout: probability that an attention weight is dropped while training.
        num_heads: attention heads; divides d_out.
        qkv_bias: bias on the query, key and value projection.
        use_flash: True for fused flash attention, False for standard attention.

    Raises:
        ValueError: d_out is not divisible by num_heads, or dropout is outside [0, 1).
    """

    mask: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        dropout: float,
        num_heads: int,
        qkv_bias: bool = False,
        use_flash: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {num_heads}")
        if d_out % num_heads:
            raise ValueError(
                f"d_out must be divisible by num_heads, got d_out {d_out} and num_heads {num_heads}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.num_heads = num_heads
        self.head_dim = d_out // num_heads
        self.context_length = context_length
        self.dropout = dropout
        self.c_attn = nn.Linear(d_in, 3 * d_out, bias=qkv_bias)
        self.c_proj = nn.Linear(d_out, d_out)
        self.use_flash = True
        self.kernel: str | None = None
        self.deterministic = False
        self.own_masks = False
        self.set_attention(use_flash=use_flash)

    def set_attention(
        self,
        *,
        use_flash: bool | None = None,
        kernel: str | EllipsisType | None = ...,
        deterministic: bool | None = None,
        own_masks: bool | None = None,
    ) -> None:
        """Moves the switch; what is left out stays as it is.

        Args:
            use_flash: True for fused flash attention, False for standard.
            kernel: pins one kernel by name; None lets `choose` decide.
            deterministic: only kernels whose backward repeats bit for bit.
            own_masks: each kernel drops by a generator of its own instead of the shared masks.

        Raises:
            ValueError: `kernel` names no kernel, or not the standard one with use_flash=False.
        """
        name = self.kernel if isinstance(kernel, EllipsisType) else kernel
        kernels.check_name(name)
        if not (self.use_flash if use_flash is None else use_flash) and name not in (
            None,
            STANDARD,
        ):
            raise ValueError(f"kernel must be {STANDARD!r} with use_flash=False, got {name!r}")
        self.kernel = name
        if deterministic is not None:
            self.deterministic = deterministic
        if own_masks is not None:
            self.own_masks = own_masks
        if use_flash is None or use_flash == self.use_flash:
            return
        self.use_flash = use_flash
        if use_flash:
            del self.mask
        else:
            mask_TS = causal_mask(
                self.context_length, self.context_length, self.c_attn.weight.device
            )
            self.register_buffer("mask", mask_TS, persistent=False)

    def forward(
        self,
        x_BTD: Tensor,
        dropout: Dropout | None = None,
        documents_BT: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attention over x_BTD and, with a cache, over the tokens before.

        Args:
            dropout: which mask to draw, with its own probability, in training mode and where the
                module's dropout is above 0; a fresh seed when left out.
            documents_BT: integer document of each token, those in the cache first; tokens see
                their own document only.
            cache: keys and values of the tokens before; is extended.

        Raises:
            ValueError: more tokens than `context_length`.
        """
        batch, queries, _ = x_BTD.shape
        qkv_BTD = self.c_attn(x_BTD)
        qkv_BT3NH = qkv_BTD.view(batch, queries, 3, self.num_heads, self.head_dim)
        keys, attention = queries, functools.partial(attend_packed, qkv_BT3NH)
        if cache is not None:
            q_BNTH, k_BNTH, v_BNTH = split(qkv_BT3NH)
            k_BNSH, v_BNSH = cache.extend(k_BNTH, v_BNTH)
            keys, attention = k_BNSH.shape[2], functools.partial(attend, q_BNTH, k_BNSH, v_BNSH)
        if keys > self.context_length:
            raise ValueError(
                f"sequence must be at most context_length {self.context_length} tokens, got {keys}"
            )
        draw = None
        if self.training and self.dropout > 0:
            draw = fresh(self.dropout, x_BTD) if dropout is None else dropout
            draw = draw.with_own_masks() if self.own_masks else draw
        out_BNTH = attention(
            use_flash=self.use_flash,
            dropout=draw,
            documents_BT=documents_BT,
            kernel=self.kernel,
            deterministic=self.deterministic,
            mask_TS=None if self.use_flash else self.mask[keys - queries : keys, :keys],
        )
        out: Tensor = self.c_proj(out_BNTH.transpose(1, 2).flatten(2))
        return out

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, dropout={self.dropout}, use_flash={self.use_flash}"
