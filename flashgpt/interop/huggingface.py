"""Hugging Face GPT-2 folders, in and out: `config.json` and `model.safetensors`.

Also in: weights in shards, and the `pytorch_model.bin` of old releases.

What `transformers.GPT2LMHeadModel.from_pretrained` loads as it is. Weights stay as they are, bit
for bit; matrices are transposed. A model without a query-key-value bias has no Hugging Face form:
it is written with zero biases and a note in config.json, and read back without them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flashgpt.config import GPTConfig
from flashgpt.interop.files import only_tensors, read_pickle, read_safetensors
from flashgpt.interop.foreign import Foreign
from flashgpt.interop.weights import HUGGINGFACE, Row, rows, shapes, to_ours, to_theirs
from flashgpt.model.gpt2 import INIT_STD, GPTModel

NOTE = "flashgpt"  # our own section of config.json
PREFIX = "transformer."
HEAD = "lm_head.weight"
BUFFERS = (".attn.bias", ".attn.masked_bias")  # masks that old releases keep beside the weights

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
    cfg: GPTConfig,
    own: dict[str, Tensor],
    folder: Path,
    *,
    eos_id: int | None,
    note: dict[str, Any] | None = None,
) -> None:
    """Like `save`, of parameters by our names.

    Args:
        note: our section of config.json, {} for none; what our model needs when left out.
    """
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
    }
    if note := own_note(cfg) if note is None else note:
        config[NOTE] = note
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    zeros = {
        row.ours: torch.zeros(3 * cfg.emb_dim, dtype=own["wte.weight"].dtype)
        for row in _rows(cfg)
        if row.ours not in own
    }
    tensors = to_theirs(_rows(cfg), {**own, **zeros})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def own_note(cfg: GPTConfig) -> dict[str, Any]:
    """What a Hugging Face config has no field for."""
    return {"qkv_bias": cfg.qkv_bias, "use_flash": cfg.use_flash}


def load(folder: Path) -> GPTModel:
    """The model of a Hugging Face GPT-2 folder, on the CPU.

    Raises:
        ValueError: a missing or damaged file, or a setting that our model does not compute.
    """
    cfg = read_config(folder)
    path, tensors = read_tensors(folder)
    model = GPTModel.empty(cfg)
    load_weights(model, tensors, str(path))
    return model


def read_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The tensors by the names they have there, and the file that names them.

    In this order: model.safetensors, its shards by their index, and the pickle of old releases,
    which is read without running code, whole or in shards.

    Raises:
        ValueError: a missing or damaged file.
    """
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_pickle)):
        path, index = folder / name, folder / f"{name}.index.json"
        if path.exists():
            return path, only_tensors(read(path), str(path))
        if index.exists():
            tensors: dict[str, Tensor] = {}
            for shard in _shards(index):
                tensors |= only_tensors(read(folder / shard), str(folder / shard))
            return index, tensors
    # With the message of a file that is missing.
    return folder / "model.safetensors", read_safetensors(folder / "model.safetensors")


def _shards(index: Path) -> list[str]:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted(set(listed))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} must name files beside it, got {name!r}")
    return names


def load_weights(model: GPTModel, tensors: dict[str, Tensor], origin: str) -> None:
    """Copies Hugging Face tensors into a model.

    Raises:
        ValueError: a tensor is missing, of another shape, or not known.
    """
    state = model.state_dict()
    for name, tensor in own_tensors(model.cfg, tensors, origin).items():
        # Mapped files are 8-byte aligned; a copy keeps the CPU on the code path of a fresh run.
        state[name].copy_(tensor)


def own_tensors(cfg: GPTConfig, tensors: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Hugging Face tensors, with or without their prefix, by our names.

    Raises:
        ValueError: as `load_weights`.
    """
    if "wte.weight" in tensors:  # the form of the original release has no prefix
        tensors = {
            name if name == HEAD else PREFIX + name: tensor for name, tensor in tensors.items()
        }
    wanted = shapes(cfg)
    found, empty = [], set()
    for row in _rows(cfg):
        if row.ours in wanted:
            found.append(row)
            continue
        (name,) = row.parts
        if name not in tensors:
            raise ValueError(f"{origin} lacks the tensor {name!r}")
        if tensors[name].any():
            raise ValueError(f"{origin}: {name!r} must be zero for qkv_bias = False")
        empty.add(name)
    if cfg.tie_weights and HEAD in tensors:
        embedding = tensors.get(PREFIX + "wte.weight")
        if embedding is not None and not torch.equal(tensors[HEAD], embedding):
            raise ValueError(
                f"{origin}: {HEAD!r} must be the token embedding for tie_word_embeddings = true; "
                "it has weights of its own, so set it to false in config.json"
            )
        empty.add(HEAD)
    return to_ours(
        found, tensors, wanted, origin, unused=lambda name: name in empty or name.endswith(BUFFERS)
    )


def read_config(folder: Path) -> GPTConfig:
    """The GPTConfig of a Hugging Face GPT-2 folder.

    Raises:
        ValueError: no GPT-2 config, or a field whose value our model does not compute.
    """
    path = folder / "config.json"
    config = _read_json(path)
    if config.get("model_type", "gpt2") != "gpt2":
        raise ValueError(f"{path}: model_type must be 'gpt2', got {config['model_type']!r}")
    for name in SIZES:
        if name not in config:
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


def read(folder: Path) -> Foreign:
    """A folder, for a conversion.

    Raises:
        ValueError: as `load`.
    """
    cfg = read_config(folder)
    path, tensors = read_tensors(folder)
    config = _read_json(folder / "config.json")
    own = own_tensors(cfg, tensors, str(path))
    biases = any(tensor.any() for name, tensor in own.items() if name.endswith(".bias"))
    notes = []
    if not cfg.qkv_bias:
        notes.append("no query-key-value bias, as its note says")
    return Foreign(
        format="huggingface",
        path=path,
        cfg=cfg,
        theirs=tensors,
        own=own,
        biases=biases or config.get(NOTE, {}).get("biases", True),
        eos_id=config.get("eos_token_id"),
        notes=tuple(notes),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no GPT-2 config: it holds no object")
    return config


def _rows(cfg: GPTConfig) -> list[Row]:
    found = rows(HUGGINGFACE, cfg.n_layers)
    return [row for row in found if not (cfg.tie_weights and row.ours == HEAD)]
