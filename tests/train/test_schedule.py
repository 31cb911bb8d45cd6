"""The learning rate, step by step. pytest tests/train/test_schedule.py"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashgpt.config import TrainConfig
from flashgpt.train.schedule import learning_rate, warmup_steps


def test_values_of_a_schedule() -> None:
    config = TrainConfig(steps=9, warmup_steps=4, lr=1.0, min_lr=0.2)
    rates = [learning_rate(step, config) for step in range(9)]
    half = 0.2 + 0.8 * 0.5
    quarter = 0.2 + 0.8 * 0.5 * (1 + math.sqrt(0.5))
    last = 0.2 + 0.8 * 0.5 * (1 - math.sqrt(0.5))
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, quarter, half, last, 0.2])
    assert learning_rate(50, config) == pytest.approx(0.2)  # past the end it stays


@pytest.mark.parametrize(("steps", "expected"), [(1, 1), (19, 1), (40, 2), (1000, 50)])
def test_warmup_is_a_twentieth_if_left_out(steps: int, expected: int) -> None:
    assert warmup_steps(TrainConfig(steps=steps)) == expected
    assert warmup_steps(TrainConfig(steps=steps, warmup_steps=0)) == 0


def test_without_warmup_it_starts_at_the_peak() -> None:
    assert learning_rate(0, TrainConfig(steps=3, warmup_steps=0, lr=0.5)) == 0.5
    assert learning_rate(0, TrainConfig(steps=1, lr=0.5)) == 0.5


def test_stopping_early_does_not_shorten_it(tmp_path: Path, train: Callable[..., Any]) -> None:
    run = train(tmp_path / "run", "--train.stop-at", 2)
    config = TrainConfig(steps=12, lr=1e-2)
    assert [entry["lr"] for entry in run.metrics] == [learning_rate(s, config) for s in range(2)]
