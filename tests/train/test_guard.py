"""The guard: what it refuses, and what becomes of a run then. pytest tests/train/test_guard.py"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashgpt.model.gpt2 import GPTModel
from flashgpt.train import guard, runtime, step
from flashgpt.train.guard import Guard, Verdict
from flashgpt.train.optimizer import Optimizer
from flashgpt.train.step import dropout_seed

Cli = Callable[..., Any]
CPU = torch.device("cpu")


def verdict(found: Guard, loss: float, norm: float) -> Verdict:
    """The verdict on a step; `refused` must say the same."""
    refused, report = found.judge(torch.tensor(loss), torch.tensor(norm))
    made = Verdict(int(report[0]))
    assert refused.dtype == torch.float32 and refused == (made != Verdict.ACCEPTED)
    return made


def by_definition(steps: Iterable[tuple[float, float]], zscore: float, window: int) -> list[bool]:
    """Which steps are bad, written down once more, from the list of all accepted ones."""
    accepted: list[tuple[float, float]] = []
    bad = []
    for loss, norm in steps:
        value = (loss, math.log(norm) if norm > 0 else -700.0)
        is_bad = not (math.isfinite(loss) and math.isfinite(norm))
        if len(accepted) >= window and not is_bad and zscore:
            past = np.array(accepted[-window:])
            spread = np.maximum(past.std(0), guard.SPREAD)
            is_bad = bool((((np.array(value) - past.mean(0)) / spread) > zscore).any())
        bad.append(is_bad)
        if not is_bad:
            accepted.append(value)
    return bad


numbers = st.sampled_from([1.0, 1.25, 1.5, 2.0, 4.0, 16.0, 256.0, math.nan, math.inf])


@given(steps=st.lists(st.tuples(numbers, numbers), max_size=30), zscore=st.sampled_from([0, 3.0]))
def test_the_verdict_is_that_of_the_definition(
    steps: list[tuple[float, float]], zscore: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "WINDOW", 4)
        judge = Guard(CPU, zscore, scaled=False)
        found = []
        for loss, norm in steps:
            found.append(verdict(judge, loss, norm) == Verdict.BAD)
            judge.release()
    assert found == by_definition(steps, zscore, 4)


def test_a_bad_step_holds_back_all_behind_it_and_leaves_no_trace() -> None:
    held, plain = Guard(CPU, 8, scaled=True), Guard(CPU, 8, scaled=True)
    held.set_scale(1), plain.set_scale(1)
    for judge in (held, plain):
        assert verdict(judge, 3.0, 1.0) == Verdict.ACCEPTED
    assert verdict(held, math.nan, 1.0) == Verdict.BAD
    for loss in (2.0, math.inf):
        assert verdict(held, loss, 1.0) == Verdict.HELD
    held.release()
    mine, others = held.state_tensors(), plain.state_tensors()
    assert all(torch.equal(mine[name], others[name]) for name in mine | others)
    assert verdict(held, 2.0, 1.0) == Verdict.ACCEPTED


def test_an_overflow_halves_the_scale_and_finite_steps_double_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guard, "GROWTH_STEPS", 3)
    judge = Guard(CPU, 8, scaled=True)
    scales = []
    for norm in (math.inf, 1, 1, math.nan, 1, 1, 1, 1):
        finite = math.isfinite(norm)
        assert verdict(judge, 3.0, norm) == (Verdict.ACCEPTED if finite else Verdict.OVERFLOW)
        scales.append(float(judge.loss_scale) / guard.FIRST_SCALE)  # type: ignore[arg-type]
    assert scales == [0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.5, 0.5]
    judge.set_scale(1)
    assert verdict(judge, 3.0, math.inf) == Verdict.BAD  # a smaller scale would not help


def test_the_state_goes_from_one_guard_to_the_next() -> None:
    first, second = Guard(CPU, 8, scaled=True), Guard(CPU, 8, scaled=True)
    for loss in (3.0, math.inf, 2.0):
        verdict(first, loss, 1.5)
    first.in_a_row = 2
    second.load_state_tensors(first.state_tensors())
    again = second.state_tensors()
    assert all(torch.equal(first.state_tensors()[name], again[name]) for name in again)
    assert float(again["scale"]) == guard.FIRST_SCALE / 2 and int(again["in_a_row"]) == 2
    second.load_state_tensors({})
    assert int(second.state_tensors()["accepted"]) == 2
    stopped = {**again, "in_a_row": torch.tensor(guard.LIMIT_IN_A_ROW)}
    second.load_state_tensors(stopped)
    assert second.in_a_row == 0  # a run that the guard ended may try again
    assert int(second.state_tensors()["accepted"]) == 0
    second.load_state_tensors(again)
    first.set_scale(1)
    second.load_state_tensors(first.state_tensors())
    assert float(second.loss_scale) == 1  # type: ignore[arg-type]
    fp32 = Guard(CPU, 8, scaled=False)
    fp32.load_state_tensors(again)
    assert fp32.loss_scale is None


def test_its_memory_stays_where_it_is() -> None:
    judge, other = Guard(CPU, 8, scaled=True), Guard(CPU, 8, scaled=True)
    names = ("history", "accepted", "scale", "finite_steps")

    def addresses() -> list[int]:
        tensors = judge.state_tensors()
        held = judge._held
        return [tensors[name].data_ptr() for name in names] + [held.data_ptr()]

    before = addresses()
    for loss in (3.0, math.inf, 2.0):
        verdict(judge, loss, 1.0)
    judge.set_scale(1)
    assert verdict(judge, math.nan, 1.0) == Verdict.BAD
    judge.release()
    judge.forget()
    verdict(other, 3.0, 1.0)
    judge.load_state_tensors(other.state_tensors())
    assert addresses() == before
    mine, others = judge.state_tensors(), other.state_tensors()
    assert all(torch.equal(mine[name], others[name]) for name in mine | others)
    verdict(judge, 2.0, 1.0)
    assert int(others["accepted"]) == 1  # what was loaded is a copy


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[GPTModel]]:
    """poison({5: nan}): in the forward pass of step 5 the loss is multiplied by nan."""

    def start(factors: dict[int, float]) -> list[GPTModel]:
        models: list[GPTModel] = []
        by_seed = {dropout_seed(1337, at): factor for at, factor in factors.items()}

        def compiled(model: GPTModel, *_: object) -> Callable[[Tensor, Tensor], Tensor]:
            models.append(model)

            def forward(ids: Tensor, targets: Tensor) -> Tensor:
                loss: Tensor = model(ids, targets)
                factor = by_seed.get(int(model.dropout_seed), 1.0)
                if factor == -1:  # a loss as it should be, but a gradient of NaN
                    return loss + (model.wte.weight[0, 0] * 0).sqrt()
                return loss * factor

            return forward

        monkeypatch.setattr(runtime, "compiled", compiled)
        return models

    return start


@pytest.mark.parametrize("factor", [math.nan, math.inf, -1])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_bad_step_never_reaches_the_weights(
    factor: float,
    kind: str,
    tmp_path: Path,
    train: Callable[..., Any],
    poison: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run is that of which the optimizer left out step 5, and the log says so."""
    poison({5: factor})
    run = train(tmp_path / "run", "--train.optimizer", kind)
    calls = iter(range(100))
    update = Optimizer.step

    def without(self: Optimizer, refused: Tensor | None = None) -> None:
        if next(calls) != 5:
            update(self)

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", without)
        poison({})
        reference = train(tmp_path / "reference", "--train.optimizer", kind)
    assert run.same_as(reference)
    assert [entry["step"] for entry in run.metrics] == list(range(1, 13))
    bad = run.metrics[5]
    wrong = "grad_norm" if factor == -1 else "loss"
    assert "skipped" in bad and not math.isfinite(bad[wrong])
    written = (run.folder / "metrics.jsonl").read_text().splitlines()[5]
    if factor != math.inf:
        assert f'"{wrong}": NaN' in written
    assert sum("skipped" in entry for entry in run.metrics) == 1
    assert not reference.same_as(train(tmp_path / "whole", "--train.optimizer", kind))


def test_a_run_that_runs_ahead_of_its_device_ends_in_the_same_place(
    tmp_path: Path,
    train: Callable[..., Any],
    poison: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poison({1: math.nan, 5: math.nan, 6: math.nan, 9: -1})
    waits = train(tmp_path / "waits")
    monkeypatch.setitem(step.AHEAD, "cpu", 2)
    ahead = train(tmp_path / "ahead")
    assert ahead.same_as(waits)
    assert repr(ahead.metrics) == repr(waits.metrics)  # NaN is not equal to itself
    assert [path.name for path in (ahead.folder / "incidents").iterdir()] == [
        path.name for path in (waits.folder / "incidents").iterdir()
    ]


def test_three_bad_steps_in_a_row_end_the_run_and_nothing_is_lost(
    tmp_path: Path, cli: Cli, options: list[str], poison: Callable[..., Any], trained: Any
) -> None:
    models = poison({5: math.nan, 6: math.nan, 7: -1})
    refused = cli("train", *options, "--out", tmp_path / "a run").error(1)
    assert "step 8: gradient norm is nan, the 3rd bad step in a row" in refused
    saved = tmp_path / "a run" / "checkpoints" / "step_00000008"
    replay = f"--replay '{tmp_path / 'a run' / 'incidents' / 'step_00000008'}'"
    assert str(saved) in refused and replay in refused
    run = type(trained)(tmp_path / "a run")
    weights = dict(models[0].named_parameters())
    assert torch.equal(weights["wpe.weight"], run.tensors(8)["transformer.wpe.weight"])
    assert len(run.metrics) == 8 and (run.folder / "loss.png").exists()
    poison({})
    shown = cli("train", "--resume", "--out", run.folder).done()
    assert f"goes on from {saved}" in shown and len(run.metrics) == 12


def test_bad_steps_are_counted_across_a_resume(
    tmp_path: Path, cli: Cli, options: list[str], poison: Callable[..., Any]
) -> None:
    poison({5: math.nan, 6: math.nan, 7: math.nan})
    cli("train", *options, "--out", tmp_path / "run", "--train.stop-at", 7).done()
    refused = cli("train", "--resume", "--out", tmp_path / "run").error(1)
    assert "step 8: loss is nan, the 3rd bad step" in refused


def test_a_rollback_goes_back_to_earlier_weights_and_past_the_batches(
    tmp_path: Path, train: Callable[..., Any], cli: Cli, poison: Callable[..., Any]
) -> None:
    poison({5: math.nan, 6: math.nan, 7: math.nan})
    back = ("--train.guard", "rollback")
    whole = train(tmp_path / "whole", *back)
    assert torch.equal(
        whole.tensors(8)["transformer.wpe.weight"], whole.tensors(4)["transformer.wpe.weight"]
    )
    for name in ("state.json", "checkpoints/step_00000012/trainer/state.json"):
        assert json.loads((whole.folder / name).read_text())["skipped"] == [[4, 8]]
    halves = train(tmp_path / "halves", *back, "--train.stop-at", 10)
    cli("train", "--resume", "--out", halves.folder).done()
    assert halves.same_as(whole)
    assert json.loads((halves.folder / "state.json").read_text())["skipped"] == [[4, 8]]


def test_without_an_earlier_checkpoint_a_rollback_is_the_end(
    tmp_path: Path, cli: Cli, options: list[str], poison: Callable[..., Any]
) -> None:
    poison({0: math.nan, 1: math.nan, 2: math.nan})
    command = ("train", *options, "--out", tmp_path / "run", "--train.guard", "rollback")
    assert "step 3: loss is nan, the 3rd bad step" in cli(*command).error(1)


def test_no_checkpoint_falls_into_a_row_of_bad_steps(
    tmp_path: Path, train: Callable[..., Any], poison: Callable[..., Any]
) -> None:
    """One that replaced the last good one would hold weights that a rollback wants to leave."""
    poison({6: math.nan, 7: math.nan, 8: math.nan})
    few = ("--train.keep-checkpoints", 1, "--train.eval-every", 0)
    run = train(tmp_path / "run", "--train.guard", "rollback", *few)
    assert json.loads((run.folder / "state.json").read_text())["skipped"] == [[4, 9]]


def test_three_rollbacks_are_the_most(
    tmp_path: Path, cli: Cli, options: list[str], poison: Callable[..., Any]
) -> None:
    poison(dict.fromkeys([*range(5, 8), *range(9, 12), *range(13, 16), *range(17, 20)], math.nan))
    command = ("train", *options, "--out", tmp_path / "run", "--train.guard", "rollback")
    assert "step 20: loss is nan" in cli(*command, "--train.steps", 30).error(1)
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert [end for _, end in state["skipped"]] == [8, 12, 16]


def test_a_run_with_another_dropout_has_another_idea_of_what_is_usual(
    tmp_path: Path, train: Callable[..., Any], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "WINDOW", 4)
    monkeypatch.setattr(guard, "SPREAD", (1e-3, 1e-3))
    run = train(tmp_path / "run", "--train.guard-zscore", 0)
    command = ("train", "--resume", "--out", run.folder, "--train.steps", 14)
    shown = cli(*command, "--model.drop-rate", 0.9, "--train.guard-zscore", 8).done()
    assert "model.drop_rate is 0.9 from here on, was 0.1" in shown
    assert not any("skipped" in entry for entry in run.metrics)


def test_a_spike_is_left_out_unless_the_guard_looks_at_finiteness_only(
    tmp_path: Path,
    train: Callable[..., Any],
    poison: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guard, "WINDOW", 32)
    poison({1: 50.0, guard.WINDOW + 2: 50.0})
    long = ("--train.steps", guard.WINDOW + 4, "--train.eval-every", 0)
    run = train(tmp_path / "run", *long)
    skipped = {entry["step"]: entry["skipped"] for entry in run.metrics if "skipped" in entry}
    assert list(skipped) == [guard.WINDOW + 3]  # the first WINDOW steps have nothing to go by
    assert "standard deviations above" in skipped[guard.WINDOW + 3]
    loose = train(tmp_path / "loose", *long, "--train.guard-zscore", 0)
    assert not any("skipped" in entry for entry in loose.metrics)
