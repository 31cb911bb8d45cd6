"""What the training benchmark measures, beside whom, and what it says of the rest.

No assertion here depends on a time. pytest tests/measure/test_bench_train.py
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashgpt.config import GPTConfig
from flashgpt.measure import bench_train as bench
from flashgpt.measure import clock, train_variants
from flashgpt.measure.bench_train import Result, Setup, measure
from flashgpt.measure.flops import flop_per_token
from flashgpt.measure.step_parts import PARTS
from flashgpt.measure.train_variants import HUGGING_FACE, OFF, ON, TRAIN, Variant, build
from flashgpt.model.gpt2 import GPTModel
from flashgpt.train import graph, runtime
from flashgpt.train.bare import BareStep

CPU = torch.device("cpu")
CFG = GPTConfig(96, 16, 32, 2, 1, 0.0, qkv_bias=True)
SETUP = Setup(CFG, 2, (0.0, 0.1), "off", True, steps=1, rounds=3, device=CPU)
MODELS = (ON, OFF, HUGGING_FACE)


@pytest.fixture(autouse=True)
def _small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(clock.PEAK_SIZE, "cpu", 64)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """In place of the compiler, which takes a minute; gets what was to be compiled."""
    seen: list[nn.Module] = []

    def compiled(model: nn.Module, **_: Any) -> Any:
        seen.append(model)
        return lambda *args, **kwargs: model(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(runtime, "cannot_compile", lambda device: None)
    return seen


def _setup(**changes: Any) -> Setup:
    return dataclasses.replace(SETUP, **changes)


def _reasons(found: Result) -> dict[tuple[str, bool, float], str]:
    return {(r.model, r.compiled, r.dropout): r.reason for r in found.refused}


@pytest.fixture(scope="module")
def found() -> Iterator[Result]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(clock.PEAK_SIZE, "cpu", 64)
        yield measure(SETUP)


def test_every_variant_is_measured(found: Result) -> None:
    kinds = [(row.model, row.compiled, row.dropout) for row in found.rows]
    assert kinds == [(model, False, p) for p in (0.0, 0.1) for model in MODELS]
    assert found.refused == [] and found.alternated
    kernels = {(row.model, row.dropout): row.kernels for row in found.rows}
    assert kernels[ON, 0.0] == ["sdpa:cpu"] and kernels[ON, 0.1] == ["blocked"]
    assert kernels[OFF, 0.0] == kernels[OFF, 0.1] == ["standard"]
    assert kernels[HUGGING_FACE, 0.1] == []


def test_numbers_of_a_row_agree(found: Result) -> None:
    model = GPTModel(CFG)
    assert found.parameters == model.n_parameters and found.tokens_per_step == 32
    assert found.flop_per_token == flop_per_token(model)
    for row in found.rows:
        assert 0 < row.ms_min <= row.ms <= row.ms_max and row.rounds == 3
        assert row.ms * row.tokens_per_second == pytest.approx(1e3 * 32)
        speed = found.flop_per_token * row.tokens_per_second
        assert row.mfu == pytest.approx(speed / found.peak_flop_per_second)
        assert tuple(row.parts) == PARTS and all(ms >= 0 for ms in row.parts.values())
        assert sum(row.parts.values()) == pytest.approx(row.ms)
        assert row.first_step_seconds > 0


@pytest.mark.parametrize("peaks", [(1e9, 4e9), (4e9, 1e9)])
def test_the_better_of_two_peaks_counts(
    peaks: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter(peaks)
    monkeypatch.setattr(bench, "device_peak", lambda *_: next(measured))
    found = measure(_setup(dropouts=(0.0,), peers=False))
    assert found.peak_flop_per_second == 4e9 and found.rows
    for row in found.rows:
        assert row.mfu == pytest.approx(found.flop_per_token * row.tokens_per_second / 4e9)


def test_memory_counts_weights_gradients_and_optimizer_state(found: Result) -> None:
    for row in found.rows:
        activations = row.peak_bytes - 4 * 4 * found.parameters
        assert 0 < activations < 4 * 4 * found.parameters, row


def test_the_peer_has_our_shape_and_our_optimizer() -> None:
    ours, theirs = (build(Variant(m, False, 0.1), CFG, CPU, None) for m in (ON, HUGGING_FACE))
    counts = [sum(p.numel() for p in step.model.parameters()) for step in (ours, theirs)]
    assert counts[0] == counts[1] == GPTModel(CFG).n_parameters
    config: Any = theirs.model.config
    assert config._attn_implementation == "sdpa" and theirs.model.training
    rates = {m.p for m in theirs.model.modules() if isinstance(m, nn.Dropout)}
    assert rates == {0.1} and config.attn_pdrop == 0.1
    sizes = []
    for step in (ours, theirs):
        (adamw,) = step.optimizer.parts
        assert adamw.defaults["fused"] and step.clip == TRAIN.grad_clip == 1.0
        assert {key: adamw.defaults[key] for key in ("lr", "betas", "eps")} == {
            "lr": TRAIN.lr,
            "betas": (TRAIN.beta1, TRAIN.beta2),
            "eps": 1e-8,
        }
        decays: dict[float, int] = {}
        for group in adamw.param_groups:
            count = sum(p.numel() for p in group["params"])
            decays[group["weight_decay"]] = decays.get(group["weight_decay"], 0) + count
        sizes.append(decays)
    assert sizes[0] == sizes[1] and set(sizes[0]) == {0.0, TRAIN.weight_decay}


def test_all_see_the_same_tokens_and_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    losses: dict[str, list[float]] = {}

    def watching(variant: Variant, *rest: Any) -> BareStep:
        step = build(variant, *rest)

        def forward(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
            seen.append((ids_BT, targets_BT))
            loss = step.forward(ids_BT, targets_BT)
            losses.setdefault(variant.model, []).append(loss.item())
            return loss

        return dataclasses.replace(step, forward=forward)

    monkeypatch.setattr(bench, "build", watching)
    measure(_setup(dropouts=(0.0,)))
    for ids, targets in seen:
        assert torch.equal(ids, seen[0][0]) and torch.equal(targets, seen[0][1])
        assert torch.equal(ids[:, 1:], targets[:, :-1]) and ids.shape == (2, 16)
    assert set(losses) == set(MODELS)
    for values in losses.values():
        assert values[-1] < values[0]
    # The same weights, drawn alike, on both settings of the switch.
    assert losses[ON] == pytest.approx(losses[OFF], rel=1e-4)


def test_eager_and_compiled_are_rows_of_their_own(compiler: list[nn.Module]) -> None:
    found = measure(_setup(compile="both", dropouts=(0.0,)))
    assert [(row.model, row.compiled) for row in found.rows] == [
        (model, compiled) for model in MODELS for compiled in (False, True)
    ]
    assert len(compiler) == 3 and isinstance(compiler[0], GPTModel)
    alone = measure(_setup(compile="on", dropouts=(0.0,)))
    assert [row.compiled for row in alone.rows] == [True] * 3


def test_compiled_steps_are_graphs_where_the_trainers_are(
    compiler: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain step stands in for the replay; what is captured again and again is no replay."""
    captures: list[object] = []

    class Stream:
        def run(self, call: Any) -> Any:
            return call()

        def capture(self, call: Any) -> Any:
            captures.append(call)
            if len(captures) == 2:
                raise RuntimeError("no")
            return call, None

    monkeypatch.setattr(graph, "Stream", Stream)
    monkeypatch.setattr(graph, "pays", lambda device, tokens, parameters: tokens == 32)
    found = measure(_setup(compile="both", dropouts=(0.1,)))
    assert [(row.compiled, row.graph) for row in found.rows] == [
        (False, False), (True, True), (False, False), (True, False), (False, False), (True, True)
    ]  # fmt: skip
    assert len(captures) == len(compiler) == 3
    for row in found.rows:
        assert sum(row.parts.values()) == pytest.approx(row.ms) and row.peak_bytes > 0


def test_without_a_compiler_compiled_rows_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "cannot_compile", lambda device: "no C++ compiler was found")
    found = measure(_setup(compile="both", dropouts=(0.0,)))
    assert [row.compiled for row in found.rows] == [False] * 3
    assert _reasons(found) == {(m, True, 0.0): "no C++ compiler was found" for m in MODELS}


def test_a_model_that_does_not_compile_says_why(
    compiler: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: nn.Module, **_: Any) -> Any:
        raise RuntimeError("dynamo\ngave up")

    monkeypatch.setattr(torch, "compile", broken)
    found = measure(_setup(compile="on", dropouts=(0.0,), peers=False))
    assert found.rows == [] and compiler == []
    reasons = _reasons(found)
    assert reasons[ON, True, 0.0] == reasons[OFF, True, 0.0] == "RuntimeError: dynamo"


def test_peers_can_be_left_out_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure(_setup(peers=False))
    assert {row.model for row in found.rows} == {ON, OFF}
    assert _reasons(found) == {(HUGGING_FACE, False, p): "left out by --no-peers" for p in (0, 0.1)}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = measure(_setup(dropouts=(0.0,)))
    assert {row.model for row in missing.rows} == {ON, OFF}
    assert "left out, for transformers is not installed" in missing.refused[0].reason


def _failing(error: Exception, model: str, at: int) -> Any:
    """`build`, but the step of `model` number `at` raises."""

    def build_broken(variant: Variant, *rest: Any) -> BareStep:
        step = build(variant, *rest)
        calls = 0

        def forward(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == at:
                raise error
            return step.forward(ids_BT, targets_BT)

        return dataclasses.replace(step, forward=forward) if variant.model == model else step

    return build_broken


# The first step, a step that is timed, the first that is profiled.
@pytest.mark.parametrize("at", [1, 5, 7])
@pytest.mark.parametrize("model", [OFF, HUGGING_FACE])
def test_a_variant_that_does_not_fit_is_a_row_with_the_reason(
    model: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Setup, "alternates", False)
    monkeypatch.setattr(bench, "build", _failing(torch.OutOfMemoryError("CUDA ..."), model, at))
    found = measure(_setup(dropouts=(0.0,)))
    assert [row.model for row in found.rows] == [m for m in MODELS if m != model]
    assert _reasons(found) == {(model, False, 0.0): "out of memory"}


def test_a_peer_that_fails_is_named_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "build", _failing(KeyError("x"), HUGGING_FACE, 1))
    found = measure(_setup(dropouts=(0.0,)))
    assert {row.model for row in found.rows} == {ON, OFF}
    assert _reasons(found) == {(HUGGING_FACE, False, 0.0): "KeyError: 'x'"}


def test_a_fault_of_our_own_step_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "build", _failing(RuntimeError("bug"), ON, 1))
    with pytest.raises(RuntimeError, match="bug"):
        measure(_setup(dropouts=(0.0,)))


@pytest.mark.parametrize("alternates", [True, False])
def test_variants_are_held_together_or_one_at_a_time(
    alternates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Setup, "alternates", alternates)
    alive: list[weakref.ref[nn.Module]] = []
    most = 0

    def counted(*args: Any) -> BareStep:
        nonlocal most
        gc.collect()
        step = build(*args)
        alive.append(weakref.ref(step.model))
        most = max(most, sum(model() is not None for model in alive))
        return step

    monkeypatch.setattr(bench, "build", counted)
    found = measure(_setup())
    assert found.alternated is alternates and len(alive) == len(found.rows) == 6
    assert most == (3 if alternates else 1)


@pytest.mark.parametrize("alternates", [True, False])
def test_note_and_progress_reach_the_end(alternates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Setup, "alternates", alternates)
    notes: list[str] = []
    ticks: list[tuple[int, int]] = []
    measure(_setup(peers=False), notes.append, lambda *tick: ticks.append(tick))
    assert notes == [
        "speed of a large square product",
        *(f"use_flash {on}, eager, dropout {p}" for p in ("0", "0.1") for on in ("on", "off")),
    ]
    total = 4 * (1 + 3)
    assert ticks[0] == (0, total) and ticks[-1] == (total, total) and ticks == sorted(ticks)


def test_each_step_draws_masks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int | None] = []
    monkeypatch.setattr(GPTModel, "set_dropout", lambda self, seed, row=0: seeds.append(seed))
    step = build(Variant(ON, False, 0.1), CFG, CPU, None)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    for _ in range(3):
        step(ids, ids)
    assert len(set(seeds)) == 3 and None not in seeds
    assert train_variants.dropout_seed(TRAIN.seed, 0) == seeds[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"steps": -1}, "steps must be at least 1, got -1"),
        ({"rounds": 2}, "rounds must be at least 3, got 2"),
        ({"dropouts": ()}, "dropout must name at least one probability"),
        ({"dropouts": (0.0, 1.0)}, r"dropout must be in \[0, 1\), got 1"),
        ({"dropouts": (float("nan"),)}, r"dropout must be in \[0, 1\), got nan"),
    ],
)
def test_a_setup_that_cannot_be_measured(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        _setup(**changes)
