"""The trainer as a library. pytest tests/train/test_trainer.py"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
