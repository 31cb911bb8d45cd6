"""One measured step: what it holds, what it leaves, and that it is the trainer's.

No assertion here depends on a time. pytest tests/measure/test_step_sample.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from flashgpt.config import GPTConfig
from flashgpt.measure import step_sample
from flashgpt.measure.memory_model import peak_at
from flashgpt.measure.step_sample import Measured, measure
from flashgpt.runconfig import TrainConfig
from flashgpt.train import parts, runtime, step
from flashgpt.train.guard import Guard

CPU = torch.device("cpu")
CFG = GPTConfig(96, 16, 32, 2, 2, 0.1)
TRAIN = TrainConfig(tokens_per_step=16 * 16, compile="off")
WEIGHTS = 4 * sum(p.numel() for p in step_sample.GPTModel(CFG).parameters())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_sample, "TIMED_SECONDS", 0.0)


def sample(rows: int, *, use_flash: bool = True, **train: Any) -> Measured:
    changed = dataclasses.replace(TRAIN, micro_batch=rows, **train)
    return measure(dataclasses.replace(CFG, use_flash=use_flash), changed, CPU)


@pytest.mark.parametrize("use_flash", [True, False])
@pytest.mark.parametrize("again", [True, False])
def test_memory_of_a_large_micro_batch_follows_from_small_ones(
    use_flash: bool, again: bool
) -> None:
    """Within 5 %, without accumulation too; torch's own account, so nothing of it is chance."""
    small = [sample(rows, use_flash=use_flash, activation_checkpointing=again) for rows in (2, 4)]
    wanted = sample(16, use_flash=use_flash, activation_checkpointing=again)
    found = peak_at(small, 16, wanted.logits_bytes, wanted.gradients_bytes)
    assert found == pytest.approx(wanted.peak_bytes, rel=0.05)
    accumulating = peak_at(small, 16, wanted.logits_bytes, WEIGHTS)
    assert accumulating != pytest.approx(wanted.peak_bytes, rel=0.05)
    samples = [*small, wanted]
    assert [s.gradients_bytes for s in samples] == [WEIGHTS, WEIGHTS, 0]
    names = ["blocked"] if use_flash else ["standard"]
    assert all(s.kernels == names and not s.graph and s.seconds > 0 for s in samples)
    assert all(s.peak_bytes > 4 * WEIGHTS for s in samples)


def test_recomputed_blocks_take_less_and_standard_attention_more() -> None:
    usual, standard = sample(8), sample(8, use_flash=False)
    recomputed = sample(8, activation_checkpointing=True)
    assert recomputed.peak_bytes < usual.peak_bytes < standard.peak_bytes


def test_the_step_is_the_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches of the right shape, all of a small step's, judged by the guard."""
    seen: list[list[torch.Size]] = []
    judged: list[int] = []
    backward, judge = step.backward, Guard.judge

    def watched(made: parts.Parts, forward: Any, micros: Any, seed: Any) -> Any:
        micros = list(micros)
        seen.append([micro.ids_BT.shape for micro in micros])
        return backward(made, forward, micros, seed)

    monkeypatch.setattr(step, "backward", watched)
    monkeypatch.setattr(Guard, "judge", lambda *args: judged.append(1) or judge(*args))
    monkeypatch.setattr(step_sample, "STEP_SECONDS", 1e9)  # no step is so slow
    monkeypatch.setattr(step_sample, "SLOW_SECONDS", 1e9)
    found = sample(4)
    assert found.micro_batches == 4 and set(map(tuple, seen)) == {
        (torch.Size([4, 16]),) * 2,  # memory
        (torch.Size([4, 16]),) * 4,  # time
    }
    assert len(judged) == len(seen)
    monkeypatch.setattr(step_sample, "STEP_SECONDS", 0.0)
    assert sample(4).micro_batches == 2
    monkeypatch.setattr(step_sample, "SLOW_SECONDS", 0.0)  # all are: a first, one, one watched
    judged.clear()
    assert sample(4).seconds > 0 and len(judged) == 3


def test_a_slow_first_step_is_not_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cold one, which loads kernels and makes the optimizer's state."""
    completed = step.Stepper.completed
    cold: list[float] = [1e3]

    def first_is_slow(*args: Any) -> Iterator[step.Done]:
        for done in completed(*args):
            yield dataclasses.replace(done, seconds=cold.pop() if cold else 0.5)

    monkeypatch.setattr(step.Stepper, "completed", first_is_slow)
    found = sample(4)
    assert (found.seconds, found.micro_batches) == (0.5 / 4, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("use_flash", [True, False])
def test_memory_on_a_gpu_follows_from_small_micro_batches_too(use_flash: bool) -> None:
    """Where torch's allocator hands out blocks, and the logits stop growing."""
    cfg = GPTConfig(8192, 256, 256, 4, 4, 0.0, use_flash=use_flash)
    train = dataclasses.replace(TRAIN, tokens_per_step=128 * 256, device="cuda")
    small_1, small_2, large = (
        measure(cfg, dataclasses.replace(train, micro_batch=rows), torch.device("cuda"))
        for rows in (8, 16, 128)
    )
    found = peak_at([small_1, small_2], 128, large.logits_bytes, large.gradients_bytes)
    assert found == pytest.approx(large.peak_bytes, rel=0.05)


def test_what_is_compiled_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def compiled(model: Any, config: TrainConfig, note: Callable[[str], None]) -> Any:
        note(f"compiles {config.micro_batch}")
        return lambda *args: calls.append(1) or model(*args)

    monkeypatch.setattr(runtime, "compiled", compiled)
    notes: list[str] = []
    measure(CFG, dataclasses.replace(TRAIN, micro_batch=8), CPU, notes.append)
    assert notes == ["compiles 8"] and calls
