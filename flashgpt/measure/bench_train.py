"""Speed and memory of the full training step on this machine, beside Hugging Face's GPT-2.

Owns what is measured: forward, loss, backward, clipping, AdamW, of our model with the switch on and
off and of GPT2LMHeadModel, eager and compiled. Where the time goes is that of
`flashgpt.measure.step_parts`; table and files are those of `flashgpt bench train`.

Legend: B rows, T positions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from flashgpt.attention import kernels
from flashgpt.config import GPTConfig
from flashgpt.measure import failure, peer, step_parts
from flashgpt.measure.clock import MIN_ROUNDS, Call, alternate, device_peak, milliseconds
from flashgpt.measure.flops import flop_per_token
from flashgpt.measure.memory import peak_bytes, release
from flashgpt.measure.train_variants import HUGGING_FACE, OFF, ON, TRAIN, Variant, build
from flashgpt.model.gpt2 import GPTModel
from flashgpt.train import graph, runtime
from flashgpt.train.bare import BareStep

WARM_UP = 2  # steps between the first one and those that are timed
PROFILED = 3  # steps


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is measured.

    Attributes:
        cfg: the model; `use_flash` and `drop_rate` are each variant's own.
        batch: sequences in a step, of `context_length` tokens.
        dropouts: probabilities to measure with.
        peers: Hugging Face's model too.
        steps: in a row, in each round.
        rounds: of each variant.
    """

    cfg: GPTConfig
    batch: int
    dropouts: tuple[float, ...]
    compile: Literal["both", "on", "off"]
    peers: bool
    steps: int
    rounds: int
    device: torch.device

    def __post_init__(self) -> None:
        for name in ("batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rounds < MIN_ROUNDS:
            raise ValueError(f"rounds must be at least {MIN_ROUNDS}, got {self.rounds}")
        if not self.dropouts:
            raise ValueError("dropout must name at least one probability, got none")
        for p in self.dropouts:
            if not 0 <= p < 1:
                raise ValueError(f"dropout must be in [0, 1), got {p:g}")

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of the products, None for fp32."""
        return runtime.autocast_dtype("auto", self.device)

    @property
    def alternates(self) -> bool:
        """Whether the variants of one dropout are timed in turns; a GPU holds one at a time."""
        return self.device.type == "cpu"


@dataclasses.dataclass(frozen=True)
class Row(Variant):
    """A variant that was measured.

    Attributes:
        kernels: attention kernels that served; empty for a peer.
        ms, ms_min, ms_max: per step, median and range over the rounds (milliseconds).
        mfu: model FLOP utilisation: `flop_per_token` times tokens per second over the peak.
        peak_bytes: parameters, buffers and optimizer state, and the most that torch allocates
            beside them during a step: activations, gradients, scratch.
        first_step_seconds: of the first step, which compiles.
        graph: whether the timed steps were replays of a CUDA graph, as the trainer's small steps
            are; memory and parts are those of the same step without.
        parts: `ms` by part of a step (milliseconds).
    """

    kernels: list[str]
    tokens_per_second: float
    ms: float
    ms_min: float
    ms_max: float
    rounds: int
    mfu: float
    peak_bytes: int
    first_step_seconds: float
    graph: bool
    parts: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Refused(Variant):
    """A variant that was not measured, and why."""

    reason: str


@dataclasses.dataclass
class Result:
    """Everything that was measured.

    Attributes:
        peak_flop_per_second: of a large square product in the dtype of the model's products, the
            better of one before and one after.
        flop_per_token: of forward and backward; that of our model, for all rows.
        alternated: whether variants of one dropout were timed in turns, not one after the other.
    """

    peak_flop_per_second: float
    parameters: int
    flop_per_token: float
    tokens_per_step: int
    alternated: bool
    rows: list[Row] = dataclasses.field(default_factory=list)
    refused: list[Refused] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Ready:
    """A variant after its warm-up."""

    bare: BareStep
    plain: Call  # `bare` on its tokens
    step: Call  # the same, as a graph where the trainer makes one
    kernels: list[str]
    first_step_seconds: float
    graph: bool


def measure(
    setup: Setup,
    note: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Measures every variant.

    Args:
        note: hears what is being measured.
        progress: hears warm-ups and rounds done, and those in all.
    """
    with torch.device("meta"):
        model = GPTModel(setup.cfg)
    note("speed of a large square product")
    dtype = setup.autocast or torch.float32
    peak = device_peak(dtype, setup.device)
    tokens = setup.batch * setup.cfg.context_length
    needed, alternates = flop_per_token(model), setup.alternates
    result = Result(peak, model.n_parameters, needed, tokens, alternates)
    groups = _groups(setup, result)
    total = sum(map(len, groups)) * (1 + setup.rounds)
    done = 0
    for group in groups:
        base, size = done, len(group)

        def tick(count: int, base: int = base, size: int = size) -> None:
            progress(base + count * size, total)

        progress(done, total)
        _measure_group(setup, group, result, note, tick)
        done += size * (1 + setup.rounds)
        release(setup.device)
    progress(total, total)
    # A busy machine may have been slower at the start than it was later: the better one counts.
    result.peak_flop_per_second = max(peak, device_peak(dtype, setup.device))
    lower = peak / result.peak_flop_per_second
    result.rows = [dataclasses.replace(row, mfu=row.mfu * lower) for row in result.rows]
    return result


def _groups(setup: Setup, result: Result) -> list[list[Variant]]:
    """Variants that are held at a time; `result` hears of those that cannot be tried."""
    no_compiler = None if setup.compile == "off" else runtime.cannot_compile(setup.device)
    no_peer = peer.missing() if setup.peers else "left out by --no-peers"
    how = {"both": (False, True), "on": (True,), "off": (False,)}[setup.compile]
    groups = []
    for p in setup.dropouts:
        group = []
        for model in (ON, OFF, HUGGING_FACE):
            for compiled in how:
                reason = no_peer if model == HUGGING_FACE else None
                reason = reason or (no_compiler if compiled else None)
                if reason:
                    result.refused.append(Refused(model, compiled, p, reason))
                else:
                    group.append(Variant(model, compiled, p))
        groups += [group] if setup.alternates else [[variant] for variant in group]
    return groups


def _measure_group(
    setup: Setup,
    group: Sequence[Variant],
    result: Result,
    note: Callable[[str], None],
    tick: Callable[[int], None],
) -> None:
    """Warms the variants up, times them in turns, and looks into a step of each."""
    ready: dict[Variant, _Ready] = {}

    def refuse(variant: Variant, error: Exception) -> None:
        ready.pop(variant, None)
        reason = failure.reason(error)
        ours = variant.model != HUGGING_FACE and not variant.compiled
        if ours and reason != failure.OUT_OF_MEMORY:
            raise error
        result.refused.append(Refused(**vars(variant), reason=reason))

    for variant in group:
        note(str(variant))
        try:
            ready[variant] = _warm(setup, variant)
        except Exception as error:
            refuse(variant, error)
    tick(1)

    def timer(call: Call) -> float:
        return milliseconds(call, setup.device) / setup.steps

    rounds = {variant: _repeated(made.step, setup.steps) for variant, made in ready.items()}
    try:
        times = alternate(rounds, setup.rounds, timer, lambda count: tick(1 + count), math.inf)
    except torch.OutOfMemoryError as error:
        for variant in list(ready):
            refuse(variant, error)
    rounds.clear()
    for variant in list(ready):
        try:
            result.rows.append(_row(setup, variant, ready[variant], times[variant], result))
        except torch.OutOfMemoryError as error:
            refuse(variant, error)


def _repeated(step: Call, count: int) -> Call:
    def steps() -> None:
        for _ in range(count):
            step()

    return steps


def _warm(setup: Setup, variant: Variant) -> _Ready:
    """Builds a variant and does its first steps."""
    torch.manual_seed(TRAIN.seed)
    kernels.clear_receipt()
    bare = build(variant, setup.cfg, setup.device, setup.autocast)
    generator = torch.Generator().manual_seed(TRAIN.seed)
    size = (setup.batch, setup.cfg.context_length + 1)
    tokens = torch.randint(setup.cfg.vocab_size, size, generator=generator).to(setup.device)
    ids_BT, targets_BT = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    # What is not compiled is not captured either, as with train.compile = "off".
    parameters = sum(p.numel() for p in bare.model.parameters())
    graphs = variant.compiled and graph.pays(setup.device, ids_BT.numel(), parameters)
    graphed = bare.graphed() if graphs else None

    def plain() -> None:
        bare(ids_BT, targets_BT)

    def step() -> None:
        (graphed or bare)(ids_BT, targets_BT)

    start = time.perf_counter()
    step()
    _wait(setup.device)
    seconds = time.perf_counter() - start
    for _ in range(graph.WARM_UP if graphed else WARM_UP):
        step()
    _wait(setup.device)
    names = sorted({line.split(" served ")[0] for line in kernels.receipt()})
    captured = graphed is not None and graphed.compute.captured
    return _Ready(bare, plain, step, names, seconds, captured)


def _row(
    setup: Setup, variant: Variant, ready: _Ready, times: Sequence[float], result: Result
) -> Row:
    ms = statistics.median(times)
    speed = result.tokens_per_step / ms * 1e3
    model, state = ready.bare.model, ready.bare.optimizer.state_tensors()
    held = [*model.parameters(), *model.buffers(), *state.values()]
    named = contextlib.nullcontext() if variant.compiled else step_parts.modules_in_trace()
    with named:
        profiled = _repeated(ready.plain, PROFILED)
        parts = step_parts.profile(profiled, PROFILED, setup.device, ms).parts
    return Row(
        **vars(variant),
        kernels=ready.kernels,
        tokens_per_second=speed,
        ms=ms,
        ms_min=min(times),
        ms_max=max(times),
        rounds=len(times),
        mfu=result.flop_per_token * speed / result.peak_flop_per_second,
        peak_bytes=sum(t.nbytes for t in held) + peak_bytes(ready.plain, setup.device),
        first_step_seconds=ready.first_step_seconds,
        graph=ready.graph,
        parts=parts,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
