"""The training step of nanoGPT's model beside ours: speed and memory.

    nanogpt            compiled, PyTorch's fused attention: what its train.py runs
    nanogpt-standard   compiled, its own attention with all weights in memory
    nanogpt-eager      fused attention, not compiled
    ours               compiled, use_flash on: what our trainer runs
    ours-off           compiled, use_flash off
    ours-eager, ours-off-eager    the same, not compiled
    ours-graph         ours as one CUDA graph, which our trainer makes of small steps alone

A step is forward, loss, backward, clipping at 1 and AdamW (nanoGPT's as it makes it, ours as our
trainer makes it), on tokens that lie on the device, the same ones for all; bf16 autocast on CUDA
with TF32 allowed, as nanoGPT's train.py sets it, fp32 on the CPU, unless --precision says bf16 for
all ways, which nanoGPT's train.py does not do there. A GPU holds one way at a time; on the CPU all
are timed in turns. The batch `fit` is the largest that a GPU's memory holds, of the
multiples of 8 (below 8, the powers of two), found by trying; at most 9 are tried.

Time is the median over rounds of several steps each. Memory is the most that torch allocates, with
weights and optimizer; of a graph what torch reserves, which each row has as `reserved_bytes`.
Ratios compare with each of nanoGPT's ways of the same batch (or of fit) and dropout: tokens per
second over its tokens per second, peak over its peak. With --profile more steps run under
PyTorch's profiler, and each row has the milliseconds of its step by part
(flashgpt/measure/step_parts.py) and, on CUDA, by kernel; a graph those of its plain step, whose
kernels it replays.

A way that runs out of memory is reported, and the others go on; any other failure of ours ends
with status 1. Writes speed.json after each row (on the CPU after each batch), prints a table and,
last, one line of JSON. From the root of the checkout:

    python -m benchmarks.nanogpt_speed --nanogpt DIR --batch 16 fit --dropout 0 0.1
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import nanogpt
from benchmarks.fit import fit
from benchmarks.nanogpt_ways import GRAPH, PEERS, WAYS, Ready, peak, release, repeated, start, wait
from flashgpt.attention.measured import device_name
from flashgpt.config import PRESETS, GPTConfig
from flashgpt.measure import failure, memory_model, step_parts
from flashgpt.measure.clock import Call, alternate, milliseconds
from flashgpt.measure.step_parts import PARTS
from flashgpt.train import runtime
from flashgpt.train.checkpoint import write_json
from flashgpt.train.record import versions

SHAPES = {"small": "gpt2", "medium": "gpt2-medium", "large": "gpt2-large"}
SIZES = {"layers": "n_layers", "heads": "n_heads", "width": "emb_dim"}
FIT = "fit"  # the batch that is the largest to fit
WARM_UP = 3  # steps between the first one and those that are timed
PROFILED = 3  # steps

Row = dict[str, Any]


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `module` and `cfg` are nanoGPT's code and the shape."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nanogpt_speed", description=about)
    add = parser.add_argument
    nanogpt.add_folder(parser)
    add("--shape", choices=SHAPES, default="small", help="of the model: that of GPT-2 (small)")
    for name in SIZES:
        add(f"--{name}", type=int, help=f"{name} of the model, where not those of the shape")
    add(
        "--activation", choices=("gelu", "gelu_new"), default="gelu",
        help="GELU of our model: nanoGPT's, or GPT-2's own tanh form (gelu)",
    )  # fmt: skip
    add("--batch", nargs="+", default=["16"], help="rows of a step, or fit: all that fit (16)")
    add("--length", type=int, default=1024, help="tokens of a row (1024)")
    add("--vocab-size", type=int, default=50304, help="tokens of the vocabulary (50304)")
    add("--dropout", type=float, nargs="+", default=[0.0], help="probabilities (0)")
    add("--ways", nargs="+", choices=WAYS, default=WAYS[:2] + WAYS[3:5], help="what is measured")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of products (auto)")
    add("--rounds", type=int, default=5, help="rounds of each way (5)")
    add("--steps", type=int, default=10, help="steps of a round (10)")
    add("--profile", action="store_true", help="where the milliseconds of each way go")
    out = Path(__file__).parent / "nanogpt-speed"
    add("--out", type=Path, default=out, help="folder of the result")
    wanted = parser.parse_args(argv)
    sizes = {key: vars(wanted)[name] for name, key in SIZES.items() if vars(wanted)[name]}
    shape = {**PRESETS[SHAPES[wanted.shape]], "activation": wanted.activation, "drop_rate": 0.0}
    shape |= sizes
    shape |= {"vocab_size": wanted.vocab_size, "context_length": wanted.length}
    try:
        wanted.module = nanogpt.load(wanted.nanogpt)
        wanted.cfg = GPTConfig.from_dict(shape)
        wanted.autocast = runtime.autocast_dtype(wanted.precision, runtime.device("auto"))
        for p in wanted.dropout:
            dataclasses.replace(wanted.cfg, drop_rate=p)
    except ValueError as error:
        parser.error(str(error))
    for name in ("rounds", "steps"):
        if vars(wanted)[name] < 1:
            parser.error(f"--{name} must be at least 1, got {vars(wanted)[name]}")
    wanted.batch = [_batch(parser, text) for text in wanted.batch]
    if GRAPH in wanted.ways and not torch.cuda.is_available():
        parser.error(f"--ways {GRAPH} is a CUDA graph, and torch finds no CUDA device")
    return wanted


def _batch(parser: argparse.ArgumentParser, text: str) -> int | str:
    if text == FIT:
        if not torch.cuda.is_available():
            parser.error("--batch fit is of a GPU's memory, and torch finds no CUDA device")
        return text
    if not text.isdecimal() or int(text) < 1:
        parser.error(f"--batch must be fit or numbers of at least 1, got {text!r}")
    return int(text)


class Bench:
    """Measures ways on one device."""

    def __init__(self, wanted: argparse.Namespace, device: torch.device) -> None:
        self.wanted, self.device = wanted, device

    def rows(self) -> Iterator[Row]:
        """The rows of each dropout and batch, as they are done."""
        for p in self.wanted.dropout:
            for batch in self.wanted.batch:
                rows = [{"way": way, "dropout": p, "asked": batch} for way in self.wanted.ways]
                if self.device.type == "cpu":
                    self._in_turns(rows, p, batch)
                for row in rows:
                    if self.device.type != "cpu":
                        self._alone(row, p, batch)
                    yield row

    def _alone(self, row: Row, p: float, batch: int | str) -> None:
        """Measures one way, with the device to itself."""
        if batch == FIT:
            room = float(torch.cuda.mem_get_info(self.device)[0])
            # Weights and AdamW's two moments.
            fixed = 12.0 * memory_model.parameters(self.wanted.cfg)
            row["fit"] = fit(lambda rows: self._attempt(row, p, rows), room, fixed)
            batch = row["fit"]["batch"] or 0
            if not batch:
                row.setdefault("failed", failure.OUT_OF_MEMORY)
            if "failed" in row:
                return
        row["batch"] = batch
        try:
            self._measure(row, p)
        except Exception as error:  # out of memory, or a library: the others go on
            row["failed"] = failure.reason(error)
        release(self.device)

    def _attempt(self, row: Row, p: float, batch: int) -> float | None:
        """The peak of a batch, None where it does not fit."""
        found = None
        try:
            found = float(peak(start(row["way"], self.wanted, p, batch, self.device), self.device))
        except Exception as error:
            if (reason := failure.reason(error)) != failure.OUT_OF_MEMORY:
                row["failed"] = reason
        release(self.device)
        told = "does not fit" if found is None else f"{found / 2**30:.1f} GiB"
        print(f"{row['way']}, dropout {p:g}: batch {batch}: {told}", flush=True)
        return found

    def _measure(self, row: Row, p: float) -> None:
        ready = self._started(row, p)
        call = repeated(ready.step, self.wanted.steps)
        ms = [self._timer(call) for _ in range(self.wanted.rounds)]
        row["peak_bytes"] = peak(ready, self.device)
        if self.device.type == "cuda":
            row["reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)
        self._timed(row, ms, ready)

    def _in_turns(self, rows: Sequence[Row], p: float, batch: int) -> None:
        """Measures ways that are held together."""
        ready: dict[str, Ready] = {}
        by_way = {row["way"]: row for row in rows}
        for way, row in by_way.items():
            row["batch"] = batch
            try:
                made = self._started(row, p)
                row["peak_bytes"] = peak(made, self.device)
                ready[way] = made
            except Exception as error:
                row["failed"] = failure.reason(error)
        calls = {way: repeated(made.step, self.wanted.steps) for way, made in ready.items()}
        times = alternate(calls, self.wanted.rounds, self._timer, seconds=math.inf)
        for way, ms in times.items():
            self._timed(by_way[way], ms, ready[way])
        release(self.device)

    def _timed(self, row: Row, ms: list[float], ready: Ready) -> None:
        row["ms"] = ms
        if self.wanted.profile:
            call, median = repeated(ready.plain, PROFILED), statistics.median(ms)
            try:
                profile = step_parts.profile(call, PROFILED, self.device, median)
            except torch.OutOfMemoryError:  # beside a graph, whose memory stays
                print(f"{row['way']}: no memory for a plain step to profile", flush=True)
                return
            row["profile"] = dataclasses.asdict(profile)

    def _started(self, row: Row, p: float) -> Ready:
        """A way after its warm-up."""
        print(f"{row['way']}, batch {row['batch']}, dropout {p:g}", flush=True)
        ready = start(row["way"], self.wanted, p, row["batch"], self.device)
        repeated(ready.step, WARM_UP)()
        wait(self.device)
        row["first_step_seconds"] = ready.first_step_seconds
        row["kernels"] = ready.kernels
        return ready

    def _timer(self, call: Call) -> float:
        """Milliseconds of a step, of a call of several."""
        return milliseconds(call, self.device) / int(self.wanted.steps)


def compare(rows: Sequence[Row], length: int) -> None:
    """Adds tokens per second, and the ratios to nanoGPT's rows of the same dropout and batch."""
    done = [row for row in rows if "ms" in row]
    for row in done:
        row["tokens_per_second"] = row["batch"] * length / statistics.median(row["ms"]) * 1e3
    for row in done:
        row["against"] = {
            peer["way"]: {key: row[key] / peer[key] for key in ("tokens_per_second", "peak_bytes")}
            for peer in done
            if peer["way"] in PEERS
            and (peer["dropout"], peer["asked"]) == (row["dropout"], row["asked"])
        }


def holds(row: Row) -> bool:
    """Whether a row is no fault of ours: measured, out of memory, or nanoGPT's."""
    return row["way"] in PEERS or row.get("failed", failure.OUT_OF_MEMORY) == failure.OUT_OF_MEMORY


def line(row: Row, base: str) -> str:
    """A row of the table, with ratios to one of nanoGPT's ways."""
    batch = f"{row.get('batch', '-')}{'*' if row['asked'] == FIT else ''}"
    start = f"{row['way']:<17} {row['dropout']:>7g} {batch:>6}"
    if "failed" in row:
        return f"{start} failed: {row['failed'][:60]}"
    against = row["against"].get(base, {})
    ratios = [against.get(key) for key in ("tokens_per_second", "peak_bytes")]
    spread = f"{min(row['ms']):.2f} .. {max(row['ms']):.2f}"
    return (
        f"{start} {statistics.median(row['ms']):>9.2f} {spread:>19} "
        f"{row['tokens_per_second']:>10,.0f} {row['peak_bytes'] / 2**30:>6.2f} "
        f"{row['first_step_seconds']:>8.1f} "
        + " ".join("     -" if ratio is None else f"{ratio:>6.2f}" for ratio in ratios)
    )


def show(record: dict[str, Any], base: str) -> None:
    """The table."""
    print(
        f"\n{'way':<17} {'dropout':>7} {'batch':>6} {'ms/step':>9} {'range':>19} {'tokens/s':>10} "
        f"{'GiB':>6} {'first s':>8} {'speed':>6} {'memory':>6}"
    )
    for row in record["rows"]:
        print(line(row, base))
    profiled = [row for row in record["rows"] if "profile" in row]
    if profiled:
        print(f"\n{'milliseconds of a step':<32}" + "".join(f"{name:>11}" for name in PARTS))
    for row in profiled:
        parts = "".join(f"{ms:>11.2f}" for ms in row["profile"]["parts"].values())
        print(f"{row['way']:<17} {row['dropout']:>7g} {row['batch']:>6}{parts}")
    cfg, made = record["model"], record["machine"]
    print(
        f"speed (tokens/s) and memory as parts of {base}'s of the same dropout and batch; "
        "* the largest batch that fits\n"
        f"{cfg['n_layers']} layers, {cfg['n_heads']} heads, width {cfg['emb_dim']}, "
        f"{cfg['context_length']} tokens a row, our {cfg['activation']}, {record['products']}; "
        f"{made['device']}, torch {made['torch']}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the result after each row, prints the table."""
    wanted = options(argv)
    device = runtime.device("auto")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    record: dict[str, Any] = {
        "rows": [],
        "model": {**wanted.cfg.to_dict(), "drop_rate": "per row", "use_flash": "per row"},
        "options": {name: vars(wanted)[name] for name in ("ways", "rounds", "steps")},
        "nanogpt": {"model.py sha256": nanogpt.digest(wanted.nanogpt)},
        "products": "fp32" if wanted.autocast is None else "bf16",
        "machine": {"device": device_name(device.type), **versions()},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    wanted.out.mkdir(parents=True, exist_ok=True)
    base = next((way for way in PEERS if way in wanted.ways), PEERS[0])
    for row in Bench(wanted, device).rows():
        record["rows"].append(row)
        compare(record["rows"], wanted.length)
        write_json(wanted.out / "speed.json", record)
        print(line(row, base), flush=True)
    show(record, base)
    kept = ("way", "dropout", "batch", "tokens_per_second", "peak_bytes", "against", "failed")
    brief = [{key: row[key] for key in kept if key in row} for row in record["rows"]]
    print(json.dumps({"rows": brief}))
    return int(not all(map(holds, record["rows"])))


if __name__ == "__main__":
    sys.exit(main())
