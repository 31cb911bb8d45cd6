"""Transformer block and feed-forward. pytest tests/model/test_block.py"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgpt.attention.dropout import (
    ATTENTION_OUTPUT,
    MLP_OUTPUT,
    Dropout,
    element_keep,
)
from flashgpt.config import GPTConfig
from flashgpt.model.block import FeedForward, TransformerBlock

CFG: dict[str, Any] = {
    "vocab_size": 50,
    "context_length": 16,
    "emb_dim": 12,
    "n_heads": 3,
    "n_layers": 2,
    "drop_rate": 0.0,
}


def gelu(x: float, activation: str) -> float:
    """GELU from its formula (Hendrycks & Gimpel 2016): tanh form, or erf form."""
    if activation == "gelu_new":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return 0.5 * x * (1 + math.tanh(inner))
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_feed_forward_is_the_definition(activation: str) -> None:
    torch.manual_seed(0)
    module = FeedForward(6, activation).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    inner = x @ module.c_fc.weight.T + module.c_fc.bias
    assert inner.shape == (2, 5, 24)
    inner = inner.detach().apply_(lambda value: gelu(value, activation))
    wanted = inner @ module.c_proj.weight.T + module.c_proj.bias
    torch.testing.assert_close(module(x), wanted, rtol=0, atol=1e-14)
    other = FeedForward(6, "gelu" if activation == "gelu_new" else "gelu_new").double()
    other.load_state_dict(module.state_dict())
    assert (other(x) - wanted).abs().max() > 1e-6


def layer_norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    )


def test_each_half_adds_to_what_came_in() -> None:
    """Dropout included: where it stands, which mask, which scale."""
    torch.manual_seed(0)
    block = TransformerBlock({**CFG, "drop_rate": 0.3}).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 7, 12, dtype=torch.float64) * 0.01  # small: LayerNorm's eps shows
    dropout = Dropout(0.3, torch.tensor(5), torch.tensor(2), layer=1)
    kept = [element_keep(dropout, s, 2, 0, 7, 12) for s in (ATTENTION_OUTPUT, MLP_OUTPUT)]
    attended = block.attn(layer_norm(x, block.ln_1), dropout)
    middle = x + kept[0] * attended * dropout.scale
    wanted = middle + kept[1] * block.mlp(layer_norm(middle, block.ln_2)) * dropout.scale
    torch.testing.assert_close(block(x, dropout), wanted, rtol=0, atol=1e-12)
    block.eval()
    quiet = x + block.attn(layer_norm(x, block.ln_1))
    quiet = quiet + block.mlp(layer_norm(quiet, block.ln_2))
    torch.testing.assert_close(block(x, dropout), quiet, rtol=0, atol=1e-12)


def test_an_absent_switch_means_on() -> None:
    assert TransformerBlock(CFG).attn.use_flash
    assert TransformerBlock({**CFG, "use_flash": True}).attn.use_flash
    assert not TransformerBlock({**CFG, "use_flash": False}).attn.use_flash
    assert not TransformerBlock(GPTConfig.from_dict({**CFG, "use_flash": False})).attn.use_flash


def test_a_call_nobody_seeded_draws_once_for_the_whole_block() -> None:
    block = TransformerBlock({**CFG, "drop_rate": 0.3})
    x = torch.randn(2, 7, 12)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(block(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    state = torch.get_rng_state()
    block.eval()(x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 5}, r"emb_dim must be divisible by n_heads, got emb_dim 12 and n_heads 5"),
        ({"drop_rate": 1.0}, r"drop_rate must be in \[0, 1\), got 1\.0"),
        ({"emb_dims": 3}, r"emb_dims.*emb_dim"),
        ({"activation": "relu"}, r"activation"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerBlock({**CFG, **change})
