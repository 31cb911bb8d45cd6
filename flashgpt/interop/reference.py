"""GPT-2's forward pass written once more, on the tensors of each format by their own names.

It shares nothing with our model or the name tables, so an error in those shows as a difference of
logits. Slow and plain; any dtype, on the CPU.

Legend: B batch, T positions, N heads, H head dim, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# Where each format keeps what a block needs; {i} is the layer. `in_out`: matrices are [in, out].
_GPT2_BLOCK = {
    "norm1": "transformer.h.{i}.ln_1",
    "qkv": "transformer.h.{i}.attn.c_attn",
    "project": "transformer.h.{i}.attn.c_proj",
    "norm2": "transformer.h.{i}.ln_2",
    "up": "transformer.h.{i}.mlp.c_fc",
    "down": "transformer.h.{i}.mlp.c_proj",
    "norm": "transformer.ln_f",
    "tokens": "transformer.wte",
    "positions": "transformer.wpe",
    "head": "lm_head",
}
_SCRATCH_BLOCK = {
    "norm1": "trf_blocks.{i}.norm1",
    "q": "trf_blocks.{i}.att.W_query",
    "k": "trf_blocks.{i}.att.W_key",
    "v": "trf_blocks.{i}.att.W_value",
    "project": "trf_blocks.{i}.att.out_proj",
    "norm2": "trf_blocks.{i}.norm2",
    "up": "trf_blocks.{i}.ff.layers.0",
    "down": "trf_blocks.{i}.ff.layers.2",
    "norm": "final_norm",
    "tokens": "tok_emb",
    "positions": "pos_emb",
    "head": "out_head",
}
_LLMC_BLOCK = {
    "norm1": "ln1",
    "qkv": "qkv",
    "project": "attproj",
    "norm2": "ln2",
    "up": "fc",
    "down": "fcproj",
    "norm": "lnf",
}


class Reference:
    """The forward pass of one model.

    Args:
        kind: "huggingface", "nanogpt", "from-scratch" or "llm.c".
        tensors: by the names of that format; converted to `dtype` where they are used.
        erf: whether GELU is the exact one; else the tanh form.
        dtype: of the whole computation.
    """

    def __init__(
        self,
        kind: str,
        tensors: Mapping[str, Tensor],
        *,
        n_heads: int,
        n_layers: int,
        erf: bool,
        dtype: torch.dtype,
    ) -> None:
        self.kind, self.tensors, self.dtype = kind, tensors, dtype
        self.n_heads, self.n_layers, self.erf = n_heads, n_layers, erf

    @torch.no_grad()
    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Logits, ids_BT -> [B, T, V]."""
        length = ids_BT.shape[1]
        tokens_VD = self._get("tokens", 0, "weight")
        positions_TD = self._get("positions", 0, "weight")
        assert tokens_VD is not None and positions_TD is not None
        x_BTD = tokens_VD[ids_BT] + positions_TD[:length]
        future_TT = torch.ones(length, length, dtype=torch.bool).triu(1)
        for i in range(self.n_layers):
            x_BTD = x_BTD + self._attention(self._norm(x_BTD, "norm1", i), i, future_TT)
            wide = self._gelu(self._linear(self._norm(x_BTD, "norm2", i), "up", i))
            x_BTD = x_BTD + self._linear(wide, "down", i)
        head_VD = self._get("head", 0, "weight")
        return self._norm(x_BTD, "norm", 0) @ (tokens_VD if head_VD is None else head_VD).T

    def _attention(self, x_BTD: Tensor, i: int, future_TT: Tensor) -> Tensor:
        if self.kind == "from-scratch":
            q, k, v = (self._linear(x_BTD, name, i) for name in ("q", "k", "v"))
        else:
            q, k, v = self._linear(x_BTD, "qkv", i).split(x_BTD.shape[-1], dim=-1)
        q_BNTH, k_BNTH, v_BNTH = (
            part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in (q, k, v)
        )
        scores_BNTT = q_BNTH @ k_BNTH.transpose(-1, -2) / math.sqrt(q_BNTH.shape[-1])
        weights_BNTT = scores_BNTT.masked_fill(future_TT, -math.inf).softmax(-1)
        return self._linear((weights_BNTT @ v_BNTH).transpose(1, 2).flatten(2), "project", i)

    def _linear(self, x: Tensor, part: str, i: int) -> Tensor:
        weight, bias = self._get(part, i, "weight"), self._get(part, i, "bias")
        assert weight is not None, part
        x = x @ (weight if self.kind == "huggingface" else weight.T)
        return x if bias is None else x + bias

    def _norm(self, x: Tensor, part: str, i: int) -> Tensor:
        gain, bias = self._get(part, i, "weight"), self._get(part, i, "bias")
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        assert gain is not None, part
        return x * gain if bias is None else x * gain + bias

    def _gelu(self, x: Tensor) -> Tensor:
        if self.erf:
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def _get(self, part: str, i: int, which: str) -> Tensor | None:
        """One tensor in the dtype of the computation, None where the format has none."""
        tensor = self.tensors.get(self._name(part, i, which))
        return None if tensor is None else tensor.to(self.dtype)

    def _name(self, part: str, i: int, which: str) -> str:
        if self.kind == "llm.c":
            whole = {"tokens": "wte", "positions": "wpe", "head": ""}
            if part in whole:
                return whole[part]
            name = _LLMC_BLOCK[part] + which[0]
            return name if part == "norm" else f"{name}.{i}"
        if self.kind == "from-scratch":
            if part.startswith("norm"):
                which = {"weight": "scale", "bias": "shift"}[which]
            return f"{_SCRATCH_BLOCK[part]}.{which}".format(i=i)
        name = f"{_GPT2_BLOCK[part]}.{which}".format(i=i)
        if self.kind == "huggingface" and "wte.weight" in self.tensors:
            return name.removeprefix("transformer.")
        return name
