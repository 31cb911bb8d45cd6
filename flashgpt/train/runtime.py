"""What a run computes with: device, precision, compiler, and the signals that end it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.utils.deterministic
from torch import Tensor, nn
from torch.compiler import config as compiler_config

from flashgpt import half_on_cpu
from flashgpt.launch import Launch
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import TrainConfig
from flashgpt.train.parallel import ALONE, Parallel
from flashgpt.train.wrapping import compile_module, uncompile, unsynchronised

# On two CPU cores the compiler takes half a minute and wins 2 to 10 % of a step (1.9 M parameters,
# an EPYC, torch 2.13; nothing with 14 M on a Xeon): so much work, five hours there, repays it.
COMPILE_REPAYS_FLOP = 2e15
MOST_MODELS = 256  # of different shapes in a process; dynamo has the same limit for everything
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
        ValueError: fp16 on a CPU, or bf16 on one that is not made for it (half_on_cpu.py).
    """
    if precision == "fp32" or (precision == "auto" and device.type == "cpu"):
        return None
    if device.type == "cpu":
        _check_half(precision)
    return torch.float16 if precision == "fp16" else torch.bfloat16


def _check_half(precision: str) -> None:
    where = "the CPU"
    if precision == "bf16":
        reason = half_on_cpu.refusal()
        if reason is None:
            return
        where = f"this CPU, where {reason}"
    raise ValueError(f"train.precision must be fp32 (or auto) on {where}; got {precision!r}")


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
    settings: Any = torch.utils.deterministic  # whose one setting type checkers do not see
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # nobody reads it; filling takes time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filled


def compiled(
    model: GPTModel,
    config: TrainConfig,
    note: Callable[[str], None],
    module: nn.Module | None = None,
    parallel: Parallel = ALONE,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The model's forward pass, compiled where that works, in all processes, and repays.

    A forward and a backward pass are rehearsed, so that all is compiled, or has failed, before the
    first step. To be called under what the steps run under (`repeating`): code is made for that.

    The decision depends on the config and on whether compiling works here, never on a measured
    time, so that a resumed run computes in the same way.

    Args:
        module: what wraps the model for several processes.

    Returns:
        the compiled forward pass; `module`, or without one the model, where it is not compiled.

    Raises:
        ValueError: `train.compile` is on, and compiling fails.
        MemoryError, torch.OutOfMemoryError: the rehearsal does not fit.
    """
    module = module or model
    if not _wants_compiler(model, config):
        return module
    reason = _no_compiler(model.wte.weight.device)
    # All rehearse or none: FSDP2's processes need one another in every pass.
    if not parallel.largest(int(reason is not None)):
        note("compiles the model: up to a minute, or seconds where it was compiled before")
        tag_kept_code()
        try:
            forward = compile_module(module)
            _rehearse(forward, model, module, config, parallel)
        except Exception as error:
            reason = _why(error)
        if not parallel.largest(int(reason is not None)):
            return forward
        uncompile(module)
    reason = reason or "it fails in another process"
    if config.compile == "on":
        raise ValueError(f"train.compile is 'on', but {reason}; use auto or off")
    note(f"runs without torch.compile: {reason}")
    return module


def _wants_compiler(model: GPTModel, config: TrainConfig) -> bool:
    on_cpu = model.wte.weight.device.type == "cpu"
    flop = 6 * model.n_parameters * config.tokens_per_step * config.steps
    return config.compile == "on" or (
        config.compile == "auto" and not (on_cpu and flop < COMPILE_REPAYS_FLOP)
    )


def must_repeat(model: GPTModel, config: TrainConfig) -> bool:
    """Whether the steps are to run under `repeating`.

    On the CPU PyTorch's own kernels repeat without. Compiled code does not: several threads add
    up the gradient of an embedding, in the order in which they come.
    """
    on_cpu = model.wte.weight.device.type == "cpu"
    return config.deterministic or (on_cpu and _wants_compiler(model, config))


def _rehearse(
    forward: Callable[[Tensor, Tensor], Tensor],
    model: GPTModel,
    module: nn.Module,
    config: TrainConfig,
    parallel: Parallel,
) -> None:
    """Forward and backward on a micro-batch of zeros; random states stay, gradients are none."""
    device, length = model.wte.weight.device, model.cfg.context_length
    shape = (config.rows_at_once(length, parallel.size), length)
    # Two tensors: code for one in both places would serve no step.
    ids_BT, targets_BT = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
    was_training = model.training
    model.train()
    model.set_dropout(0)
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            # Past its limit dynamo would run the ninth model of a process uncompiled.
            torch._dynamo.config.patch(
                recompile_limit=MOST_MODELS,
                optimize_ddp=_cuts(config),
            ),
            unsynchronised(module),
        ):
            with casting(device, autocast_dtype(config.precision, device)):
                loss = forward(ids_BT, targets_BT)
            loss.backward()
    finally:
        model.zero_grad(set_to_none=True)
        model.set_dropout(None)
        model.train(was_training)


def _cuts(config: TrainConfig) -> bool:
    """Whether a model under DDP is compiled in pieces, so that gradients are sent meanwhile.

    On one machine that costs more than it hides (docs/scaling.md). A model that recomputes blocks
    cannot be cut.
    """
    return Launch.here().machines > 1 and not config.activation_checkpointing


def tag_kept_code() -> None:
    """Keeps compiled code of other versions of our operators out; before a model is compiled.

    Their gradients and shapes go into the code that torch keeps, into its key their names alone.
    """
    if not compiler_config.cache_key_tag.endswith(_sources_digest()):
        compiler_config.cache_key_tag += _sources_digest()


@functools.cache
def _sources_digest() -> str:
    """Of what a compiled model is made from."""
    digest = hashlib.sha256()
    for part in ("attention", "model"):
        for path in sorted((Path(__file__).parents[1] / part).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cannot_compile(device: torch.device) -> str | None:
    """Compiles a one-line function: None if that works, else why it does not."""
    if reason := _no_compiler(device):
        return reason
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:
        return _why(error)
    return None


def _no_compiler(device: torch.device) -> str | None:
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "no C++ compiler was found"
    return None


def _why(error: Exception) -> str:
    """Why compiling failed, in a line.

    It fails in many ways, a compiler's process that dies among them. Lack of memory is none of
    them and is raised again.
    """
    cause: BaseException = error
    while (inner := getattr(cause, "inner_exception", None)) is not None:
        cause = inner
    if isinstance(cause, MemoryError | torch.OutOfMemoryError):
        raise error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [""]
    said = next((line for line in lines if "error:" in line), lines[0])  # g++ says it later
    return f"the compiler fails ({type(cause).__name__}: {said})"


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
