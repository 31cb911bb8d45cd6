"""The sections of a run's config: units, types, ranges. pytest tests/test_runconfig.py"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from flashgpt.config import GPTConfig
from flashgpt.fields import documented_fields
from flashgpt.runconfig import DataConfig, ModelConfig, SampleConfig, TrainConfig

CFG = dict(vocab_size=97, context_length=8, emb_dim=12, n_heads=3, n_layers=2, drop_rate=0.1)
SECTIONS = (ModelConfig, DataConfig, TrainConfig, SampleConfig)


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
        (TrainConfig, {"stop_at": 1001}, r"train.stop_at must be at most steps \(1000\), got 1001"),
        (TrainConfig, {"precision": "fp8"}, "train.precision must be one of auto, fp32, bf16"),
        (SampleConfig, {"max_new_tokens": 0}, "sample.max_new_tokens must be at least 1"),
        (SampleConfig, {"temperature": -0.1}, "sample.temperature must not be negative"),
        (SampleConfig, {"top_k": -1}, "sample.top_k must not be negative"),
        (SampleConfig, {"top_p": 0.0}, r"sample.top_p must be in \(0, 1\]"),
        (SampleConfig, {"min_p": 1.1}, r"sample.min_p must be in \(0, 1\]"),
        (SampleConfig, {"seed": 2**63}, r"sample.seed must be in \[0, 2\^63\)"),
        (SampleConfig, {"stop": ("a", "")}, "sample.stop must hold texts that are not empty"),
        (SampleConfig, {"stop_ids": (3, -1)}, "sample.stop_ids must not be negative, got -1"),
        (SampleConfig, {"past_context": "wrap"}, "sample.past_context must be one of stop, slide"),
    ],
)
def test_a_section_out_of_range_is_refused(cls: type, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**change)


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
