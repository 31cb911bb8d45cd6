"""nanoGPT's `ckpt.pt`, in and out: a pickle of plain tensors and numbers.

nanoGPT computes GELU with erf, has one tensor for token embedding and head, and one setting for
all biases, those of LayerNorm included. A model that is otherwise has no nanoGPT form.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashgpt.config import GPTConfig
from flashgpt.interop.files import only_tensors
from flashgpt.interop.foreign import Foreign, with_zero_biases
from flashgpt.interop.weights import NANOGPT, Row, rows, shapes, to_ours, to_theirs

FILE = "ckpt.pt"
COMPILED = "_orig_mod."  # torch.compile's, before each name
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"


def is_one(found: dict[str, Any]) -> bool:
    """Whether the content of a pickle is nanoGPT's."""
    return "model_args" in found and "model" in found


def read(path: Path, found: dict[str, Any]) -> Foreign:
    """A checkpoint whose content has been read.

    Raises:
        ValueError: a setting or tensor is missing, not known, or does not fit.
    """
    args, state = found["model_args"], found["model"]
    if not isinstance(args, dict) or not isinstance(state, dict):
        raise ValueError(f"{path} must hold the dictionaries model and model_args")
    for name in SIZES:
        if name not in args:
            raise ValueError(f"{path} lacks {name} in model_args")
    tensors = {
        name.removeprefix(COMPILED): tensor
        for name, tensor in only_tensors(state, str(path)).items()
    }
    biases = bool(args["bias"])
    tied = HEAD not in tensors or _equal(tensors.get(EMBEDDING), tensors[HEAD])
    cfg = GPTConfig(
        vocab_size=args["vocab_size"],
        context_length=args["block_size"],
        emb_dim=args["n_embd"],
        n_heads=args["n_head"],
        n_layers=args["n_layer"],
        drop_rate=float(args.get("dropout", 0.0)),
        qkv_bias=biases,
        tie_weights=tied,
        activation="gelu",
    )
    own = to_ours(
        _rows(cfg, biases),
        tensors,
        shapes(cfg),
        str(path),
        unused=lambda name: name.endswith(".attn.bias") or (tied and name == HEAD),
    )
    notes = ["GELU is the exact one (erf)"]
    if not biases:
        own = with_zero_biases(cfg, own)
        notes.append("no biases: zeros where our model has one, left out on the way back")
    if not tied:
        notes.append("the head has weights of its own, which nanoGPT itself does not support")
    return Foreign("nanogpt", path, cfg, tensors, own, biases=biases, notes=tuple(notes))


def write(source: Foreign, folder: Path) -> tuple[str, ...]:
    """Writes ckpt.pt into an existing folder; says what had to be changed.

    Raises:
        ValueError: nanoGPT's model does not compute this.
    """
    cfg, own = source.cfg, dict(source.own)
    if cfg.activation != "gelu":
        raise ValueError(
            "a nanoGPT model must have the exact GELU (erf), got gelu_new (tanh): nanoGPT would "
            "compute other logits; train with --model.activation gelu"
        )
    if not cfg.tie_weights:
        raise ValueError("a nanoGPT model must have a tied head, got one with weights of its own")
    notes = []
    if source.biases and not cfg.qkv_bias:
        notes.append("query-key-value bias: zeros, as nanoGPT has all biases or none")
        for i in range(cfg.n_layers):
            weight = own[f"h.{i}.attn.c_attn.weight"]
            own[f"h.{i}.attn.c_attn.bias"] = torch.zeros(3 * cfg.emb_dim, dtype=weight.dtype)
    if not source.biases:
        notes.append("biases left out (bias = False): all are zero, and the source says so")
    tensors = {
        name: tensor if tensor.nbytes == tensor.untyped_storage().nbytes() else tensor.clone()
        for name, tensor in to_theirs(_rows(cfg, source.biases), own).items()
    }  # a pickle holds the whole storage of a view
    optimizer = _new_optimizer(tensors)
    tensors[HEAD] = tensors[EMBEDDING]
    content = {
        "model": tensors,
        "optimizer": optimizer,
        "model_args": {
            "n_layer": cfg.n_layers,
            "n_head": cfg.n_heads,
            "n_embd": cfg.emb_dim,
            "block_size": cfg.context_length,
            "bias": source.biases,
            "vocab_size": cfg.vocab_size,
            "dropout": cfg.drop_rate,
        },
        "iter_num": 0,
        "best_val_loss": 1e9,
    }
    with (folder / FILE).open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    return tuple(notes)


def _new_optimizer(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The state of nanoGPT's optimizer before its first step, with nanoGPT's default settings.

    Its training asks a checkpoint for one. Matrices decay, vectors do not.
    """
    groups = []
    for decay, matrices in ((0.1, True), (0.0, False)):
        count = sum((tensor.dim() >= 2) == matrices for tensor in tensors.values())
        params = [torch.empty(0, requires_grad=True) for _ in range(count)]
        groups.append({"params": params, "weight_decay": decay})
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95)).state_dict()


def _rows(cfg: GPTConfig, biases: bool) -> list[Row]:
    return [
        row
        for row in rows(NANOGPT, cfg.n_layers)
        if (biases or not row.ours.endswith(".bias")) and not (cfg.tie_weights and row.ours == HEAD)
    ]


def _equal(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and torch.equal(one, other)
