"""One training step with one micro-batch size, measured: its memory by phase, and its seconds.

The step is the trainer's own: accumulation, guard, optimizer, compiler, CUDA graph as the config
has them; its tokens are random. Which sizes are measured is up to `flashgpt.measure.plan`.

Legend: B rows, T positions.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from flashgpt.attention import kernels
from flashgpt.config import GPTConfig
from flashgpt.data.batches import Batches
from flashgpt.data.shards import TokenSplit
from flashgpt.measure.memory import phase_peaks, release
from flashgpt.measure.memory_model import Sample
from flashgpt.model import loss
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import TrainConfig
from flashgpt.tokenizer import Tokenizer
from flashgpt.train import graph, parts, runtime
from flashgpt.train.feed import Feed
from flashgpt.train.parts import Parts
from flashgpt.train.step import Forward, Stepper, pays_as_graph

# A step that is timed has as many of its micro-batches as these seconds take, at least two: the
# more there are, the less of the update falls to each.
STEP_SECONDS = 1.0
TIMED_SECONDS, MIN_TIMED, MAX_TIMED = 1.0, 2, 20  # seconds, steps
SLOW_SECONDS = 10.0  # a step that takes so long, the first aside, is timed once


@dataclasses.dataclass(frozen=True)
class Measured(Sample):
    """A sample, and how it came about.

    Attributes:
        micro_batches: in the steps that were timed.
        kernels: attention kernels that served.
        graph: whether the timed steps were replays of a CUDA graph.
        preparing: seconds before the first step: weights, compiler.
    """

    micro_batches: int
    kernels: list[str]
    graph: bool
    preparing: float


def measure(
    cfg: GPTConfig,
    train: TrainConfig,
    device: torch.device,
    note: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Measures a step; what it took is given back before this returns, or raises.

    Args:
        cfg: the model.
        train: its `micro_batch` is what is measured; `tokens_per_step` says how many there are.
        note: hears of the compiler and of CUDA graphs.

    Raises:
        torch.OutOfMemoryError: it does not fit.
        ValueError: a precision that the device does not have.
    """
    release(device)  # while an earlier one failed, its error still held it
    try:
        return _measure(cfg, train, device, note)
    finally:
        release(device)


def _measure(
    cfg: GPTConfig, train: TrainConfig, device: torch.device, note: Callable[[str], None]
) -> Measured:
    start = time.perf_counter()
    torch.manual_seed(train.seed)
    kernels.clear_receipt()
    with device:
        model = GPTModel(cfg)
    made = parts.build(model, Tokenizer.bytes(), train)
    with runtime.repeating(runtime.must_repeat(model, train)):
        forward = runtime.compiled(model, train, note)
        preparing = time.perf_counter() - start
        rows = train.micro_batch or made.rows
        in_step = made.rows // rows
        count, captured = min(in_step, 2), False
        times = _seconds(Stepper(made, forward), _feed(made, rows, count), 1, 1, warm_up=1)
        peaks = _peaks(made, forward, rows, count)
        if times[-1] < SLOW_SECONDS:
            passes = math.ceil(STEP_SECONDS * count / times[-1])
            count = min(in_step, max(2, passes))
            times, captured = _timed(made, forward, rows, count, note)
    seconds = statistics.median(times) / count
    gradients = sum(p.nbytes for p in model.parameters()) if in_step > 1 else 0
    served = sorted({line.split(" served ")[0] for line in kernels.receipt()})
    return Measured(rows, *peaks, gradients, seconds, count, served, captured, preparing)


def _peaks(made: Parts, forward: Forward, rows: int, count: int) -> tuple[int, int, int]:
    """Bytes in forward passes, in the rest, and of the logits; of a step of `count` passes."""
    device, model = made.device, made.model

    # The last step's verdict, which the optimizer still holds, would be freed meanwhile, and
    # PyTorch's profiler warn of it.
    verdicts = [getattr(part, "found_inf", None) for part in made.optimizer.parts]

    def step(watched: Forward) -> None:
        _seconds(Stepper(made, watched), _feed(made, rows, count), 1, 1)

    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
    else:
        state = made.optimizer.state_tensors().values()
        held = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *state))
    found = phase_peaks(step, forward, device)
    del verdicts
    dtype, tokens = made.autocast or torch.float32, rows * model.cfg.context_length
    logits = loss.chunk_bytes(device, model.cfg.vocab_size, dtype, tokens)
    return held + found.forward, held + found.rest, logits


def _timed(
    made: Parts, forward: Forward, rows: int, count: int, note: Callable[[str], None]
) -> tuple[list[float], bool]:
    """Seconds of each of some steps, and whether they were replays of a graph."""
    graphed = pays_as_graph(made)
    notes: list[str] = []
    stepper = Stepper(made, forward, graphed, notes.append)
    warm_up = graph.WARM_UP + 1 if graphed else 0
    times = _seconds(stepper, _feed(made, rows, count), MIN_TIMED, MAX_TIMED, warm_up)
    failed = [line for line in notes if line.startswith("no CUDA graph")]
    for line in failed:
        note(line)
    return times, graphed and not failed


def _seconds(stepper: Stepper, feed: Feed, least: int, most: int, warm_up: int = 0) -> list[float]:
    """Seconds of each step behind the warm-up: at least `least`, until TIMED_SECONDS are timed."""
    times: list[float] = []

    def enough() -> bool:
        timed = times[warm_up:]
        return len(timed) >= least and sum(timed) >= TIMED_SECONDS

    with feed:
        for done in stepper.completed(feed, warm_up + most, lambda _: False, enough):
            times.append(done.seconds)
    return times[warm_up:]


def _feed(made: Parts, rows: int, count: int) -> Feed:
    """Steps of `count` micro-batches of random tokens."""
    cfg = made.model.cfg
    rng = np.random.default_rng(made.config.seed)
    tokens = rng.integers(cfg.vocab_size, size=rows * count * cfg.context_length + 1)
    split = TokenSplit([tokens.astype(np.uint32)], [np.zeros(1, np.int64)], 0)
    batches = Batches(split, cfg.context_length, rows * count, made.config.seed)
    return Feed(batches, rows * count, rows, made.device)
