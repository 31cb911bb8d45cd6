"""What a run computes with: device, precision, compiler, and the signals that end it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import types
from collections.abc import Callable, Iterator
from typing import Literal, Self

import torch
from torch import Tensor

from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import TrainConfig

# On a CPU the compiler takes about a minute and wins about a third of a step.
COMPILE_REPAYS_FLOP = 2e15
# Ctrl-C, a polite end, and a terminal that is closed (which Windows does not tell).
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


def device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device to train on.

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ValueError("train.device is 'cuda', but torch finds no CUDA device; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and has_cuda else "cpu")


def autocast_dtype(
    precision: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device
) -> torch.dtype | None:
    """The dtype of the products, None for fp32.

    Raises:
        ValueError: half precision on a CPU, where it is no faster and ends the process on some
            processors.
    """
    if precision in ("bf16", "fp16") and device.type == "cpu":
        raise ValueError(f"train.precision must be fp32 (or auto) on the CPU, got {precision!r}")
    if precision == "fp32" or device.type == "cpu":
        return None
    return torch.float16 if precision == "fp16" else torch.bfloat16


def peak_memory_bytes(device: torch.device) -> int:
    """The most that was allocated: by torch on a GPU, by the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes elsewhere


def casting(
    device: torch.device, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager[object]:
    """Autocast to `dtype`, or nothing."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


@contextlib.contextmanager
def repeating(on: bool) -> Iterator[None]:
    """While entered, PyTorch refuses algorithms whose results do not repeat bit for bit.

    cuBLAS needs a workspace of fixed size for that, which it reads from the environment when it
    starts; a process that has used CUDA before must have set it.
    """
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def compiled(
    model: GPTModel, config: TrainConfig, note: Callable[[str], None]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The model's forward pass, compiled where that works and repays.

    The decision depends on the config and on whether a compiler is there, never on a measured
    time, so that a resumed run computes in the same way.
    """
    on_cpu = model.wte.weight.device.type == "cpu"
    flop = 6 * model.n_parameters * config.tokens_per_step * config.steps
    if config.compile == "off" or (
        config.compile == "auto" and on_cpu and flop < COMPILE_REPAYS_FLOP
    ):
        return model
    if reason := cannot_compile(model.wte.weight.device):
        if config.compile == "on":
            raise ValueError(f"train.compile is 'on', but {reason}; use auto or off")
        note(f"runs without torch.compile: {reason}")
        return model
    note("compiles the model; the first step takes about a minute")
    forward: Callable[[Tensor, Tensor], Tensor] = torch.compile(model)
    return forward


def cannot_compile(device: torch.device) -> str | None:
    """Compiles a one-line function: None if that works, else why it does not."""
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "no C++ compiler was found"
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        return f"the compiler fails ({type(error).__name__}: {str(error).splitlines()[0]})"
    return None


class StopSignals:
    """While entered, SIGINT, SIGTERM and SIGHUP are noted instead of ending the process.

    A second SIGINT raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup, or a script's background job: whoever started it said so
            with contextlib.suppress(
                ValueError
            ):  # not in the main thread: signals stay as they are
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _frame: types.FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
