"""The trainer as a library. pytest tests/train/test_trainer.py"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashgpt import orchestrator
from flashgpt.data.prepare import prepare
from flashgpt.data.shards import TokenData
from flashgpt.runconfig import RunConfig
from flashgpt.toml import load_toml

Cli = Callable[..., Any]


def test_a_step_is_timed_without_a_run(run: RunConfig, data: TokenData) -> None:
    cfg = run.model.resolve(data.vocab_size)
    trainer = orchestrator.assemble(cfg, data.tokenizer, run.train).trainer
    assert 0 < trainer.time_step(data, 1e-9) < 60


def test_after_training_every_forward_draws_anew(
    tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_toml(trained.folder / "config.toml")
    changed = dataclasses.replace(run, model=dataclasses.replace(run.model, drop_rate=0.5))
    data = TokenData.open(prepare(run.data))
    system, _ = orchestrator.train(changed, data, tmp_path / "run")
    model = system.model.train()
    ids = torch.arange(16)[None]
    assert not torch.equal(model(ids), model(ids))


def test_what_cannot_be_evaluated_at_the_end_is_refused_at_the_start(
    tmp_path: Path, cli: Callable[..., Any]
) -> None:
    np.arange(2000, dtype=np.uint16).clip(max=256).tofile(tmp_path / "train.bin")
    np.zeros(1, np.uint16).tofile(tmp_path / "val.bin")
    command = ("train", "--data.source", tmp_path / "train.bin", "--data.tokenizer", "bytes")
    places = ("--data.cache", tmp_path / "cache", "--out", tmp_path / "run")
    assert "validation must have at least 2 tokens" in cli(*command, *places).error(1)
    assert not (tmp_path / "run").exists()
