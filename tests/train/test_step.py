"""One step: the same for any micro-batches. pytest tests/train/test_step.py"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flashgpt import orchestrator
from flashgpt.data.batches import Batches
from flashgpt.data.prepare import prepare
from flashgpt.data.shards import TokenData
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import RunConfig, TrainConfig
from flashgpt.train.feed import Feed
from flashgpt.train.loop import Listener
from flashgpt.train.step import dropout_seed
from flashgpt.train.trainer import Trainer

Cli = Callable[..., Any]


def _double(run: RunConfig, data: TokenData, out: Path, micro: int | None) -> Any:
    """Trains in float64; losses and weights."""
    section = TrainConfig(**{**vars(run.train), "micro_batch": micro})
    torch.manual_seed(section.seed)
    cfg = run.model.resolve(data.vocab_size)
    model = GPTModel(cfg).double()
    losses: list[float] = []
    trainer = Trainer(model, data.tokenizer, section)
    trainer.fit(data, out, run, listener=Listener(step=lambda e: losses.append(e["loss"])))
    return losses, [p.detach() for p in model.parameters()]


def test_micro_batches_make_the_same_step(
    tmp_path: Path, run: RunConfig, data: TokenData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Budget: float64 sums of up to 128 terms in another order err by 128 roundings, 3e-14, of
    the largest gradient. AdamW divides by |gradient| + 1e-8, so of a gradient near zero that error
    may become 3e-6 of the rate: 3 steps at 1e-2 make 1e-7. Losses are logged as sums of up to 4
    float32: 4 roundings. Other masks or other rows change both by more than 1e-3.
    """
    losses, weights = _double(run, data, tmp_path / "whole", None)
    for micro in (1, 2):
        found, moved = _double(run, data, tmp_path / f"micro{micro}", micro)
        for a, b in zip(losses, found, strict=True):
            assert abs(a - b) <= 4 * 2**-24 * a
        assert max((a - b).abs().max() for a, b in zip(weights, moved, strict=True)) <= 1e-7
    set_dropout = GPTModel.set_dropout
    monkeypatch.setattr(
        GPTModel, "set_dropout", lambda self, seed, row=0: set_dropout(self, seed, 0)
    )
    found, moved = _double(run, data, tmp_path / "masks", 1)
    assert max(abs(a - b) for a, b in zip(losses, found, strict=True)) > 1e-3
    assert max((a - b).abs().max() for a, b in zip(weights, moved, strict=True)) > 1e-3


def test_micro_batches_weigh_as_many_targets_as_they_count(
    tmp_path: Path, run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of other lengths in every row; budgets as above."""
    rng = random.Random(1)
    pairs = [
        {"prompt": "p" * rng.randrange(1, 40), "completion": "c" * rng.randrange(1, 40)}
        for _ in range(200)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    source = dataclasses.replace(run.data, source=(str(tmp_path / "pairs.jsonl"),))
    run = dataclasses.replace(run, data=source)
    data = TokenData.open(prepare(source))
    losses, weights = _double(run, data, tmp_path / "whole", None)
    found, moved = _double(run, data, tmp_path / "micro", 1)
    assert max(abs(a - b) for a, b in zip(losses, found, strict=True)) <= 4 * 2**-24 * 6
    assert max((a - b).abs().max() for a, b in zip(weights, moved, strict=True)) <= 1e-7
    take = Feed.take
    monkeypatch.setattr(
        Feed,
        "take",
        lambda self, step: [dataclasses.replace(m, weight=0.25) for m in take(self, step)],
    )
    found, moved = _double(run, data, tmp_path / "alike", 1)
    assert max(abs(a - b) for a, b in zip(losses, found, strict=True)) > 1e-3


def _single(run: RunConfig, data: TokenData, out: Path, micro: int | None) -> list[float]:
    """The losses of 100 steps in float32, without dropout."""
    model = dataclasses.replace(run.model, drop_rate=0.0)
    train = dataclasses.replace(run.train, steps=100, lr=3e-3, micro_batch=micro)
    run = dataclasses.replace(run, model=model, train=train)
    losses: list[float] = []
    listener = Listener(step=lambda entry: losses.append(entry["loss"]))
    orchestrator.train(run, data, out, listener=listener)
    return losses


def test_a_hundred_steps_drift_no_further_than_those_of_permuted_rows(
    tmp_path: Path, run: RunConfig, data: TokenData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training amplifies rounding: the control is the same batch with its rows in another order.
    Limit: three times its largest drift. A weight that is one percent off is far outside."""
    losses = _single(run, data, tmp_path / "whole", None)
    batch = Batches.batch
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "batch", lambda *rows: [x[::-1].copy() for x in batch(*rows)])
        control = _single(run, data, tmp_path / "control", None)

    def drift(other: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(losses, other, strict=True))

    assert losses[-1] < 0.5 * losses[0]
    assert 0 < drift(control) < 1e-3
    for micro in (1, 2):
        assert drift(_single(run, data, tmp_path / f"micro{micro}", micro)) <= 3 * drift(control)
    replace = dataclasses.replace
    take = Feed.take
    monkeypatch.setattr(
        Feed,
        "take",
        lambda self, step: [
            replace(m, weight=m.weight * (1.01 if m.first_row else 0.99)) for m in take(self, step)
        ],
    )
    assert drift(_single(run, data, tmp_path / "wrong", 2)) > 3 * drift(control)


def test_every_step_draws_other_masks_from_the_seed() -> None:
    seeds = {dropout_seed(seed, step) for seed in range(3) for step in range(50)}
    assert len(seeds) == 150 and all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert dropout_seed(7, 3) == dropout_seed(7, 3)


def test_activation_checkpointing_changes_no_bit(
    tmp_path: Path, train: Callable[..., Any], trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    switched: list[bool] = []
    set_checkpointing = GPTModel.set_checkpointing
    monkeypatch.setattr(
        GPTModel,
        "set_checkpointing",
        lambda self, on: (switched.append(on), set_checkpointing(self, on)),
    )
    run = train(tmp_path / "run", "--train.activation-checkpointing", True)
    assert switched == [True]
    assert run.same_as(trained) and run.metrics == trained.metrics
