"""Hugging Face GPT-2 folders, in and out: `config.json` and `model.safetensors`.

What `transformers.GPT2LMHeadModel.from_pretrained` loads as it is. Weights stay as they are, bit
for bit; matrices are transposed. A model without a query-key-value bias has no Hugging Face form:
it is written with zero biases and a note in config.json, and read back without them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashgpt.config import GPTConfig
from flashgpt.interop.weights import HUGGINGFACE, Row, rows
from flashgpt.model.gpt2 import INIT_STD, GPTModel

NOTE = "flashgpt"  # our own section of config.json
PREFIX = "transformer."

# GPT2Config fields that change numbers and have one value that our model computes.
FIXED = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
SIZES = ("vocab_size", "n_positions", "n_embd", "n_head", "n_layer")
ACTIVATIONS = {"gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu": "gelu"}


def save(model: GPTModel, folder: Path, *, eos_id: int | None) -> None:
    """Writes config.json and model.safetensors into an existing folder."""
    save_tensors(model.cfg, model.state_dict(), folder, eos_id=eos_id)


def save_tensors(
    cfg: GPTConfig, own: dict[str, Tensor], folder: Path, *, eos_id: int | None
) -> None:
    """Like `save`, of parameters by our names."""
    config = {
        "architectures": ["GPT2LMHeadModel"],
        **FIXED,
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.context_length,
        "n_embd": cfg.emb_dim,
        "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads,
        "n_inner": None,
        "activation_function": cfg.activation,
        "resid_pdrop": cfg.drop_rate,
        "embd_pdrop": cfg.drop_rate,
        "attn_pdrop": cfg.drop_rate,
        "initializer_range": INIT_STD,
        "tie_word_embeddings": cfg.tie_weights,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "dtype": str(own["wte.weight"].dtype).removeprefix("torch."),
        NOTE: {"qkv_bias": cfg.qkv_bias, "use_flash": cfg.use_flash},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {}
    for row in _rows(cfg):
        if row.ours in own:
            tensor = own[row.ours].T if row.transposed else own[row.ours]
        else:
            tensor = torch.zeros(3 * cfg.emb_dim, dtype=own["wte.weight"].dtype)
        tensors[row.theirs] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> GPTModel:
    """The model of a Hugging Face GPT-2 folder, on the CPU.

    Raises:
        ValueError: a missing or damaged file, or a setting that our model does not compute.
    """
    cfg = read_config(folder)
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    if "wte.weight" in tensors:  # the form of the original release has no prefix
        head = tensors.pop("lm_head.weight", None)
        tensors = {PREFIX + name: tensor for name, tensor in tensors.items()}
        if head is not None:
            tensors["lm_head.weight"] = head
    model = GPTModel.empty(cfg)
    load_weights(model, tensors, str(path))
    return model


def load_weights(model: GPTModel, tensors: dict[str, Tensor], origin: str) -> None:
    """Copies Hugging Face tensors into a model.

    Raises:
        ValueError: a tensor is missing, of another shape, or not known.
    """
    own = model.state_dict()
    left = dict(tensors)
    for row in _rows(model.cfg):
        if row.theirs not in left:
            raise ValueError(f"{origin} lacks the tensor {row.theirs!r}")
        tensor = left.pop(row.theirs)
        if row.ours not in own:
            if tensor.any():
                raise ValueError(f"{origin}: {row.theirs!r} must be zero for qkv_bias = False")
            continue
        target = own[row.ours]
        source = tensor.T if row.transposed else tensor
        if source.shape != target.shape:
            raise ValueError(
                f"{origin}: {row.theirs!r} must have the shape {list(target.shape)}"
                f"{' transposed' if row.transposed else ''}, got {list(tensor.shape)}"
            )
        # Mapped files are 8-byte aligned; a copy keeps the CPU on the code path of a fresh run.
        target.copy_(source)
    strangers = [name for name in left if not name.endswith((".attn.bias", ".attn.masked_bias"))]
    if model.cfg.tie_weights:
        strangers = [name for name in strangers if not name.endswith("lm_head.weight")]
    if strangers:
        raise ValueError(f"{origin} has a tensor that GPT-2 does not know: {strangers[0]!r}")


def read_config(folder: Path) -> GPTConfig:
    """The GPTConfig of a Hugging Face GPT-2 folder.

    Raises:
        ValueError: no GPT-2 config, or a field whose value our model does not compute.
    """
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    for name in SIZES:
        if not isinstance(config, dict) or name not in config:
            raise ValueError(f"{path} is no GPT-2 config: it lacks {name}")
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{path}: {name} must be {value!r}, got {config[name]!r}")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise ValueError(f"{path}: n_inner must be 4 * n_embd, got {config['n_inner']}")
    activation = config.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{path}: activation_function must be one of {', '.join(ACTIVATIONS)}, "
            f"got {activation!r}"
        )
    rates = {config.get(f"{site}_pdrop", 0.1) for site in ("resid", "embd", "attn")}
    if len(rates) > 1:
        raise ValueError(f"{path}: resid_pdrop, embd_pdrop and attn_pdrop must be equal")
    note = config.get(NOTE, {})
    return GPTConfig(
        vocab_size=config["vocab_size"],
        context_length=config["n_positions"],
        emb_dim=config["n_embd"],
        n_heads=config["n_head"],
        n_layers=config["n_layer"],
        drop_rate=rates.pop(),
        qkv_bias=note.get("qkv_bias", True),
        use_flash=note.get("use_flash", True),
        tie_weights=config.get("tie_word_embeddings", True),
        activation=ACTIVATIONS[activation],  # type: ignore[arg-type]
    )


def _rows(cfg: GPTConfig) -> list[Row]:
    found = rows(HUGGINGFACE, cfg.n_layers)
    return [row for row in found if not (cfg.tie_weights and row.ours == "lm_head.weight")]
