"""Device, precision, compiler and signals of a run. pytest tests/train/test_runtime.py"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import nop
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.exc import CppCompileError, InductorError
from torch.compiler import config as compiler_config

from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import TrainConfig
from flashgpt.train import runtime
from flashgpt.train.parallel import Parallel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CFG = dict(vocab_size=7, context_length=5, emb_dim=8, n_heads=2, n_layers=1, drop_rate=0.0)


def test_the_device_is_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [runtime.device(name).type for name in ("auto", "cpu", "cuda")] == [
        "cuda",
        "cpu",
        "cuda",
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.device("auto") == CPU
    with pytest.raises(ValueError, match="finds no CUDA device; use auto or cpu"):
        runtime.device("cuda")


def test_precision() -> None:
    assert runtime.autocast_dtype("auto", CPU) is None
    assert runtime.autocast_dtype("fp32", CPU) is None
    assert runtime.autocast_dtype("auto", CUDA) is torch.bfloat16
    assert runtime.autocast_dtype("bf16", CUDA) is torch.bfloat16
    assert runtime.autocast_dtype("fp32", CUDA) is None
    assert isinstance(runtime.casting(CPU, None), contextlib.nullcontext)


@pytest.mark.parametrize("option", [("device", "cuda"), ("precision", "fp16")])
def test_what_the_machine_cannot_do_is_named(
    tmp_path: Path, cli: Callable[..., Any], options: list[str], option: tuple[str, str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    refused = cli("train", *options, "--out", tmp_path / "run", f"--train.{option[0]}", option[1])
    assert f"train.{option[0]}" in refused.error(1)
    assert not (tmp_path / "run").exists()


class Compiler:
    """In place of torch.compile: code that computes as the model does, seen at work."""

    def __init__(self) -> None:
        self.models: list[GPTModel] = []
        self.calls: list[tuple[bool, list[int]]] = []  # (repeats bit for bit, shape)
        self.error: Exception | None = None

    def __call__(self, model: GPTModel, **_: object) -> Callable[..., Tensor]:
        if self.error is not None:
            raise self.error
        self.models.append(model)

        def forward(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
            self.calls.append((torch.are_deterministic_algorithms_enabled(), list(ids_BT.shape)))
            assert ids_BT is not targets_BT and model.training
            loss: Tensor = model(ids_BT, targets_BT)
            return loss

        return forward


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(torch, "compile", made)
    monkeypatch.setattr(runtime.shutil, "which", lambda name: "/usr/bin/g++")
    return made


def long(model: GPTModel, flop: float, **more: Any) -> TrainConfig:
    """A config that plans `flop` at least, and not a step more."""
    steps = math.ceil(flop / (6 * model.n_parameters * 20))
    return TrainConfig(steps=steps, tokens_per_step=20, micro_batch=2, **more)


def test_the_compiler_is_used_where_it_is_there_and_repays(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, notes = GPTModel(CFG), list[str]()
    repays = long(model, runtime.COMPILE_REPAYS_FLOP)
    for config in (
        TrainConfig(),
        dataclasses.replace(repays, steps=repays.steps - 1),
        dataclasses.replace(repays, compile="off"),
    ):
        assert runtime.compiled(model, config, notes.append) is model
        assert not runtime.must_repeat(model, config)
        assert runtime.must_repeat(model, dataclasses.replace(config, deterministic=True))
    assert notes == [] and compiler.models == []
    on = TrainConfig(tokens_per_step=20, micro_batch=2, compile="on")
    for config in (repays, on):
        assert runtime.compiled(model, config, notes.append) is not model
        assert runtime.must_repeat(model, config)
    assert len(notes) == 2 and compiler.models == [model, model]
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    assert runtime.compiled(model, repays, notes.append) is model
    assert "no C++ compiler" in notes[-1]
    with pytest.raises(ValueError, match=r"train.compile is 'on', but no C\+\+ compiler"):
        runtime.compiled(model, on, notes.append)
    assert compiler.models == [model, model]


@pytest.mark.parametrize(("votes", "rehearsals"), [([1], 0), ([0, 1], 1)])
def test_where_one_process_cannot_compile_none_does(
    votes: list[int], rehearsals: int, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without a compiler rehearses nothing, and FSDP2's others would wait for it in theirs."""
    model, notes = GPTModel(CFG), list[str]()
    monkeypatch.setattr(Parallel, "largest", lambda _, own: max(own, votes.pop(0)))
    assert runtime.compiled(model, long(model, 1e16), notes.append) is model
    assert len(compiler.calls) == rehearsals and votes == []
    assert notes[-1] == "runs without torch.compile: it fails in another process"


def test_a_rehearsal_is_like_a_step_and_leaves_no_trace(compiler: Compiler) -> None:
    model = GPTModel({**CFG, "drop_rate": 0.5})
    model.eval().set_attention(own_masks=True)
    state = torch.random.get_rng_state()
    runtime.compiled(model, long(model, runtime.COMPILE_REPAYS_FLOP), lambda _: None)
    assert compiler.calls == [(False, [2, 5])]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_steps_run_under_what_the_code_was_made_for(
    compiler: Compiler, tmp_path: Path, train: Callable[..., Any], trained: Any
) -> None:
    micro = ("--train.compile", "on", "--train.micro-batch", 2)
    run = train(tmp_path / "run", *micro)
    assert compiler.calls == [(True, [2, 32])] * (1 + 2 * 12)
    assert not torch.are_deterministic_algorithms_enabled()
    assert [m["step"] for m in run.metrics] == [m["step"] for m in trained.metrics]


def test_a_resumed_run_says_when_its_steps_are_of_another_kind(
    compiler: Compiler, tmp_path: Path, train: Callable[..., Any], cli: Callable[..., Any]
) -> None:
    run = train(tmp_path / "run", "--train.compile", "on", "--train.stop-at", 4)
    again = ("train", "--resume", "--out", run.folder)
    assert "steps are" not in cli(*again, "--train.stop-at", 8).done()
    shown = " ".join(cli(*again, "--train.compile", "off").done().split())
    assert "steps are eager from here on, were compiled" in shown
    before = len(compiler.calls)
    assert "step 12 of 12 is done" in cli(*again, "--train.compile", "on").done()
    assert len(compiler.calls) == before  # nothing to compile for


def test_many_shapes_in_a_process_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its limit, 8 as it comes, dynamo runs code uncompiled, with a warning of its own."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(runtime.shutil, "which", lambda name: "/usr/bin/g++")
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=1):
        for emb_dim in (8, 16, 24):
            model = GPTModel({**CFG, "emb_dim": emb_dim})
            runtime.compiled(model, long(model, 1e16), lambda _: None)
    assert counters["frames"] == {"total": 3, "ok": 3}


def fails(graph: object, _: object) -> Callable[..., object]:
    """A backend for half a compiler: it makes no backward pass."""
    raise KeyError("no register left\nand a page more")


def short_of_memory(graph: object, _: object) -> Callable[..., object]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """broken(fails): torch.compile makes forward passes, of backward passes what `fails` makes."""

    def breaks(backward: Callable[..., Any]) -> None:
        backend = aot_autograd(fw_compiler=nop, bw_compiler=backward)
        compiles = functools.partial(torch.compile, backend=backend)
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", compiles)
        monkeypatch.setattr(runtime.shutil, "which", lambda name: "/usr/bin/g++")
        monkeypatch.setattr(runtime, "COMPILE_REPAYS_FLOP", 0)

    return breaks


def test_a_model_that_does_not_compile_runs_eagerly_and_says_so(
    broken: Callable[..., None],
    tmp_path: Path,
    cli: Callable[..., Any],
    options: list[str],
    trained: Any,
) -> None:
    broken(fails)
    reason = "the compiler fails (KeyError: 'no register left\\nand a page more')"
    shown = cli("train", *options, "--out", tmp_path / "run")
    said = " ".join(shown.done().split())
    assert said.count(f"runs without torch.compile: {reason}") == 1 and shown.err == ""
    assert type(trained)(tmp_path / "run").same_as(trained)
    refused = cli("train", *options, "--train.compile", "on", "--out", tmp_path / "on").error(1)
    assert f"train.compile is 'on', but {reason}; use auto or off" in refused


def test_lack_of_memory_is_no_failure_to_compile(
    broken: Callable[..., None], tmp_path: Path, cli: Callable[..., Any], options: list[str]
) -> None:
    broken(short_of_memory)
    refused = cli("train", *options, "--out", tmp_path / "run").error(1)
    assert "CUDA out of memory. Tried to allocate 2.00 GiB" in refused


def test_a_cpp_compiler_that_dies_is_quoted(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = "In file included from x.h\ng++: fatal error: Killed signal\ncompilation terminated"
    died = InductorError(CppCompileError(["g++", "x.cpp"], output), None)
    compiler.error = died
    model, notes = GPTModel(CFG), list[str]()
    assert runtime.compiled(model, long(model, 1e16), notes.append) is model
    reason = "the compiler fails (CppCompileError: g++: fatal error: Killed signal)"
    assert notes[-1] == f"runs without torch.compile: {reason}"


def test_a_python_without_a_compiler_is_said(compiler: Compiler) -> None:
    compiler.error = RuntimeError("no compiler for Python 9\nand a page more")
    model, notes = GPTModel(CFG), list[str]()
    assert runtime.compiled(model, long(model, 1e16), notes.append) is model
    reason = "the compiler fails (RuntimeError: no compiler for Python 9)"
    assert notes[-1] == f"runs without torch.compile: {reason}"
    assert runtime.cannot_compile(CPU) == reason


def test_kept_code_is_told_from_that_of_other_sources(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own key has no part in the gradients of our operators, which are in the code."""
    model = GPTModel(CFG)

    def tag(named: str = "") -> str:
        runtime._sources_digest.cache_clear()
        with compiler_config.patch(cache_key_tag=named):
            runtime.compiled(model, long(model, 1e16), lambda _: None)
            return compiler_config.cache_key_tag

    before = tag()
    assert before and before == tag()
    read = Path.read_bytes
    changed = "flashgpt/model/loss.py"
    monkeypatch.setattr(
        Path, "read_bytes", lambda p: read(p) + b"#" * p.as_posix().endswith(changed)
    )
    after = tag()
    assert after not in (before, "")
    assert tag("mine") == "mine" + after  # the user's own takes nothing away
    runtime._sources_digest.cache_clear()


@pytest.fixture(autouse=True)
def _signals_as_in_a_terminal() -> Iterator[None]:
    """Whoever started these tests, in the background perhaps, may have had signals ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with runtime.StopSignals() as signals:
        assert signals.received is None
        signal.raise_signal(number)
        assert signals.received == number
    assert signal.getsignal(number) is before


def test_a_second_interrupt_ends_at_once() -> None:
    with runtime.StopSignals():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_outside_the_main_thread_signals_stay_as_they_are() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def enter() -> None:
        with runtime.StopSignals() as signals:
            seen.extend((signal.getsignal(signal.SIGINT), signals.received))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before, None] and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("before", [False, True])
def test_repeating_holds_while_entered(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(before)
    try:
        with runtime.repeating(False):
            assert torch.are_deterministic_algorithms_enabled() == before
        with contextlib.suppress(KeyError), runtime.repeating(True):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.utils.deterministic.fill_uninitialized_memory
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled() == before
        assert torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_config_reaches_the_attention_kernels(
    tmp_path: Path, train: Callable[..., Any]
) -> None:
    run = train(tmp_path / "run", "--train.deterministic", True)
    receipt = json.loads((run.folder / "state.json").read_text())["receipt"]
    assert any(line.split(" (")[0].endswith("gradient, deterministic") for line in receipt)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_signal_that_was_ignored_before_stays_ignored() -> None:
    """As under nohup, or in a script's background job."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runtime.StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)
