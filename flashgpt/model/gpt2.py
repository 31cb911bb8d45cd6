"""GPT-2: token and position embeddings, transformer blocks, a final LayerNorm, the output head.

Owns the architecture and its initialisation. `model(ids) -> logits` and `model(ids, targets) ->
loss` are the only entries, because compilers and data-parallel wrappers hook `forward`.

Legend: B batch, T query positions, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import EllipsisType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashgpt.attention.dropout import EMBEDDING, Dropout, drop_elements, fresh
from flashgpt.attention.heads import LayerCache, MultiHeadAttention
from flashgpt.config import GPTConfig
from flashgpt.model import precision
from flashgpt.model.block import LAYER_NORM_EPS, TransformerBlock
from flashgpt.model.loss import IGNORE, linear_cross_entropy

INIT_STD = 0.02


class Cache(Protocol):
    """Keys and values of all layers, for the tokens before."""

    length: int

    def layer(self, index: int) -> LayerCache:
        """The part of one transformer block."""

    def advance(self, tokens: int) -> None:
        """Called once all layers have been extended by `tokens` positions."""


class GPTModel(nn.Module):
    """A GPT-2-class language model. Parameter names are GPT-2's own; matrices are [out, in].

    Args:
        cfg: the cfg dict (`vocab_size, context_length, emb_dim, n_heads, n_layers, drop_rate`,
            optionally `qkv_bias, use_flash, tie_weights, activation`) or a GPTConfig.

    Raises:
        ValueError: an unknown or missing key, or a wrong value.
    """

    dropout_seed: Tensor
    dropout_first_row: Tensor

    def __init__(self, cfg: Mapping[str, Any] | GPTConfig) -> None:
        super().__init__()
        self.cfg = cfg if isinstance(cfg, GPTConfig) else GPTConfig.from_dict(cfg)
        cfg = self.cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.emb_dim)
        self.wpe = nn.Embedding(cfg.context_length, cfg.emb_dim)
        self.h = nn.ModuleList(TransformerBlock(cfg) for _ in range(cfg.n_layers))
        self.ln_f = nn.LayerNorm(cfg.emb_dim, eps=LAYER_NORM_EPS)
        self.lm_head = nn.Linear(cfg.emb_dim, cfg.vocab_size, bias=False)
        self._tie()
        for name in ("dropout_seed", "dropout_first_row"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64), persistent=False)
        self._seeded = False
        self._checkpointing = False
        self._initialise()

    @classmethod
    def empty(cls, cfg: Mapping[str, Any] | GPTConfig) -> Self:
        """A model on the CPU whose weights are not initialised, for loading others into it."""
        with torch.device("meta"):
            model = cls(cfg)
        model.to_empty(device="cpu")
        model._tie()  # to_empty gives every module a tensor of its own
        model.dropout_seed.zero_()
        model.dropout_first_row.zero_()
        use_flash = model.cfg.use_flash
        model.set_attention(use_flash=True)
        model.set_attention(use_flash=use_flash)  # makes the standard path's mask anew
        return model

    def _tie(self) -> None:
        if self.cfg.tie_weights:
            self.lm_head.weight = self.wte.weight

    def _initialise(self) -> None:
        residual_std = INIT_STD / math.sqrt(2 * self.cfg.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = residual_std if name.endswith("c_proj.weight") else INIT_STD
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def n_parameters(self) -> int:
        """Trained numbers; a shared weight counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def set_attention(
        self,
        *,
        use_flash: bool | None = None,
        kernel: str | EllipsisType | None = ...,
        deterministic: bool | None = None,
        own_masks: bool | None = None,
    ) -> None:
        """Moves the switch in every layer; weights, and what is left out, stay as they are.

        Args and Raises: those of `MultiHeadAttention.set_attention`.
        """
        for module in self.modules():
            if isinstance(module, MultiHeadAttention):
                module.set_attention(
                    use_flash=use_flash,
                    kernel=kernel,
                    deterministic=deterministic,
                    own_masks=own_masks,
                )
        if use_flash is not None:
            self.cfg = GPTConfig.from_dict({**self.cfg.to_dict(), "use_flash": use_flash})

    def set_checkpointing(self, on: bool) -> None:
        """Whether training keeps each block's input only, and computes the block again in backward.

        Less memory, about a third more time; the same loss and gradients. A pass with a cache is
        not concerned.
        """
        self._checkpointing = on

    def set_dropout(self, seed: int | Tensor | None, first_row: int | Tensor = 0) -> None:
        """Fixes the dropout masks of the forward passes to come.

        Args:
            seed: 64 bits (signed), a number or 0-d int64 on the model's device; None returns to a
                fresh seed from torch's default CPU generator in each forward pass.
            first_row: row of the first sequence in the global batch of the step; as `seed`.
        """
        self._seeded = seed is not None
        if seed is not None:
            self.dropout_seed.fill_(seed)
            self.dropout_first_row.fill_(first_row)

    def forward(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        documents_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits, or with targets the loss.

        Args:
            ids_BT: token ids (int64).
            targets_BT: the id that follows each token; -100 is not counted.
            documents_BT: integer document of each token, those in the cache first; tokens see
                their own document only.
            positions_BT: where each token stands in its text (int64), in 0 .. context_length - 1;
                one after the other, from the cache's length on, when left out.
            cache: keys and values of the tokens before; is extended.
            last_only: logits of the last position only.

        Returns:
            logits_BTV (logits_B1V with last_only), or the mean loss in nats per counted target,
            0-d, fp32 at least.

        Raises:
            ValueError: no tokens, more than `context_length`, or ids outside the vocabulary (on
                the CPU; on CUDA ids are checked where they enter).
        """
        start = 0 if cache is None else cache.length
        self._check(ids_BT, targets_BT, start)
        x_BTD = self._hidden(ids_BT, documents_BT, positions_BT, cache, start)
        if targets_BT is not None:
            return linear_cross_entropy(
                x_BTD.flatten(0, 1), self.lm_head.weight, targets_BT.flatten()
            )
        logits: Tensor = self.lm_head(x_BTD[:, -1:] if last_only else x_BTD)
        return logits

    def _hidden(
        self,
        ids_BT: Tensor,
        documents_BT: Tensor | None,
        positions_BT: Tensor | None,
        cache: Cache | None,
        start: int,
    ) -> Tensor:
        count = ids_BT.shape[1]
        if positions_BT is None:
            positions_BT = torch.arange(start, start + count, device=ids_BT.device)
        x_BTD = self.wte(ids_BT) + self.wpe(positions_BT)
        x_BTD = x_BTD.to(precision.of_residual(x_BTD))
        draw = self._dropout(x_BTD)
        x_BTD = drop_elements(x_BTD, draw, EMBEDDING, start)
        recompute = self._checkpointing and self.training and torch.is_grad_enabled()
        for index, block in enumerate(self.h):
            layer_draw = None if draw is None else draw.at(index)
            if recompute and cache is None:
                x_BTD = checkpoint(
                    block,
                    x_BTD,
                    layer_draw,
                    documents_BT,
                    use_reentrant=False,
                    # The shared masks have a seed of their own; a kernel's do not.
                    preserve_rng_state=block.attn.own_masks,  # type: ignore[union-attr]
                )
            else:
                layer_cache = None if cache is None else cache.layer(index)
                x_BTD = block(x_BTD, layer_draw, documents_BT, layer_cache, start)
        if cache is not None:
            cache.advance(count)
        out: Tensor = self.ln_f(x_BTD)
        return out

    def _dropout(self, x_BTD: Tensor) -> Dropout | None:
        if not self.training or self.cfg.drop_rate == 0:
            return None
        if self._seeded:
            return Dropout(self.cfg.drop_rate, self.dropout_seed, self.dropout_first_row)
        return fresh(self.cfg.drop_rate, x_BTD)

    def _check(self, ids_BT: Tensor, targets_BT: Tensor | None, start: int) -> None:
        if ids_BT.dim() != 2:
            raise ValueError(f"ids must be [B, T], got {list(ids_BT.shape)}")
        if not 1 <= start + ids_BT.shape[1] <= self.cfg.context_length or not ids_BT.shape[1]:
            raise ValueError(
                f"sequence must be 1 .. context_length {self.cfg.context_length} tokens, "
                f"got {start + ids_BT.shape[1]}"
            )
        if targets_BT is not None and targets_BT.shape != ids_BT.shape:
            raise ValueError(
                f"targets must have the shape of ids {list(ids_BT.shape)}, "
                f"got {list(targets_BT.shape)}"
            )
        if ids_BT.device.type != "cpu" or torch.compiler.is_compiling():
            return
        check_ids(ids_BT, self.cfg.vocab_size, "ids")
        if targets_BT is not None:
            check_ids(targets_BT[targets_BT != IGNORE], self.cfg.vocab_size, "targets")


def check_ids(ids: Tensor, vocab_size: int, what: str) -> None:
    """Refuses ids outside the vocabulary.

    Raises:
        ValueError: names the first bad id.
    """
    bad = ids[(ids < 0) | (ids >= vocab_size)]
    if bad.numel():
        raise ValueError(
            f"{what} must be in 0 .. {vocab_size - 1} (vocab_size {vocab_size}), "
            f"got {int(bad.flatten()[0])}"
        )
