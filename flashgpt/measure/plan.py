"""Which micro-batch, which attention, recomputation or not: measured on this machine, in a budget.

Owns the order in which micro-batch sizes are measured, what is left out and why, and the choice.
One step is measured by `flashgpt.measure.step_sample`; before each size that has two smaller ones
measured, its memory and speed are predicted from these, so that every plan checks the model that
it predicts with.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import torch

from flashgpt.config import GPTConfig
from flashgpt.measure import failure, step_sample
from flashgpt.measure.memory_model import FP32, parameters, peak_at, seconds_at
from flashgpt.measure.step_sample import Measured
from flashgpt.model import loss
from flashgpt.runconfig import TrainConfig
from flashgpt.train import runtime

DOES_NOT_FIT, NO_TIME = "does not fit", "no time left"
# The first size has so many tokens at least: with fewer, a step is mostly overhead.
FIRST_TOKENS = {"cpu": 1024, "cuda": 4096}
# Steps of two micro-batches that a measurement takes beside the timed seconds; of slow steps.
COST_STEPS, COST_SLOW_STEPS = 5, 3


@dataclasses.dataclass(frozen=True)
class Way:
    """How a step is done: the two settings that trade speed for memory."""

    use_flash: bool
    activation_checkpointing: bool

    def __str__(self) -> str:
        recomputed = ", blocks recomputed" if self.activation_checkpointing else ""
        return f"use_flash {'on' if self.use_flash else 'off'}{recomputed}"


# The likeliest choice first, for the time may not suffice for all.
WAYS = tuple(Way(flash, again) for again in (False, True) for flash in (True, False))


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is planned for.

    Attributes:
        limit_bytes: memory that training may take in all.
        margin: the part of it that stays free, in [0, 1).
        seconds: for all measurements; one that was begun is finished.
    """

    cfg: GPTConfig
    train: TrainConfig
    device: torch.device
    limit_bytes: int
    margin: float
    seconds: float

    def __post_init__(self) -> None:
        if not 0 <= self.margin < 1:
            raise ValueError(f"margin must be in [0, 1), got {self.margin:g}")
        if self.limit_bytes <= 0:
            raise ValueError(f"memory must be positive, got {self.limit_bytes}")
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds must be positive and finite, got {self.seconds:g}")
        runtime.autocast_dtype(self.train.precision, self.device)  # refuses now what it would then

    @property
    def usable_bytes(self) -> float:
        """The limit without the margin."""
        return (1 - self.margin) * self.limit_bytes

    @property
    def sizes(self) -> list[int]:
        """Micro-batches (sequences) that divide a step, each at least twice the one before."""
        rows = self.train.rows(self.cfg.context_length)
        found: list[int] = []
        for size in range(1, rows + 1):
            if rows % size == 0 and (not found or size >= 2 * found[-1]):
                found.append(size)
        return found

    def off_the_line(self, size: int) -> tuple[int, int]:
        """Of a step's peak what is not proportional to the rows of a micro-batch (bytes): logits,
        and gradients of the micro-batches before."""
        cfg = self.cfg
        dtype = runtime.autocast_dtype(self.train.precision, self.device) or torch.float32
        tokens = size * cfg.context_length
        logits = loss.chunk_bytes(self.device, cfg.vocab_size, dtype, tokens)
        accumulates = self.train.rows(cfg.context_length) > size
        return logits, FP32 * parameters(cfg) if accumulates else 0


@dataclasses.dataclass(frozen=True)
class Row:
    """A micro-batch that was measured.

    Attributes:
        peak_bytes: the most that torch held: weights, gradients, moments, activations, scratch.
        fits: whether that leaves the margin free.
        predicted_peak_bytes, predicted_tokens_per_second: made from smaller micro-batches before
            this one was measured; None where there were not two.
        sample: the whole measurement.
    """

    way: Way
    micro_batch: int
    tokens_per_second: float
    peak_bytes: int
    fits: bool
    predicted_peak_bytes: float | None
    predicted_tokens_per_second: float | None
    sample: Measured


@dataclasses.dataclass(frozen=True)
class Missing:
    """A micro-batch that was not measured: why, and what is predicted of it, if anything."""

    way: Way
    micro_batch: int
    reason: str
    predicted_peak_bytes: float | None
    predicted_tokens_per_second: float | None


@dataclasses.dataclass
class Result:
    """Everything that was measured, in order of way and size."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    missing: list[Missing] = dataclasses.field(default_factory=list)

    @property
    def best(self) -> Row | None:
        """The fastest that was measured to fit."""
        fitting = [row for row in self.rows if row.fits]
        return max(fitting, key=lambda row: row.tokens_per_second, default=None)


def measure(
    setup: Setup,
    note: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Measures sizes of every way until all are done, or the time is up.

    Args:
        note: hears what is being measured, and what the compiler says.
        progress: hears seconds spent, and those in all.
    """
    work = _Work(setup, note, progress)
    progress(0, round(setup.seconds))
    for way in WAYS:  # what decides, of every way
        for size in work.deciding(way):
            work.do(way, size)
    for way in WAYS:  # then the sizes between, largest first
        for size in reversed(setup.sizes):
            work.do(way, size)
    progress(round(setup.seconds), round(setup.seconds))
    return work.result()


class _Work:
    """What has been measured so far."""

    def __init__(
        self,
        setup: Setup,
        note: Callable[[str], None],
        progress: Callable[[int, int], None],
    ) -> None:
        self._setup, self._note, self._progress = setup, note, progress
        self._start = time.monotonic()
        self._rows: dict[tuple[Way, int], Row] = {}
        self._missing: dict[tuple[Way, int], Missing] = {}

    def deciding(self, way: Way) -> Iterator[int]:
        """The first size that is no mere overhead, the next one, the largest that should fit.

        Where the first ones do not fit, those below.
        """
        setup = self._setup
        least = FIRST_TOKENS[setup.device.type] / setup.cfg.context_length
        first = next((i for i, n in enumerate(setup.sizes) if n >= least), len(setup.sizes) - 1)
        upward, downward = setup.sizes[first:], setup.sizes[:first][::-1]
        yield from upward[:2]
        if not self._samples(way):
            yield from downward
        if len(self._samples(way)) >= 2:
            fitting = (n for n in upward if (self._peak(way, n) or 0) <= setup.usable_bytes)
            yield max(fitting, default=upward[0])

    def do(self, way: Way, size: int) -> None:
        """Measures a size, if that is not done, and possible."""
        key = (way, size)
        if key in self._rows or (key in self._missing and self._missing[key].reason != NO_TIME):
            return
        predicted = self._predicted(way, size)
        reason = self._obstacle(way, size)
        if reason is None:
            self._note(f"{way}, micro-batch {size}")
            reason = self._try(way, size, *predicted)
        if reason is not None:
            self._missing[key] = Missing(way, size, reason, *predicted)
        elif key in self._missing:
            del self._missing[key]
        total = round(self._setup.seconds)
        self._progress(min(round(self._spent), total), total)

    def _try(
        self, way: Way, size: int, peak: float | None, tokens_per_second: float | None
    ) -> str | None:
        """Measures a size; why it could not be, if so."""
        setup = self._setup
        cfg = dataclasses.replace(setup.cfg, use_flash=way.use_flash)
        train = dataclasses.replace(
            setup.train,
            micro_batch=size,
            activation_checkpointing=way.activation_checkpointing,
        )
        try:
            sample = step_sample.measure(cfg, train, setup.device, self._note)
        except (RuntimeError, MemoryError) as error:
            reason = failure.reason(error)
            if reason != failure.OUT_OF_MEMORY and not isinstance(error, MemoryError):
                raise
            return DOES_NOT_FIT
        self._rows[way, size] = Row(
            way,
            size,
            self._speed(size, sample.seconds),
            sample.peak_bytes,
            sample.peak_bytes <= setup.usable_bytes,
            peak,
            tokens_per_second,
            sample,
        )
        return None

    def _obstacle(self, way: Way, size: int) -> str | None:
        """Why a size need not be tried."""
        missing = (m for m in self._missing.values() if m.way == way and m.reason == DOES_NOT_FIT)
        if any(size >= m.micro_batch for m in missing):
            return DOES_NOT_FIT
        peak = self._peak(way, size)
        if peak is not None and peak > self._setup.limit_bytes:
            return DOES_NOT_FIT
        if self._spent + self._cost(way, size) > self._setup.seconds:
            return NO_TIME
        return None

    def _cost(self, way: Way, size: int) -> float:
        """Seconds that a measurement should take, by those before; 0 for the first one."""
        if not self._rows:
            return 0.0
        known = self._samples(way) or [row.sample for row in self._rows.values()]
        last = known[-1]
        step = 2 * last.seconds * max(1.0, size / last.rows)
        steps = COST_SLOW_STEPS if step >= step_sample.SLOW_SECONDS else COST_STEPS
        return max(s.preparing for s in known) + step_sample.TIMED_SECONDS + steps * step

    def _predicted(self, way: Way, size: int) -> tuple[float | None, float | None]:
        """Peak memory and tokens per second, from smaller sizes."""
        below = [sample for sample in self._samples(way) if sample.rows < size]
        speed = self._speed(size, seconds_at(below, size)) if len(below) >= 2 else None
        return self._peak(way, size), speed

    def _peak(self, way: Way, size: int) -> float | None:
        below = [sample for sample in self._samples(way) if sample.rows < size]
        if len(below) < 2:
            return None
        return peak_at(below, size, *self._setup.off_the_line(size))

    def _samples(self, way: Way) -> list[Measured]:
        return [row.sample for row in self._rows.values() if row.way == way]

    def _speed(self, size: int, seconds: float) -> float:
        return size * self._setup.cfg.context_length / seconds

    @property
    def _spent(self) -> float:
        return time.monotonic() - self._start

    def result(self) -> Result:
        """All of it, in order."""
        keys = [(way, size) for way in WAYS for size in self._setup.sizes]
        return Result(
            [self._rows[key] for key in keys if key in self._rows],
            [self._missing[key] for key in keys if key in self._missing],
        )
