"""Steps as a CUDA graph: the bits of the plain step. pytest tests/train/test_graph.py

Without a GPU a stand-in takes the place of the capture. It writes down every operation with the
very tensors and numbers that it got, takes back what they did, and replays them. So what a CUDA
graph would freeze is frozen: addresses, numbers, and what the host does.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashgpt.data.shards import TokenData
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import RunConfig, TrainConfig
from flashgpt.train import graph, guard, optimizer, parts, runtime, step
from flashgpt.train.bare import BareStep
from flashgpt.train.feed import Feed
from flashgpt.train.graph import MOST_TOKENS, WARM_UP, Graphed
from flashgpt.train.guard import Guard
from flashgpt.train.loop import Listener
from flashgpt.train.step import Forward, Stepper, dropout_seed, pays_as_graph
from flashgpt.train.trainer import Trainer

CPU = torch.device("cpu")
FORBIDDEN = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default}
CAPTURED = "each step is one CUDA graph from here on"


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """Writes operations down, and what their operands held before."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Tensor], list[bool]]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func in FORBIDDEN:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(_tensors(value))
        self._keep(_tensors(kwargs.get("out")))
        known = {_address(tensor) for tensor in given}
        result = func(*args, **kwargs)
        outs = _tensors(result)
        fresh = [_address(out) not in known for out in outs]
        self._made |= {_address(out) for out, new in zip(outs, fresh, strict=True) if new}
        self._calls.append((func, args, kwargs, outs, fresh))
        return result

    def _keep(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            address = _address(tensor)
            if address not in self._made and address not in self._before:
                storage = tensor.untyped_storage()
                self._before[address] = storage, storage.clone()

    def take_back(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outs, fresh in self._calls:
            again = _tensors(func(*args, **kwargs))
            for out, new, is_fresh in zip(outs, again, fresh, strict=True):
                if is_fresh:
                    out.copy_(new)


class StandIn:
    """What stands in for a CUDA stream."""

    def run(self, call: Callable[[], Any]) -> Any:
        return call()

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        tape = Tape()
        try:
            with tape:
                out = call()
        finally:
            tape.take_back()
        return tape.replay, out


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every step is graphed; what is noted."""
    notes: list[str] = []

    def tell(self: Stepper, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if self._graphed is not None:
            self._graphed._note = notes.append

    made = Stepper.__init__
    monkeypatch.setattr(Stepper, "__init__", tell)
    monkeypatch.setattr(graph, "Stream", StandIn)
    monkeypatch.setattr(graph, "pays", lambda *_: True)
    monkeypatch.setattr(GPTModel, "_check", lambda *_: None)  # looks at ids on the CPU only
    return notes


@pytest.fixture
def twice(
    tmp_path: Path, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, Any]]:
    """twice("--train.seed", 3): a run without graphs, and one with; both on the CPU."""

    def run(*more: object) -> tuple[Any, Any]:
        found = []
        for name in ("plain", "graphed"):
            with monkeypatch.context() as patch:
                if name == "plain":
                    patch.setattr(graph, "pays", lambda *_: False)
                found.append(train(tmp_path / name, "--train.device", "cpu", *more))
        return found[0], found[1]

    return run


def guards(run: Any) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(run.checkpoints[-1] / "trainer" / "guard.safetensors")
    return tensors


def equal(one: Any, other: Any) -> bool:
    """Weights, moments, the guard's memory, the log."""
    mine, others = guards(one), guards(other)
    return (
        one.same_as(other)
        and all(torch.equal(mine[name], others[name]) for name in mine | others)
        and repr(one.metrics) == repr(other.metrics)  # NaN is not equal to itself
    )


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--train.micro-batch", 1),
        ("--train.optimizer", "muon", "--train.micro-batch", 2),
        ("--train.activation-checkpointing", True, "--model.use-flash", False),
        ("--train.grad-clip", 0, "--model.drop-rate", 0),
    ],
    ids=str,
)
def test_a_run_of_graphs_has_the_bits_of_the_plain_run(
    more: tuple[object, ...], stand_in: list[str], twice: Callable[..., Any]
) -> None:
    assert equal(*twice(*more))
    assert stand_in == [CAPTURED]


def test_targets_that_count_differently_in_each_step_weigh_as_in_the_plain_run(
    tmp_path: Path, stand_in: list[str], twice: Callable[..., Any]
) -> None:
    rng = random.Random(1)
    pairs = [
        {"prompt": "p" * rng.randrange(1, 40), "completion": "c" * rng.randrange(1, 40)}
        for _ in range(200)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    source = ("--data.source", tmp_path / "pairs.jsonl", "--train.micro-batch", 1)
    assert equal(*twice(*source)) and stand_in == [CAPTURED]


@pytest.mark.parametrize("frozen", ["seed", "first_row", "weight", "rate"])
def test_what_is_frozen_shows(
    frozen: str,
    stand_in: list[str],
    twice: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of the numbers that differ between steps takes part; so the test above can fail."""
    as_tensors = step._as_tensors

    def wrong(parts: Any, micros: Any, seed: int) -> list[Tensor]:
        found = as_tensors(parts, micros, seed)
        if frozen == "seed":
            found[0][0] = 5
        if frozen == "first_row":
            found[0][1:] = 0
        if frozen == "weight":
            found[1].mul_(1.01)
        return found

    if frozen == "rate":
        set_rate = optimizer.Optimizer.set_rate
        calls: list[float] = []

        def stuck(self: optimizer.Optimizer, rate: float) -> None:
            calls.append(rate)
            set_rate(self, rate if len(calls) <= 12 else 1e-3)  # the plain run comes first

        monkeypatch.setattr(optimizer.Optimizer, "set_rate", stuck)
    monkeypatch.setattr(step, "_as_tensors", wrong)
    plain, graphed = twice("--train.micro-batch", 1)
    assert stand_in == [CAPTURED] and not plain.same_as(graphed)


def _poisoned(monkeypatch: pytest.MonkeyPatch, steps: dict[int, float]) -> None:
    """The loss of some steps is multiplied by a factor, on the device, by the step's seed."""
    by_seed = {dropout_seed(1337, at): factor for at, factor in steps.items()}

    def compiled(model: GPTModel, *_: object) -> Forward:
        def forward(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
            loss: Tensor = model(ids_BT, targets_BT)
            for seed, factor in by_seed.items():
                loss = loss * torch.where(model.dropout_seed == seed, factor, 1.0)
            return loss

        return forward

    monkeypatch.setattr(runtime, "compiled", compiled)


@pytest.mark.parametrize("ahead", [0, 2])
def test_bad_steps_hold_back_those_behind_them(
    ahead: int,
    stand_in: list[str],
    twice: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _poisoned(monkeypatch, {1: math.nan, 5: math.nan, 6: math.inf, 9: math.nan})
    monkeypatch.setitem(step.AHEAD, "cpu", ahead)
    plain, graphed = twice("--train.micro-batch", 2)
    assert equal(plain, graphed) and stand_in == [CAPTURED]
    assert sum("skipped" in entry for entry in graphed.metrics) == 4


def test_a_rollback_loads_into_what_was_captured(
    stand_in: list[str], twice: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _poisoned(monkeypatch, dict.fromkeys((5, 6, 7), math.nan))
    monkeypatch.setitem(step.AHEAD, "cpu", 2)
    plain, graphed = twice("--train.guard", "rollback")
    assert equal(plain, graphed) and stand_in == [CAPTURED]
    state = json.loads((graphed.folder / "state.json").read_text())
    assert state["skipped"] == [[4, 8]]


def test_a_run_goes_on_with_a_graph_of_its_own(
    tmp_path: Path, stand_in: list[str], train: Callable[..., Any], cli: Callable[..., Any]
) -> None:
    cpu = ("--train.device", "cpu")
    whole = train(tmp_path / "whole", *cpu)
    halves = train(tmp_path / "halves", *cpu, "--train.stop-at", 8)
    cli("train", "--resume", "--out", halves.folder).done()
    assert halves.same_as(whole)
    losses = [[entry["loss"] for entry in found.metrics] for found in (halves, whole)]
    assert losses[0] == losses[1]
    assert stand_in == [CAPTURED] * 3


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_cannot_be_captured_stays_plain(
    where: str, stand_in: list[str], twice: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradients from the first micro-batch of the capture that broke off in the second."""

    def compiled(model: GPTModel, *_: object) -> Forward:
        calls = iter(range(1000))

        def forward(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
            loss: Tensor = model(ids_BT, targets_BT)
            if next(calls) % 4:
                if where == "forward":
                    loss.item()
                else:
                    loss.register_hook(lambda gradient: float(gradient) and None)
            return loss

        return forward

    monkeypatch.setattr(runtime, "compiled", compiled)
    assert equal(*twice("--train.micro-batch", 1))
    assert stand_in == [
        "no CUDA graph of a step: RuntimeError: operation not permitted when stream is capturing"
    ]


def _scaled_steps(graphed: bool, data: TokenData, run: RunConfig) -> tuple[Any, dict[str, Tensor]]:
    """Steps with a scaled loss, whose gradient overflows fp32 at first."""
    torch.manual_seed(0)
    model = GPTModel(run.model.resolve(data.vocab_size))
    config = dataclasses.replace(run.train, device="cpu", steps=20)
    made = parts.build(model, data.tokenizer, config)
    made = dataclasses.replace(made, guard=Guard(CPU, 8.0, scaled=True))
    trainer = Trainer(model, data.tokenizer, config)
    stepper = Stepper(made, model, graphed)
    with Feed(trainer._batches(data), made.rows, 2, CPU) as feed:
        steps = stepper.completed(feed, 20, lambda _: False, lambda: False)
        reports = [(done.verdict, done.loss, done.norm, done.rate) for done in steps]
    assert not graphed or (stepper._graphed is not None and stepper._graphed.captured)
    return reports, {**dict(model.named_parameters()), **made.guard.state_tensors()}


def test_a_loss_scale_falls_and_rises_within_the_graph(
    stand_in: list[str], run: RunConfig, data: TokenData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "FIRST_SCALE", 2.0**127)
    monkeypatch.setattr(guard, "GROWTH_STEPS", 4)
    plain, state = _scaled_steps(False, data, run)
    graphed, its_state = _scaled_steps(True, data, run)
    assert repr(plain) == repr(graphed)
    assert all(torch.equal(state[name], its_state[name]) for name in state | its_state)
    verdicts = [verdict for verdict, *_ in graphed]
    assert {guard.Verdict.OVERFLOW, guard.Verdict.ACCEPTED} == set(verdicts)
    assert guard.Verdict.OVERFLOW in verdicts[WARM_UP + 1 :]


def test_other_shapes_go_through_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "Stream", StandIn)
    total, host = torch.zeros(()), []

    def function(x: Tensor, y: Tensor) -> Tensor:
        host.append(1)
        total.add_(x.sum())
        return x * y

    graphed = Graphed(function, lambda: None)
    y = torch.tensor(3.0)
    for number in range(WARM_UP + 3):
        x = torch.full((2,), float(number))
        assert torch.equal(graphed(x, y), x * y)
        assert graphed.captured == (number >= WARM_UP)
        assert len(host) == min(number, WARM_UP) + 1
    before = total.clone()
    assert torch.equal(graphed(torch.ones(3), y), 3 * torch.ones(3))
    assert torch.equal(graphed(torch.ones(2), y), 3 * torch.ones(2))
    assert torch.equal(graphed(torch.ones(2, dtype=torch.float64), y).double(), 3 * torch.ones(2))
    assert len(host) == WARM_UP + 3 and total == before + 3 + 2 + 2


@pytest.mark.parametrize(
    ("device", "changes", "expected"),
    [
        ("cuda", {}, True),
        ("cpu", {}, False),
        ("cuda", {"compile": "on"}, True),
        ("cuda", {"compile": "off"}, False),
        ("cuda", {"dropout_masks": "kernel"}, False),
        ("cuda", {"tokens_per_step": 2 * MOST_TOKENS}, False),
        ("cuda", {"tokens_per_step": 2 * MOST_TOKENS, "micro_batch": MOST_TOKENS // 32}, True),
        ("cuda", {"tokens_per_step": MOST_TOKENS + 32}, False),
    ],
)
def test_small_steps_on_cuda_are_captured_unless_nothing_is_compiled(
    device: str, changes: dict[str, Any], expected: bool, run: RunConfig, data: TokenData
) -> None:
    config = TrainConfig(device="cpu", **{"tokens_per_step": MOST_TOKENS, **changes})
    made = parts.build(GPTModel(run.model.resolve(data.vocab_size)), data.tokenizer, config)
    made = dataclasses.replace(made, device=torch.device(device))
    assert pays_as_graph(made) is expected


def test_larger_models_are_captured_with_fewer_tokens() -> None:
    cuda = torch.device("cuda")
    assert graph.pays(cuda, MOST_TOKENS, 124_000_000)
    assert not graph.pays(cuda, MOST_TOKENS, 355_000_000)
    assert graph.pays(cuda, MOST_TOKENS // 4, 355_000_000)
    assert not graph.pays(cuda, 2 * MOST_TOKENS, 1000)


def test_a_bare_step_as_a_graph_has_the_bits_of_the_plain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graph, "Stream", StandIn)
    cfg = dict(vocab_size=64, context_length=16, emb_dim=32, n_heads=2, n_layers=1, drop_rate=0.1)
    found, notes = [], []
    for graphed in (False, True):
        torch.manual_seed(0)
        model = GPTModel(cfg)
        seeds = iter(range(100))
        prepare = functools.partial(lambda model, seeds: model.set_dropout(next(seeds)))
        made = optimizer.build(model, TrainConfig())
        bare = BareStep(
            model, model, made, 1.0, CPU, None, functools.partial(prepare, model, seeds)
        )
        call = bare.graphed(notes.append) if graphed else bare
        for number in range(WARM_UP + 4):
            ids, targets = torch.arange(2 * 2 * 16).add(number).remainder(64).view(2, 2, 16)
            call(ids, targets)
        assert next(seeds) == WARM_UP + 4
        found.append({**dict(model.named_parameters()), **made.state_tensors()})
    assert notes == [CAPTURED]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0] | found[1])


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _on_cuda(
    graphed: bool,
    run: RunConfig,
    data: TokenData,
    out: Path,
    changes: dict[str, Any],
    change_forward: Callable[[Forward], Forward] = lambda forward: forward,
) -> tuple[Any, dict[str, Tensor], list[str]]:
    """20 steps that repeat bit for bit: log, state, notes."""
    train = dataclasses.replace(
        run.train,
        **{"steps": 20, "tokens_per_step": 512, "device": "cuda", "deterministic": True, **changes},
    )
    model_section = dataclasses.replace(run.model, emb_dim=128, context_length=128)
    run = dataclasses.replace(run, model=model_section, train=train)
    torch.manual_seed(0)
    torch.compiler.reset()
    model = GPTModel(model_section.resolve(data.vocab_size))
    trainer = Trainer(model, data.tokenizer, train)
    log: list[Any] = []
    notes: list[str] = []

    def entry(found: dict[str, Any]) -> None:
        names = ("step", "loss", "grad_norm", "lr", "skipped", "val_loss")
        log.append([found.get(name) for name in names])

    with pytest.MonkeyPatch.context() as patch:
        if not graphed:
            patch.setattr(graph, "pays", lambda *_: False)
        compiled = runtime.compiled
        patch.setattr(runtime, "compiled", lambda *args: change_forward(compiled(*args)))
        trainer.fit(data, out, run, listener=Listener(step=entry, note=notes.append))
    made = trainer.parts
    state = {
        **dict(model.named_parameters()),
        **made.optimizer.state_tensors(),
        **{f"guard.{name}": t for name, t in made.guard.state_tensors().items()},
    }
    return log, {name: t.detach().cpu() for name, t in state.items()}, notes


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("compiled", ["on", "eager"])
@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"precision": "bf16", "micro_batch": 1},
        {"precision": "fp16", "micro_batch": 2},
        {"precision": "fp32", "optimizer": "muon"},
        {"precision": "bf16", "eval_every": 6, "checkpoint_every": 5},
    ],
    ids=str,
)
def test_on_cuda_a_run_of_graphs_has_the_bits_of_the_plain_run(
    changes: dict[str, Any],
    compiled: Literal["on", "eager"],
    run: RunConfig,
    data: TokenData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With dropout. "eager" is a compiler that fails, which leaves the graph as it is."""
    if compiled == "eager":
        monkeypatch.setattr(runtime, "cannot_compile", lambda device: "none is wanted")
    monkeypatch.setattr(guard, "FIRST_SCALE", 2.0**28)  # fp16 overflows at first
    how = {**changes, "compile": "on" if compiled == "on" else "auto"}
    plain, state, notes = _on_cuda(False, run, data, tmp_path / "plain", how)
    log, its_state, its_notes = _on_cuda(True, run, data, tmp_path / "graphed", how)
    assert CAPTURED not in notes and CAPTURED in its_notes
    assert repr(plain) == repr(log)
    assert all(torch.equal(state[name], its_state[name]) for name in state | its_state)
    overflows = [found for found in log if found[4] and "overflow" in found[4]]
    assert bool(overflows) == (changes["precision"] == "fp16") and len(overflows) < 20
    again, _, _ = _on_cuda(True, run, data, tmp_path / "seed", {**how, "seed": 1})
    assert repr(again) != repr(log)


@pytest.mark.gpu
@needs_cuda
def test_on_cuda_bad_steps_hold_back_those_behind_them(
    run: RunConfig, data: TokenData, tmp_path: Path
) -> None:
    bad = [dropout_seed(1337, at) for at in (1, 8, 9, 15)]

    def poison(forward: Any) -> Forward:
        model = getattr(forward, "_orig_mod", forward)

        def poisoned(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
            loss: Tensor = forward(ids_BT, targets_BT)
            for seed in bad:
                loss = loss * torch.where(model.dropout_seed == seed, math.nan, 1.0)
            return loss

        return poisoned

    found = [
        _on_cuda(graphed, run, data, tmp_path / str(graphed), {"micro_batch": 2}, poison)
        for graphed in (False, True)
    ]
    (plain, state, _), (log, its_state, notes) = found
    assert CAPTURED in notes and repr(plain) == repr(log)
    assert sum(entry[4] is not None for entry in log) == 4
    assert all(torch.equal(state[name], its_state[name]) for name in state | its_state)


@pytest.mark.gpu
@needs_cuda
def test_on_cuda_a_step_that_cannot_be_captured_stays_plain(
    run: RunConfig, data: TokenData, tmp_path: Path
) -> None:
    def waits(forward: Forward) -> Forward:
        def waiting(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
            loss = forward(ids_BT, targets_BT)
            loss.item()
            return loss

        return waiting

    plain, state, _ = _on_cuda(False, run, data, tmp_path / "plain", {"micro_batch": 2}, waits)
    log, its_state, notes = _on_cuda(True, run, data, tmp_path / "kept", {"micro_batch": 2}, waits)
    assert CAPTURED not in notes and any("no CUDA graph of a step" in note for note in notes)
    assert repr(plain) == repr(log)
    assert all(torch.equal(state[name], its_state[name]) for name in state | its_state)
    assert torch.rand(3, device="cuda").isfinite().all()  # the generator was left in order
    good, _, its_notes = _on_cuda(True, run, data, tmp_path / "good", {"micro_batch": 2})
    assert CAPTURED in its_notes and repr(good) == repr(plain)


@pytest.mark.gpu
@needs_cuda
def test_on_cuda_a_replay_does_not_wait_for_the_device(
    run: RunConfig, data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = Stepper._launch

    def strict(self: Stepper, at: int, feed: Feed) -> object:
        torch.cuda.set_sync_debug_mode("error" if at > WARM_UP else "default")
        try:
            return launch(self, at, feed)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Stepper, "_launch", strict)
    _, _, notes = _on_cuda(True, run, data, tmp_path / "run", {"micro_batch": 2})
    assert CAPTURED in notes


@pytest.fixture(autouse=True)
def _compiled_models_do_not_add_up() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.compiler.reset()
