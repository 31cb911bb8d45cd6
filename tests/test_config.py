"""Keys, types, ranges and presets. pytest tests/test_config.py"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from flashgpt.config import (
    DataConfig,
    GPTConfig,
    ModelConfig,
    SampleConfig,
    TrainConfig,
    preset,
)
from flashgpt.fields import documented_fields

CFG = dict(vocab_size=97, context_length=8, emb_dim=12, n_heads=3, n_layers=2, drop_rate=0.1)
SECTIONS = (ModelConfig, DataConfig, TrainConfig, SampleConfig)


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


@pytest.mark.parametrize("cls", [GPTConfig, *SECTIONS])
def test_every_key_has_a_unit_and_refuses_another_type(cls: type) -> None:
    required = CFG if cls is GPTConfig else {}
    assert len(documented_fields(cls)) == len(dataclasses.fields(cls))
    for name, (_, doc) in documented_fields(cls).items():
        assert doc
        for wrong in (object(), b"1", {"a": 1}):
            with pytest.raises(ValueError, match=rf"\.{name} must be .*got "):
                cls(**{**required, name: wrong})


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


@pytest.mark.parametrize(
    ("cls", "change", "message"),
    [
        (ModelConfig, {"preset": "gpt3"}, "model.preset must be one of tiny, gpt2"),
        (DataConfig, {"source": ()}, "data.source must name at least one"),
        (DataConfig, {"vocab_size": 256}, "data.vocab_size must be at least 257"),
        (TrainConfig, {"steps": 0}, "train.steps must be at least 1, got 0"),
        (TrainConfig, {"stop_at": 0}, "train.stop_at must be at least 1"),
        (TrainConfig, {"tokens_per_step": 0}, "train.tokens_per_step must be at least 1"),
        (TrainConfig, {"micro_batch": 0}, "train.micro_batch must be at least 1"),
        (TrainConfig, {"eval_every": -1}, "train.eval_every must be at least 0"),
        (TrainConfig, {"log_every": 0}, "train.log_every must be at least 1"),
        (TrainConfig, {"seed": -1}, "train.seed must be at least 0"),
        (TrainConfig, {"seed": 2**63}, r"train.seed must be in \[0, 2\^63\)"),
        (TrainConfig, {"lr": 0.0}, "train.lr must be positive, got 0.0"),
        (TrainConfig, {"lr": math.inf}, "train.lr must be finite"),
        (TrainConfig, {"min_lr": -0.1}, "train.min_lr must not be negative"),
        (TrainConfig, {"min_lr": 7.0}, "train.min_lr is a fraction of lr, at most 1, got 7.0"),
        (TrainConfig, {"steps": 3, "warmup_steps": 9}, r"warmup_steps must be at most steps \(3\)"),
        (TrainConfig, {"schedule": "linear"}, "schedule must be one of cosine, wsd, constant"),
        (TrainConfig, {"decay_steps": 9}, "decay_steps must be left out with train.schedule 'cos"),
        (TrainConfig, {"schedule": "wsd", "decay_steps": 0}, "decay_steps must be at least 1"),
        (
            TrainConfig,
            {"schedule": "wsd", "steps": 9, "warmup_steps": 4, "decay_steps": 6},
            "decay_steps must be at most the 5 steps after warmup, got 6",
        ),
        (TrainConfig, {"grad_clip": -1}, "train.grad_clip must not be negative"),
        (TrainConfig, {"beta2": 1.0}, r"train.beta2 must be in \[0, 1\)"),
        (TrainConfig, {"optimizer": "sgd"}, "train.optimizer must be one of adamw, muon"),
        (TrainConfig, {"precision": "fp8"}, "train.precision must be one of auto, fp32, bf16"),
        (SampleConfig, {"max_new_tokens": 0}, "sample.max_new_tokens must be at least 1"),
        (SampleConfig, {"temperature": -0.1}, "sample.temperature must not be negative"),
        (SampleConfig, {"top_k": -1}, "sample.top_k must not be negative"),
        (SampleConfig, {"top_p": 0.0}, r"sample.top_p must be in \(0, 1\]"),
        (SampleConfig, {"min_p": 1.1}, r"sample.min_p must be in \(0, 1\]"),
        (SampleConfig, {"seed": 2**63}, r"sample.seed must be in \[0, 2\^63\)"),
        (SampleConfig, {"past_context": "wrap"}, "sample.past_context must be one of stop, slide"),
    ],
)
def test_a_section_out_of_range_is_refused(cls: type, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**change)


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


def test_the_vocabulary_is_the_tokenizers_unless_it_is_larger() -> None:
    assert ModelConfig().resolve(300).vocab_size == 300
    assert ModelConfig(vocab_size=320).resolve(300).vocab_size == 320
    with pytest.raises(ValueError, match=r"at least the tokenizer's 300, got 299; leave it out"):
        ModelConfig(vocab_size=299).resolve(300)


def test_a_pinned_section_says_every_key() -> None:
    section = ModelConfig(preset="gpt2", n_layers=2, use_flash=False)
    cfg = section.resolve(300)
    pinned = section.pinned(cfg)
    unset = [key for key, value in dataclasses.asdict(pinned).items() if value is None]
    assert unset == ["init_from"]  # random weights
    assert pinned.resolve(300) == cfg


def test_rows_of_a_step() -> None:
    assert TrainConfig(tokens_per_step=96, micro_batch=3).rows(16) == 6
    for change, message in [
        ({"tokens_per_step": 90}, r"multiple of model.context_length \(16\), got 90"),
        ({"tokens_per_step": 8}, "multiple of model.context_length"),
        ({"tokens_per_step": 96, "micro_batch": 4}, "divide the 6 sequences of a step, got 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            TrainConfig(**change).rows(16)
