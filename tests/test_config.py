"""Keys, types, ranges and presets. pytest tests/test_config.py"""

from __future__ import annotations

import math
from typing import Any

import pytest

from flashgpt.config import GPTConfig, preset
from flashgpt.runconfig import TrainConfig

CFG = dict(vocab_size=97, context_length=8, emb_dim=12, n_heads=3, n_layers=2, drop_rate=0.1)


def test_the_cfg_dict_has_the_documented_keys_and_defaults() -> None:
    cfg = GPTConfig.from_dict(CFG)
    defaults = dict(qkv_bias=False, use_flash=True, tie_weights=True, activation="gelu_new")
    assert cfg.to_dict() == {**CFG, **defaults}
    assert cfg.head_dim == 4
    assert GPTConfig.from_dict(cfg.to_dict()) == cfg


@pytest.mark.parametrize("key", CFG)
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=f"lacks '{key}'"):
        GPTConfig.from_dict({k: v for k, v in CFG.items() if k != key})


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("n_layer", "n_layers"), ("embed_dim", "emb_dim"), ("use_flsh", "use_flash")],
)
def test_an_unknown_key_is_named_with_the_nearest(wrong: str, right: str) -> None:
    cfg = {**CFG, wrong: 1}
    cfg.pop(right, None)
    with pytest.raises(ValueError, match=f"unknown key '{wrong}'; did you mean '{right}'"):
        GPTConfig.from_dict(cfg)
    if right in CFG:
        with pytest.raises(ValueError, match=f"has '{wrong}': did you mean '{right}'"):
            GPTConfig.from_dict(cfg, ignore_extra=True)


def test_extra_keys_pass_only_where_they_are_let() -> None:
    assert GPTConfig.from_dict({**CFG, "zzz": 1}, ignore_extra=True) == GPTConfig.from_dict(CFG)
    with pytest.raises(ValueError, match="'zzz'; known are vocab_size"):
        GPTConfig.from_dict({**CFG, "zzz": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"context_length": -1}, "context_length must be at least 1, got -1"),
        ({"n_layers": 0}, "n_layers must be at least 1"),
        ({"n_heads": 5}, "emb_dim must be divisible by n_heads, got emb_dim 12 and n_heads 5"),
        ({"drop_rate": 1.0}, r"drop_rate must be in \[0, 1\), got 1.0"),
        ({"drop_rate": math.nan}, "cfg.drop_rate must be finite"),
        ({"emb_dim": 12.0}, "cfg.emb_dim must be an integer, got 12.0"),
        ({"n_heads": True}, "cfg.n_heads must be an integer, got True"),
        ({"use_flash": 1}, "cfg.use_flash must be true or false, got 1"),
        ({"activation": "relu"}, "cfg.activation must be one of gelu_new, gelu, got 'relu'"),
    ],
)
def test_a_model_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig.from_dict({**CFG, **change})


def test_an_int_passes_for_a_float() -> None:
    assert TrainConfig(lr=1).lr == 1


def test_presets_are_gpt2s_sizes() -> None:
    published = {
        "gpt2": (768, 12, 12),
        "gpt2-medium": (1024, 24, 16),
        "gpt2-large": (1280, 36, 20),
        "gpt2-xl": (1600, 48, 25),
    }
    for name, (emb_dim, n_layers, n_heads) in published.items():
        cfg = preset(name)
        assert (cfg.emb_dim, cfg.n_layers, cfg.n_heads) == (emb_dim, n_layers, n_heads)
        assert (cfg.vocab_size, cfg.context_length) == (50257, 1024)
        assert cfg.qkv_bias and cfg.tie_weights and cfg.activation == "gelu_new"
    assert preset("tiny", vocab_size=300, n_layers=1).n_layers == 1
    with pytest.raises(ValueError, match="unknown key 'n_layer'"):
        preset("tiny", n_layer=1)
