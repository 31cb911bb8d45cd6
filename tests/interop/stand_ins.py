"""Small models of other formats, made of random numbers by writers of their own."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

V, T, D, N, L = 61, 16, 24, 3, 2
SIZES = {"n_layer": L, "n_head": N, "n_embd": D, "block_size": T, "vocab_size": V}


def _draw(*shape: int, seed: list[int], center: float = 0.0, scale: float = 0.3) -> Tensor:
    seed[0] += 1
    generator = torch.Generator().manual_seed(seed[0])
    return center + scale * torch.randn(*shape, generator=generator)


def nanogpt_state(bias: bool = True, vocab: int = V) -> dict[str, Tensor]:
    """Parameters by nanoGPT's names; embedding and head are one tensor."""
    seed = [0]
    state: dict[str, Tensor] = {}

    def linear(name: str, out: int, into: int) -> None:
        state[f"{name}.weight"] = _draw(out, into, seed=seed)
        if bias:
            state[f"{name}.bias"] = _draw(out, seed=seed)

    def norm(name: str) -> None:
        state[f"{name}.weight"] = _draw(D, seed=seed, center=1.0)
        if bias:
            state[f"{name}.bias"] = _draw(D, seed=seed)

    state["transformer.wte.weight"] = _draw(vocab, D, seed=seed)
    state["transformer.wpe.weight"] = _draw(T, D, seed=seed)
    for i in range(L):
        block = f"transformer.h.{i}"
        norm(f"{block}.ln_1")
        linear(f"{block}.attn.c_attn", 3 * D, D)
        linear(f"{block}.attn.c_proj", D, D)
        norm(f"{block}.ln_2")
        linear(f"{block}.mlp.c_fc", 4 * D, D)
        linear(f"{block}.mlp.c_proj", D, 4 * D)
    norm("transformer.ln_f")
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def nanogpt_file(
    path: Path,
    *,
    bias: bool = True,
    vocab: int = V,
    prefix: str = "",
    changes: dict[str, Any] | None = None,
    **args: Any,
) -> dict[str, Tensor]:
    """Writes a ckpt.pt as a training of nanoGPT leaves it; returns its parameters."""
    state: dict[str, Any] = {**nanogpt_state(bias, vocab), **(changes or {})}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    content = {
        "model": {prefix + name: tensor for name, tensor in state.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]},
        "model_args": {**SIZES, "bias": bias, "vocab_size": vocab, "dropout": 0.1, **args},
        "iter_num": 7,
        "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": "mine", "compile": True},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return state


def from_scratch_state(qkv_bias: bool = False, tied: bool = False) -> dict[str, Tensor]:
    """A state dict of the from-scratch lineage, with the masks it keeps as buffers."""
    seed = [1000]
    state = {
        "tok_emb.weight": _draw(V, D, seed=seed),
        "pos_emb.weight": _draw(T, D, seed=seed),
        "final_norm.scale": _draw(D, seed=seed, center=1.0),
        "final_norm.shift": _draw(D, seed=seed),
    }
    state["out_head.weight"] = state["tok_emb.weight"].clone() if tied else _draw(V, D, seed=seed)
    for i in range(L):
        block = f"trf_blocks.{i}"
        state[f"{block}.att.mask"] = torch.triu(torch.ones(T, T), diagonal=1)
        for name in ("W_query", "W_key", "W_value"):
            state[f"{block}.att.{name}.weight"] = _draw(D, D, seed=seed)
            if qkv_bias:
                state[f"{block}.att.{name}.bias"] = _draw(D, seed=seed)
        for name, out, into in (
            ("att.out_proj", D, D), ("ff.layers.0", 4 * D, D), ("ff.layers.2", D, 4 * D)
        ):  # fmt: skip
            state[f"{block}.{name}.weight"] = _draw(out, into, seed=seed)
            state[f"{block}.{name}.bias"] = _draw(out, seed=seed)
        for name in ("norm1", "norm2"):
            state[f"{block}.{name}.scale"] = _draw(D, seed=seed, center=1.0)
            state[f"{block}.{name}.shift"] = _draw(D, seed=seed)
    return state


LLMC_SHAPES = {
    "ln1w": (D,),
    "ln1b": (D,),
    "qkvw": (3 * D, D),
    "qkvb": (3 * D,),
    "attprojw": (D, D),
    "attprojb": (D,),
    "ln2w": (D,),
    "ln2b": (D,),
    "fcw": (4 * D, D),
    "fcb": (4 * D,),
    "fcprojw": (D, 4 * D),
    "fcprojb": (D,),
}


def llmc_file(path: Path, version: int = 3, padded: int = 64) -> list[Tensor]:
    """Writes llm.c's model file; returns its parameters in their order, layers stacked."""
    seed = [2000]
    wte = _draw(padded, D, seed=seed)
    wte[V:] = 0
    tensors = [wte, _draw(T, D, seed=seed)]
    for name, shape in LLMC_SHAPES.items():
        center = 1.0 if name in ("ln1w", "ln2w") else 0.0
        tensors.append(_draw(L, *shape, seed=seed, center=center))
    tensors += [_draw(D, seed=seed, center=1.0), _draw(D, seed=seed)]
    header = [20240326, version, T, V, L, N, D, padded] + [0] * 248
    with path.open("wb") as file:
        file.write(struct.pack("<256i", *header))
        for i, tensor in enumerate(tensors):
            if version == 5:
                tensors[i] = tensor.bfloat16()
                file.write(tensors[i].view(torch.int16).numpy().tobytes())
            else:
                file.write(tensor.numpy().tobytes())
    return tensors
