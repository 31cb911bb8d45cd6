"""State dicts of the "from scratch" lineage, in: separate query, key and value, a head of its own.

They hold tensors and nothing else: sizes follow from shapes, the number of heads does not. Their
GELU is the tanh form, as GPT-2's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from flashgpt.config import GPTConfig
from flashgpt.interop.foreign import Foreign
from flashgpt.interop.weights import FROM_SCRATCH, rows, shapes, to_ours

EMBEDDING, POSITIONS, HEAD = "tok_emb.weight", "pos_emb.weight", "out_head.weight"
COMPILED = "_orig_mod."


def is_one(names: Mapping[str, object]) -> bool:
    """Whether the names of a state dict are the lineage's."""
    return EMBEDDING in names or COMPILED + EMBEDDING in names


def read(path: Path, tensors: Mapping[str, Tensor], n_heads: int | None) -> Foreign:
    """A state dict that has been read.

    Raises:
        ValueError: `n_heads` is left out, or a tensor is missing, not known, or does not fit.
    """
    tensors = {name.removeprefix(COMPILED): tensor for name, tensor in tensors.items()}
    for name in (EMBEDDING, POSITIONS, HEAD):
        if name not in tensors:
            raise ValueError(f"{path} lacks the tensor {name!r}")
        if tensors[name].dim() != 2:
            raise ValueError(f"{path}: {name!r} must be a matrix, got {list(tensors[name].shape)}")
    vocab_size, emb_dim = tensors[EMBEDDING].shape
    if n_heads is None:
        example = f" (a GPT-2 of this width has {emb_dim // 64})" if emb_dim % 64 == 0 else ""
        raise ValueError(
            f"{path} is a state dict, which does not say how many heads the model has; add "
            f"--n-heads{example}"
        )
    blocks = [re.match(r"trf_blocks\.(\d+)\.", name) for name in tensors]
    tied = torch.equal(tensors[EMBEDDING], tensors[HEAD])
    qkv_bias = "trf_blocks.0.att.W_query.bias" in tensors
    cfg = GPTConfig(
        vocab_size=vocab_size,
        context_length=tensors[POSITIONS].shape[0],
        emb_dim=emb_dim,
        n_heads=n_heads,
        n_layers=1 + max((int(found[1]) for found in blocks if found), default=0),
        drop_rate=0.0,
        qkv_bias=qkv_bias,
        tie_weights=tied,
    )
    wanted = shapes(cfg)
    own = to_ours(
        [row for row in rows(FROM_SCRATCH, cfg.n_layers) if row.ours in wanted],
        tensors,
        wanted,
        str(path),
        unused=lambda name: name.endswith(".att.mask") or (tied and name == HEAD),
    )
    notes = [f"{n_heads} heads, as told; dropout is not in a state dict: 0"]
    notes.append("query, key and value are stacked into one matrix")
    if not qkv_bias:
        notes.append("no query-key-value bias")
    if tied:
        notes.append("the head equals the token embedding bit for bit: stored once (tied)")
    else:
        notes.append("the head has weights of its own (untied)")
    return Foreign("from-scratch", path, cfg, tensors, own, notes=tuple(notes))
