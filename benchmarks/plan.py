"""What `flashgpt plan` predicts of large micro-batches from small ones, beside what is measured.

For each way (use_flash on, use_flash off, blocks recomputed) two small micro-batches are measured,
large ones predicted from them, and then measured too: peak memory as torch counts it and tokens per
second of the trainer's own step, compiled, bf16, on random tokens. The arithmetic that knows no
measurement (flashgpt/measure/memory_model.py) stands beside, for use_flash on. A size for which the
time (--seconds) does not suffice is named and left out.

Claims: predicted memory within 5 %, tokens per second within 10 % of what is measured.

Prints a table and, last, one line of JSON; writes plan.json; exit status 1 if a claim does not
hold. From the root of the checkout:

    python -m benchmarks.plan            # on a GPU: GPT-2 124M, 1024 tokens
    python -m benchmarks.plan --tiny     # anywhere: a very small model, on the CPU
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flashgpt.attention.measured import device_name
from flashgpt.config import preset
from flashgpt.measure import failure, memory_model, step_sample
from flashgpt.measure.memory_model import peak_at, seconds_at
from flashgpt.measure.plan import Setup, Way
from flashgpt.measure.step_sample import Measured
from flashgpt.runconfig import TrainConfig
from flashgpt.train import runtime
from flashgpt.train.checkpoint import write_json
from flashgpt.train.record import versions

OUT = Path(__file__).with_suffix("")
MEMORY_LIMIT, SPEED_LIMIT = 0.05, 0.10
VOCAB_SIZE, GIB = 50304, 2**30
# Ways, the small micro-batches that predict, and the large ones, in shares of the step's rows.
PLANS = (
    (Way(True, False), (1 / 16, 1 / 8), (1 / 2, 1)),
    (Way(False, False), (1 / 32, 1 / 16), (1 / 4,)),
    (Way(True, True), (1 / 16, 1 / 8), (1,)),
)


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=about)
    parser.add_argument("--preset", default="gpt2", help="shape of the model (gpt2)")
    parser.add_argument("--rows", type=int, default=64, help="sequences in a step (64)")
    parser.add_argument("--dropout", type=float, default=0.0, help="probability (0)")
    parser.add_argument("--seconds", type=float, default=140.0, help="for all of it (140)")
    parser.add_argument("--tiny", action="store_true", help="a very small model on the CPU")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the result")
    return parser.parse_args(argv)


def setup(wanted: argparse.Namespace) -> Setup:
    """The model, and the step that its micro-batches are parts of."""
    if wanted.tiny:
        shape = dict(context_length=16, emb_dim=64, n_heads=2, n_layers=2)
        cfg = preset("tiny", vocab_size=320, drop_rate=wanted.dropout, **shape)
        train, device = TrainConfig(compile="off", device="cpu"), torch.device("cpu")
    else:
        cfg = preset(wanted.preset, vocab_size=VOCAB_SIZE, drop_rate=wanted.dropout)
        train, device = TrainConfig(), runtime.device("auto")
    train = dataclasses.replace(train, tokens_per_step=wanted.rows * cfg.context_length)
    return Setup(cfg, train, device, limit_bytes=1, margin=0.0, seconds=wanted.seconds)


def sample(given: Setup, way: Way, rows: int) -> Measured:
    """Measures a micro-batch."""
    cfg = dataclasses.replace(given.cfg, use_flash=way.use_flash)
    again = way.activation_checkpointing
    train = dataclasses.replace(given.train, micro_batch=rows, activation_checkpointing=again)
    return step_sample.measure(cfg, train, given.device, lambda line: print(f"  {line}"))


class Clock:
    """How long samples take, and whether there is time for another one."""

    def __init__(self, seconds: float) -> None:
        self._end, self._longest = time.monotonic() + seconds, 0.0

    def sample(self, given: Setup, way: Way, rows: int) -> Measured | str:
        """Measures a micro-batch, or says why not."""
        start = time.monotonic()
        if start + self._longest > self._end:
            return "no time left"
        print(f"{way}, micro-batch {rows}", flush=True)
        try:
            return sample(given, way, rows)
        except RuntimeError as error:
            reason = failure.reason(error)
            if reason != failure.OUT_OF_MEMORY:
                raise
            return reason
        finally:
            self._longest = max(self._longest, time.monotonic() - start)


def compare(given: Setup, clock: Clock) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row for each large micro-batch, and what could not be measured."""
    rows, missing = [], []
    for way, small, large in PLANS:
        known: list[Measured] = []
        for share in (*small, *large):
            size = max(1, round(share * given.train.rows(given.cfg.context_length)))
            found = clock.sample(given, way, size)
            if isinstance(found, str):
                missing.append({"way": str(way), "micro_batch": size, "reason": found})
            elif share in small:
                known.append(found)
            elif len(known) == 2:
                rows.append(row(given, way, known, found))
    return rows, missing


def row(given: Setup, way: Way, known: Sequence[Measured], found: Measured) -> dict[str, Any]:
    """Predicted and measured, of one micro-batch."""
    tokens = found.rows * given.cfg.context_length
    peak = peak_at(known, found.rows, *given.off_the_line(found.rows))
    speed, predicted = tokens / found.seconds, tokens / seconds_at(known, found.rows)
    arithmetic = memory_model.predict(
        given.cfg,
        found.rows,
        recompute=way.activation_checkpointing,
        accumulates=found.gradients_bytes > 0,
    )
    return {
        "way": str(way),
        "micro_batch": found.rows,
        "from": [dataclasses.asdict(one) for one in known],
        "measured": dataclasses.asdict(found),
        "predicted_peak_bytes": peak,
        "peak_bytes": found.peak_bytes,
        "memory_error": peak / found.peak_bytes - 1,
        "predicted_tokens_per_second": predicted,
        "tokens_per_second": speed,
        "speed_error": predicted / speed - 1,
        "arithmetic_peak_bytes": arithmetic.total if way.use_flash else None,
    }


def judge(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The largest errors, and whether the claims hold."""
    memory, speed = (
        max((abs(one[name]) for one in rows), default=None)
        for name in ("memory_error", "speed_error")
    )
    hold = bool(rows) and memory <= MEMORY_LIMIT and speed <= SPEED_LIMIT
    return {"hold": hold, "memory_error": memory, "speed_error": speed}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table and a last line of JSON, writes the result."""
    wanted = options(argv)
    given = setup(wanted)
    rows, missing = compare(given, Clock(wanted.seconds))
    claims = judge(rows)
    record = {
        "claims": claims,
        "rows": rows,
        "missing": missing,
        "model": given.cfg.to_dict(),
        "rows_in_a_step": wanted.rows,
        "products": str(runtime.autocast_dtype("auto", given.device) or torch.float32),
        "machine": {"device": device_name(given.device.type), **versions()},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    wanted.out.mkdir(parents=True, exist_ok=True)
    write_json(wanted.out / "plan.json", record)
    show(rows, missing)
    print(json.dumps(claims))
    return 0 if claims["hold"] else 1


def show(rows: Sequence[dict[str, Any]], missing: Sequence[dict[str, Any]]) -> None:
    """The table."""
    print(f"\n{'':36} {'rows':>4} {'GiB':>7} {'off':>7} {'tokens/s':>9} {'off':>7} {'sums':>7}")
    for one in rows:
        sums = one["arithmetic_peak_bytes"]
        print(
            f"{one['way']:36} {one['micro_batch']:>4} {one['peak_bytes'] / GIB:>7.2f} "
            f"{one['memory_error']:>+7.1%} {one['tokens_per_second']:>9,.0f} "
            f"{one['speed_error']:>+7.1%} {'-' if sums is None else f'{sums / GIB:.2f}':>7}"
        )
    for one in missing:
        print(f"{one['way']:36} {one['micro_batch']:>4} {one['reason']}")
    print("off: predicted from two smaller micro-batches; sums: GiB by arithmetic alone")


if __name__ == "__main__":
    sys.exit(main())
