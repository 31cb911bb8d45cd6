"""Device, precision, compiler and signals of a run. pytest tests/train/test_runtime.py"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import TrainConfig
from flashgpt.train import runtime

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
    with pytest.raises(ValueError, match=r"must be fp32 \(or auto\) on the CPU, got 'bf16'"):
        runtime.autocast_dtype("bf16", CPU)
    assert isinstance(runtime.casting(CPU, None), contextlib.nullcontext)


@pytest.mark.parametrize("option", [("device", "cuda"), ("precision", "bf16")])
def test_what_the_machine_cannot_do_is_named(
    tmp_path: Path, cli: Callable[..., Any], options: list[str], option: tuple[str, str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    refused = cli("train", *options, "--out", tmp_path / "run", f"--train.{option[0]}", option[1])
    assert f"train.{option[0]}" in refused.error(1)
    assert not (tmp_path / "run").exists()


def test_the_compiler_is_used_where_it_is_there_and_repays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, notes = GPTModel(CFG), list[str]()
    monkeypatch.setattr(torch, "compile", lambda m: m if not isinstance(m, GPTModel) else (m,))
    monkeypatch.setattr(runtime.shutil, "which", lambda name: "/usr/bin/g++")
    long = TrainConfig(steps=10**9, tokens_per_step=10**9)
    assert runtime.compiled(model, TrainConfig(), notes.append) is model
    assert runtime.compiled(model, TrainConfig(compile="off", steps=10**9), notes.append) is model
    assert notes == []
    for config in (long, TrainConfig(compile="on")):
        assert runtime.compiled(model, config, notes.append) == (model,)
    assert len(notes) == 2
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    assert runtime.compiled(model, long, notes.append) is model
    assert "no C++ compiler" in notes[-1]
    with pytest.raises(ValueError, match=r"train.compile is 'on', but no C\+\+ compiler"):
        runtime.compiled(model, TrainConfig(compile="on"), notes.append)


def test_a_compiler_that_fails_is_said_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, notes = GPTModel(CFG), list[str]()

    def broken(_: object) -> object:
        raise RuntimeError("g++ returned 1\nand a page more")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(runtime.shutil, "which", lambda name: "/usr/bin/g++")
    long = TrainConfig(steps=10**9, tokens_per_step=10**9)
    assert runtime.compiled(model, long, notes.append) is model
    reason = "the compiler fails (RuntimeError: g++ returned 1)"
    assert notes == [f"runs without torch.compile: {reason}"]
    with pytest.raises(ValueError, match="g\\+\\+ returned 1"):
        runtime.compiled(model, TrainConfig(compile="on"), notes.append)


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
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled() == before
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
