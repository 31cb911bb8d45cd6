"""Speed of writing on this machine, beside Hugging Face's GPT-2 and the memory's own limit.

Owns what is measured: the time to the first token after a long prompt, and the time of a decoding
step of so many texts side by side. Each new token reads every weight and the keys and values of its
text once; memory that is read no faster than that is the limit. Who writes is that of
`flashgpt.measure.generate_ways`, what was found that of `generate_record`; table and files are
those of `flashgpt bench generate`.

Legend: B rows, P tokens of a prompt, C new tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flashgpt.measure import failure, generate_ways, peer
from flashgpt.measure.clock import Call, alternate, device_bandwidth, milliseconds
from flashgpt.measure.generate_record import First, Refused, Result, Row, Setup
from flashgpt.measure.generate_ways import DYNAMIC, OURS, STATIC, WAYS, Write
from flashgpt.model.gpt2 import GPTModel
from flashgpt.train import runtime

LONG_PROMPT = 1000  # tokens before the first one that is timed, where the context has so many
TOO_SHORT = "too few new tokens to be timed apart from the first"
NOT_COMPILED = "left out by --compiled-batches"


@dataclasses.dataclass(frozen=True)
class _Timed:
    """The times of a way at a batch (milliseconds): of a whole text, and of its first token."""

    way: str
    batch: int
    whole: list[float]
    first: list[float]
    first_call_seconds: float
    ids_BC: Tensor


class _Runner:
    """Writes for one way until it fails; then calls do nothing.

    A peer may fail in its own way, a fault of ours is not hidden.
    """

    def __init__(self, way: str, write: Write, prompt_BP: Tensor) -> None:
        self.way, self.write, self.prompt_BP = way, write, prompt_BP
        self.first_seconds = 0.0
        self.first_BC: Tensor | None = None
        self.failure: str | None = None

    def call(self, count: int) -> None:
        """Writes so many tokens after each prompt; the first text is kept."""
        if self.failure:
            return
        start = time.perf_counter()
        try:
            ids_BC = self.write(self.prompt_BP, count)
        except Exception as error:
            self.failure = failure.reason(error)
            if self.way == OURS and self.failure != failure.OUT_OF_MEMORY:
                raise
            return
        if ids_BC.shape != (len(self.prompt_BP), count):
            self.failure = f"wrote {list(ids_BC.shape)} tokens, not {count} for each text"
        elif self.first_BC is None:
            self.first_seconds, self.first_BC = time.perf_counter() - start, ids_BC


def measure(
    setup: Setup,
    note: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Measures every way.

    Args:
        note: hears what is being measured.
        progress: hears warm-ups and rounds done, and those in all.
    """
    note("speed of memory")
    speed = device_bandwidth(setup.device)
    own = generate_ways.model(setup.cfg, setup.device, setup.dtype)
    result = Result(own.n_parameters, *_bytes_of_step(setup, own))
    per_group = 1 + setup.rounds
    total = per_group * (len(setup.batches) + 1)
    writers = _writers(setup, own, result)
    timed: list[_Timed] = []
    for group, batch in enumerate(setup.batches):

        def tick(done: int, begin: int = group * per_group) -> None:
            progress(begin + done, total)

        tick(0)
        here = dict(writers)
        if STATIC in here and batch not in setup.compiled_batches:
            del here[STATIC]
            result.refused.append(Refused(STATIC, batch, NOT_COMPILED))
        timed += _texts(setup, batch, here, result, note, tick)
        _release(setup.device)
    progress(total - per_group, total)
    # Last, for a long prompt enlarges the static cache of every text to come.
    _first_tokens(setup, writers, result, note)
    progress(total, total)
    # A busy machine may have been slower at the start than it was later: the better one counts.
    result.bytes_per_second = max(speed, device_bandwidth(setup.device))
    own_ids = {one.batch: one.ids_BC for one in timed if one.way == OURS}
    for one in timed:
        _judge(setup, one, own_ids.get(one.batch), result)
    return result


def _bytes_of_step(setup: Setup, own: GPTModel) -> tuple[int, float]:
    """Of weights, and of keys and values for each text."""
    looked_up = own.wpe.weight.numel()
    if not setup.cfg.tie_weights:
        looked_up += own.wte.weight.numel()
    weights = (own.n_parameters - looked_up) * setup.dtype.itemsize
    position = 2 * setup.cfg.n_layers * setup.cfg.emb_dim * setup.dtype.itemsize
    # The first token comes with the prompt; the step of token c reads prompt + c - 1 positions.
    return weights, position * (setup.prompt + setup.new_tokens / 2)


def _writers(setup: Setup, own: GPTModel, result: Result) -> dict[str, Write]:
    """By way; `result` hears of those that cannot be tried."""
    made = {OURS: generate_ways.ours(own)}
    no_peer = peer.missing()
    if set(setup.ways) != {OURS} and no_peer is None:
        try:
            made |= generate_ways.hugging_face(own)
        except Exception as error:
            no_peer = failure.reason(error)
    reasons = {OURS: None, DYNAMIC: no_peer, STATIC: no_peer}
    if STATIC in setup.ways and no_peer is None:
        reasons[STATIC] = runtime.cannot_compile(setup.device)
    for way in setup.ways:
        if reason := reasons[way]:
            result.refused += [Refused(way, batch, reason) for batch in (*setup.batches, None)]
    return {way: made[way] for way in setup.ways if reasons[way] is None}


def _prompt(setup: Setup, batch: int, length: int) -> Tensor:
    """Random ids, the same ones each time; int64 [batch, length]."""
    random = torch.Generator().manual_seed(generate_ways.SEED)
    ids_BP = torch.randint(setup.cfg.vocab_size, (batch, length), generator=random)
    return ids_BP.to(setup.device)


def _texts(
    setup: Setup,
    batch: int,
    writers: Mapping[str, Write],
    result: Result,
    note: Callable[[str], None],
    tick: Callable[[int], None],
) -> list[_Timed]:
    """Times whole texts and first tokens of all ways, in turns."""
    prompt_BP = _prompt(setup, batch, setup.prompt)
    runners: dict[str, _Runner] = {}
    for way, write in writers.items():
        note(f"{WAYS[way]}, batch {batch}")
        runners[way] = runner = _Runner(way, write, prompt_BP)
        for count in (setup.new_tokens, setup.new_tokens, 1):  # the first text compiles
            runner.call(count)
    tick(1)
    calls = {
        (way, count): functools.partial(runner.call, count)
        for way, runner in runners.items()
        for count in (1, setup.new_tokens)
    }
    times = alternate(calls, setup.rounds, _timer(setup), lambda done: tick(1 + done))
    timed = []
    for way, runner in runners.items():
        if runner.failure:
            result.refused.append(Refused(way, batch, runner.failure))
        else:
            assert runner.first_BC is not None, "what has not failed has written"
            whole, first = times[way, setup.new_tokens], times[way, 1]
            seconds = runner.first_seconds
            timed.append(_Timed(way, batch, whole, first, seconds, runner.first_BC))
    return timed


def _first_tokens(
    setup: Setup, writers: Mapping[str, Write], result: Result, note: Callable[[str], None]
) -> None:
    length = min(LONG_PROMPT, setup.cfg.context_length - 1)
    note(f"first token after {length:,}")
    runners = {way: _Runner(way, w, _prompt(setup, 1, length)) for way, w in writers.items()}
    calls = {way: functools.partial(runner.call, 1) for way, runner in runners.items()}
    for call in calls.values():
        call()
    times = alternate(calls, setup.rounds, _timer(setup))
    for way, runner in runners.items():
        if runner.failure:
            result.refused.append(Refused(way, None, runner.failure))
        else:
            result.first.append(First(way, length, *_spread(times[way])))


def _timer(setup: Setup) -> Callable[[Call], float]:
    return lambda call: milliseconds(call, setup.device)


def _judge(setup: Setup, one: _Timed, own_BC: Tensor | None, result: Result) -> None:
    """Adds a row: the time of a step is that of the tokens after the first."""
    steps = setup.new_tokens - 1
    ms = [(whole - first) / steps for whole, first in zip(one.whole, one.first, strict=True)]
    middle = statistics.median(ms)
    if middle <= 0:
        result.refused.append(Refused(one.way, one.batch, TOO_SHORT))
        return
    moved = result.weight_bytes + one.batch * result.cache_bytes
    limit = one.batch * result.bytes_per_second / moved
    speed = one.batch / middle * 1e3
    differing = differs_at = None
    if own_BC is not None:
        other_BC = one.ids_BC != own_BC
        differing = int(other_BC.any(1).sum())
        differs_at = int(other_BC.any(0).int().argmax()) if differing else None
    spread = _spread(ms)
    result.rows.append(
        Row(
            *(one.way, one.batch, speed, *spread, limit, speed / limit),
            *(one.first_call_seconds, differing, differs_at),
        )
    )


def _spread(ms: Sequence[float]) -> tuple[float, float, float, int]:
    """Median, least, greatest, and how many."""
    return statistics.median(ms), min(ms), max(ms), len(ms)


def _release(device: torch.device) -> None:
    """Compiled code knows one batch, and memory that is not used is there for the next."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
