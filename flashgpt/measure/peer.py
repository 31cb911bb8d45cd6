"""The peer of benchmarks: Hugging Face's GPT-2 in a shape of ours. Loads transformers if called."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

from torch import nn

from flashgpt.config import GPTConfig
from flashgpt.interop.foreign import with_zero_biases
from flashgpt.interop.weights import HUGGINGFACE, rows, to_theirs
from flashgpt.model.gpt2 import GPTModel


def missing() -> str | None:
    """Why there is no peer here; None where there is one."""
    if importlib.util.find_spec("transformers") is not None:
        return None
    return "left out, for transformers is not installed; pip install transformers"


def hugging_face(cfg: GPTConfig, dropout: float) -> nn.Module:
    """GPT2LMHeadModel of the same shape, as it comes, with PyTorch's fused attention."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings: dict[str, Any] = {
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.context_length,
        "n_embd": cfg.emb_dim,
        "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads,
        "activation_function": cfg.activation,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
        "tie_word_embeddings": cfg.tie_weights,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    return GPT2LMHeadModel(GPT2Config(**settings))


def with_weights_of(own: GPTModel) -> nn.Module:
    """`hugging_face` with the weights of a model of ours: its dtype and device, in eval mode."""
    theirs = hugging_face(own.cfg, 0.0)
    # Its query-key-value layer always has a bias; zeros where ours has none.
    biased = dataclasses.replace(own.cfg, qkv_bias=True)
    weights = with_zero_biases(biased, own.state_dict())
    theirs.load_state_dict(to_theirs(rows(HUGGINGFACE, own.cfg.n_layers), weights))
    return theirs.to(own.wte.weight.device, own.wte.weight.dtype).eval()
