"""Which sizes are measured, in which order, what is left out and why, and which one is chosen.

Measurements are made up here, those of test_step_sample.py are real; time is counted, not waited
for. pytest tests/measure/test_plan.py
"""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch

from flashgpt.config import GPTConfig
from flashgpt.measure import plan, step_sample
from flashgpt.measure.plan import DOES_NOT_FIT, NO_TIME, WAYS, Setup, Way, measure
from flashgpt.measure.step_sample import Measured
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import TrainConfig

CPU = torch.device("cpu")
CFG = GPTConfig(96, 16, 32, 2, 2, 0.0)
TRAIN = TrainConfig(tokens_per_step=16 * 64, compile="off")
LIMIT = 10**6
ON, OFF, ON_AGAIN, OFF_AGAIN = WAYS


@dataclasses.dataclass
class Machine:
    """Stands for the machine: bytes a row by way, and seconds that go by for each measurement."""

    bytes_a_row: dict[Way, int]
    cost: float = 1.0
    holds: int = LIMIT
    now: float = 0.0
    asked: list[tuple[Way, int]] = dataclasses.field(default_factory=list)

    def measure(self, cfg: GPTConfig, train: TrainConfig, device: Any, note: Any) -> Measured:
        way, rows = Way(cfg.use_flash, train.activation_checkpointing), train.micro_batch or 0
        self.asked.append((way, rows))
        self.now += self.cost
        logits, gradients = _setup().off_the_line(rows)
        peak = 1000 + self.bytes_a_row[way] * rows + logits + gradients
        if peak > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seconds = 1e-3 + 1e-4 * rows * (2 if train.activation_checkpointing else 1)
        return Measured(
            rows, peak, peak - logits, logits, gradients, seconds, 2, ["x"], False, 0.5 * self.cost
        )


def _setup(**changes: Any) -> Setup:
    usual: dict[str, Any] = dict(limit_bytes=LIMIT, margin=0.1, seconds=1000.0)
    return Setup(CFG, TRAIN, CPU, **{**usual, **changes})


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(dict.fromkeys(WAYS, 1000))
    monkeypatch.setattr(step_sample, "measure", made.measure)
    monkeypatch.setattr(plan.time, "monotonic", lambda: made.now)
    monkeypatch.setitem(plan.FIRST_TOKENS, "cpu", 16 * 8)
    return made


def test_sizes_divide_a_step_and_double_at_least() -> None:
    assert _setup().sizes == [1, 2, 4, 8, 16, 32, 64]
    odd = dataclasses.replace(TRAIN, tokens_per_step=16 * 45)
    assert dataclasses.replace(_setup(), train=odd).sizes == [1, 3, 9, 45]


def test_what_decides_is_measured_first_and_predicted_before(machine: Machine) -> None:
    found = measure(_setup())
    assert machine.asked[:6] == [(ON, 8), (ON, 16), (ON, 64), (OFF, 8), (OFF, 16), (OFF, 64)]
    assert machine.asked[12:16] == [(ON, 32), (ON, 4), (ON, 2), (ON, 1)]
    assert len(found.rows) == len(set(machine.asked)) == 4 * 7 and not found.missing
    assert [row.micro_batch for row in found.rows[:7]] == [1, 2, 4, 8, 16, 32, 64]
    for row in found.rows:
        tokens = row.micro_batch * 16
        assert row.tokens_per_second == pytest.approx(tokens / row.sample.seconds)
        if row.micro_batch >= 32:
            assert row.predicted_peak_bytes == pytest.approx(row.peak_bytes)
            assert row.predicted_tokens_per_second == pytest.approx(row.tokens_per_second)
        else:
            assert row.predicted_peak_bytes is None
    best = found.best
    assert best is not None and (best.way, best.micro_batch) == (ON, 64)


def test_the_margin_stays_free(machine: Machine) -> None:
    machine.bytes_a_row[ON] = 10_000
    found = measure(_setup(margin=0.4))
    rows = {row.micro_batch: row for row in found.rows if row.way == ON}
    assert machine.asked[:4] == [(ON, 8), (ON, 16), (OFF, 8), (OFF, 16)]  # 16 is the largest
    assert rows[16].fits and not rows[32].fits and 64 not in rows
    reasons = {(m.way, m.micro_batch): m.reason for m in found.missing}
    assert reasons == {(ON, 64): DOES_NOT_FIT}
    assert found.best is not None and found.best.way == OFF


def test_out_of_memory_ends_a_way_and_is_no_error(machine: Machine) -> None:
    machine.bytes_a_row[OFF] = 200_000
    found = measure(_setup())
    assert [row.micro_batch for row in found.rows if row.way == OFF] == [1, 2, 4]
    refused = [m for m in found.missing if m.way == OFF]
    assert [(m.micro_batch, m.reason) for m in refused] == [
        (size, DOES_NOT_FIT) for size in (8, 16, 32, 64)
    ]
    assert [size for way, size in machine.asked if way == OFF] == [8, 4, 2, 1]
    expected = 1000 + 200_000 * 64 + sum(_setup().off_the_line(64))
    assert refused[-1].predicted_peak_bytes == pytest.approx(expected)


def test_when_the_time_is_up_the_rest_is_predicted(machine: Machine) -> None:
    ticks: list[tuple[int, int]] = []
    found = measure(_setup(seconds=8.0), progress=lambda *tick: ticks.append(tick))
    assert machine.now <= 8 and ticks[0] == (0, 8) and ticks[-1] == (8, 8)
    assert ticks == sorted(ticks)
    assert len(found.rows) + len(found.missing) == 4 * 7
    assert {m.reason for m in found.missing} == {NO_TIME}
    between = next(m for m in found.missing if (m.way, m.micro_batch) == (ON, 32))
    assert between.predicted_peak_bytes is not None
    assert between.predicted_tokens_per_second is not None


def test_nothing_fits(machine: Machine) -> None:
    machine.holds = 0
    found = measure(_setup())
    assert not found.rows and found.best is None
    assert {m.reason for m in found.missing} == {DOES_NOT_FIT}


def test_a_fault_of_the_step_is_not_hidden(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Measured:
        raise RuntimeError("bug")

    monkeypatch.setattr(step_sample, "measure", broken)
    with pytest.raises(RuntimeError, match="bug"):
        measure(_setup())


def test_a_model_that_does_not_fit_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real models, of which one at most is there at a time, though a large batch breaks off."""
    monkeypatch.setattr(step_sample, "TIMED_SECONDS", 0.0)
    alive: list[weakref.ref[GPTModel]] = []
    most = 0
    build, forward = step_sample.parts.build, GPTModel.forward

    def counted(model: GPTModel, *rest: Any) -> Any:
        nonlocal most
        alive.append(weakref.ref(model))
        most = max(most, sum(model() is not None for model in alive))
        return build(model, *rest)

    def full(self: GPTModel, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(ids) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, ids, *rest)

    monkeypatch.setattr(step_sample.parts, "build", counted)
    monkeypatch.setattr(GPTModel, "forward", full)
    monkeypatch.setattr(plan, "WAYS", WAYS[:1])
    found = measure(_setup(limit_bytes=10**9))
    assert [row.micro_batch for row in found.rows] == [1, 2, 4, 8, 16]
    assert [m.micro_batch for m in found.missing] == [32, 64]
    gc.collect()
    assert most == 1 and not any(model() is not None for model in alive)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"margin": 1.0}, r"margin must be in \[0, 1\), got 1"),
        ({"limit_bytes": 0}, "memory must be positive, got 0"),
        ({"seconds": 0.0}, "seconds must be positive and finite, got 0"),
    ],
)
def test_a_setup_that_cannot_be_measured(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        _setup(**changes)
