"""The learning rate, step by step. pytest tests/train/test_schedule.py"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgpt.runconfig import TrainConfig
from flashgpt.train.schedule import decay_steps, learning_rate, warmup_steps


def test_values_of_a_schedule() -> None:
    config = TrainConfig(steps=9, warmup_steps=4, lr=1.0, min_lr=0.2)
    rates = [learning_rate(step, config) for step in range(9)]
    half = 0.2 + 0.8 * 0.5
    quarter = 0.2 + 0.8 * 0.5 * (1 + math.sqrt(0.5))
    last = 0.2 + 0.8 * 0.5 * (1 - math.sqrt(0.5))
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, quarter, half, last, 0.2])
    assert learning_rate(50, config) == pytest.approx(0.2)  # past the end it stays


def test_values_of_warmup_stable_decay() -> None:
    config = TrainConfig(
        schedule="wsd", steps=10, warmup_steps=2, decay_steps=4, lr=1.0, min_lr=0.2
    )
    rates = [learning_rate(step, config) for step in range(12)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])


@st.composite
def configs(draw: st.DrawFn, schedule: Literal["cosine", "wsd", "constant"]) -> TrainConfig:
    steps = draw(st.integers(1, 200))
    warmup = draw(st.none() | st.integers(0, steps))
    decay = None
    if schedule == "wsd" and steps > (warmup or 0):
        decay = draw(st.none() | st.integers(1, steps - (warmup or 0)))
    return TrainConfig(
        schedule=schedule,
        steps=steps,
        warmup_steps=warmup,
        decay_steps=decay,
        lr=draw(st.floats(1e-6, 10)),
        min_lr=draw(st.floats(0, 1)),
    )


ANY = st.one_of(configs("cosine"), configs("wsd"), configs("constant"))


@settings(max_examples=300, deadline=None)
@given(config=ANY)
def test_it_rises_to_lr_never_above_and_falls_from_there(config: TrainConfig) -> None:
    rates = [learning_rate(step, config) for step in range(config.steps + 3)]
    warmup = warmup_steps(config)
    assert rates[:warmup] == sorted(rates[:warmup]) and all(rate > 0 for rate in rates[:warmup])
    after = rates[max(0, warmup - 1) :]
    assert after == sorted(after, reverse=True)
    assert max(rates) <= config.lr
    if warmup or decay_steps(config) < config.steps:  # else it decays from the first step on
        assert max(rates) == config.lr
    assert len(set(rates[-4:])) == 1  # past the end it stays


@settings(max_examples=300, deadline=None)
@given(config=st.one_of(configs("cosine"), configs("wsd")))
def test_the_last_step_has_exactly_min_lr(config: TrainConfig) -> None:
    if warmup_steps(config) < config.steps - (config.schedule == "cosine"):
        assert learning_rate(config.steps - 1, config) == config.min_lr * config.lr


@settings(max_examples=300, deadline=None)
@given(config=ANY)
def test_it_does_not_jump(config: TrainConfig) -> None:
    """Linear parts move by 1 / length of lr a step, the cosine by at most pi / 2 of that."""
    rates = [learning_rate(step, config) for step in range(config.steps)]
    warmup = warmup_steps(config)
    for step, (before, after) in enumerate(itertools.pairwise(rates), start=1):
        limit = 1 / warmup if step < warmup else math.pi / 2 / max(1, decay_steps(config))
        assert abs(after - before) <= limit * config.lr * (1 + 1e-9), step


def test_without_decay_it_is_constant() -> None:
    config = TrainConfig(schedule="constant", steps=9, warmup_steps=2, lr=0.5)
    assert [learning_rate(step, config) for step in range(9)] == [0.25, *[0.5] * 8]


@pytest.mark.parametrize(("steps", "decay"), [(1, 0), (2, 1), (4, 1), (1000, 200)])
def test_wsd_decays_in_the_last_fifth_if_left_out(steps: int, decay: int) -> None:
    assert decay_steps(TrainConfig(schedule="wsd", steps=steps)) == decay


def test_a_warmup_left_out_makes_room_for_the_decay() -> None:
    config = TrainConfig(schedule="wsd", steps=100, decay_steps=98, lr=1.0)
    assert warmup_steps(config) == 2 and decay_steps(config) == 98


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
