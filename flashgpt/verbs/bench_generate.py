"""Speed of writing on this machine, beside Hugging Face's GPT-2 and the limit of its memory.

Greedy texts of random weights, the same ones for all: the time to the first token after a prompt of
1,000 tokens (or as many as the context has), and tokens per second of texts side by side.

  ours     as flashgpt generate writes
  dynamic  Hugging Face's generate as it comes
  static   the same with a static cache and torch.compile, half a minute for each batch

The limit is what memory, read as fast as a large tensor in the same run, gives: every weight once,
and the keys and values of each text. A model that fits in a cache may pass it. Tokens are compared:
in fp32 they are equal but for near ties, in bf16 each way rounds in its own order. OUT gets
generate.json and generate.png; the last line printed is the content of generate.json.

examples:
  flashgpt bench generate
  flashgpt bench generate --ways ours --batches 1 4 16
  flashgpt bench generate --preset gpt2-medium --dtype fp32 --compiled-batches 1 --out bench/medium
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typing_extensions import Doc

from flashgpt.config import PRESETS, preset
from flashgpt.verbs.bench import check_writable, environment, spread
from flashgpt.verbs.parse import Flag, parse, usage

if TYPE_CHECKING:
    from rich.console import Console

    from flashgpt.measure.generate_record import Result, Row, Setup

Way = Literal["ours", "dynamic", "static"]
BATCHES = {"cpu": (1, 8), "cuda": (1, 8, 32, 128)}
COMPILED = {"cpu": (1,), "cuda": (1, 8, 32, 128)}
TOKENS = {"cpu": 16, "cuda": 128}
ROUNDS = {"cpu": 3, "cuda": 5}


@dataclasses.dataclass(frozen=True)
class Args:
    """Options of `bench generate`."""

    preset: Annotated[str, Doc(f"shape: {', '.join(PRESETS)}")] = "gpt2"
    ways: Annotated[tuple[Way, ...], Doc("who writes")] = ("ours", "dynamic", "static")
    batches: Annotated[
        tuple[int, ...] | None, Doc("texts side by side; 1 8 on a CPU, 1 8 32 128 on a GPU")
    ] = None
    compiled_batches: Annotated[
        tuple[int, ...] | None, Doc("those that static is measured at; 1 on a CPU, all on a GPU")
    ] = None
    prompt: Annotated[int | None, Doc("tokens before each text; 16 on a CPU, 128 on a GPU")] = None
    new_tokens: Annotated[int | None, Doc("tokens of each text; 16 on a CPU, 128 on a GPU")] = None
    dtype: Annotated[
        Literal["auto", "fp32", "bf16"], Doc("of weights and cache; auto: fp32 on a CPU, else bf16")
    ] = "auto"
    rounds: Annotated[int | None, Doc("rounds of each way; 3 on a CPU, 5 on a GPU")] = None
    out: Annotated[str, Doc("folder for generate.json and the picture")] = "bench"
    json: Annotated[bool, Flag, Doc("print nothing but the line of JSON")] = False


def main(argv: Sequence[str]) -> int:
    """Runs `flashgpt bench generate`."""
    args = parse(Args, "bench generate", argv, __doc__)
    from flashgpt.measure.generate_record import record
    from flashgpt.measure.plots_generate import draw_generate
    from flashgpt.train.checkpoint import write_json
    from flashgpt.verbs.console import console

    with usage():
        setup = _setup(args)
    folder = Path(args.out)
    check_writable(folder)
    out = None if args.json else console()
    result = _measure(setup, out)
    found = record(setup, result, environment(setup.device))
    draw_generate(found, folder / "generate.png", _title(found))
    write_json(folder / "generate.json", found)
    if out is not None:
        _show(out, result)
        out.print(f"written to {folder}: generate.json, generate.png")
    print(json.dumps(found))
    return 0


def _setup(args: Args) -> Setup:
    import torch

    from flashgpt.measure.generate_record import Setup
    from flashgpt.train.runtime import device

    here = device("auto")
    cfg = preset(args.preset, drop_rate=0.0)
    few = min(TOKENS[here.type], cfg.context_length // 2)
    half = args.dtype == "bf16" or (args.dtype == "auto" and here.type == "cuda")
    batches = BATCHES[here.type] if args.batches is None else args.batches
    compiled = COMPILED[here.type] if args.compiled_batches is None else args.compiled_batches
    return Setup(
        cfg=cfg,
        dtype=torch.bfloat16 if half else torch.float32,
        ways=tuple(dict.fromkeys(args.ways)),
        batches=tuple(sorted(set(batches))),
        compiled_batches=compiled,
        prompt=few if args.prompt is None else args.prompt,
        new_tokens=few if args.new_tokens is None else args.new_tokens,
        rounds=ROUNDS[here.type] if args.rounds is None else args.rounds,
        device=here,
    )


def _measure(setup: Setup, out: Console | None) -> Result:
    from flashgpt.measure.bench_generate import measure
    from flashgpt.verbs.console import counting

    if out is None:
        return measure(setup)
    with counting(out) as progress:
        return measure(setup, out.print, lambda done, total: progress(done, total, "measuring"))


def _title(found: dict[str, Any]) -> str:
    setup, where = found["setup"], found["environment"]
    return (
        f"{found['parameters'] / 1e6:.0f}M parameters, {setup['dtype']}, {setup['prompt']} + "
        f"{setup['new_tokens']} tokens a text\n{where['device']}, torch {where['torch']}, "
        f"{where['date']}"
    )


def _show(out: Console, result: Result) -> None:
    """Prints the tables and who was refused."""
    from flashgpt.measure.generate_ways import WAYS as NAMES
    from flashgpt.verbs.console import table

    columns = ("", "tokens/s", "ms per step", "of limit", "first text s", "tokens")
    for batch in dict.fromkeys(row.batch for row in result.rows):
        rows = [row for row in result.rows if row.batch == batch]
        limit = rows[0].limit_tokens_per_second
        title = f"\nbatch {batch}, limit {limit:,.0f} tokens/s"
        out.print(table(title, columns, [(NAMES[row.way], *_cells(row)) for row in rows]))
    if result.first:
        title = f"\nfirst token after {result.first[0].prompt:,}"
        first = [(NAMES[one.way], spread(one.ms_min, one.ms, one.ms_max)) for one in result.first]
        out.print(table(title, ("", "ms"), first))
    out.print(
        f"\nlimit: {result.weight_bytes / 2**20:,.0f} MiB of weights a step and "
        f"{result.cache_bytes / 2**20:,.1f} MiB of keys and values a text, at "
        f"{result.bytes_per_second / 1e9:,.1f} GB/s, the speed of a large tensor"
    )
    if result.refused:
        out.print("\nnot measured:")
    for refused in result.refused:
        out.print(f"  {refused}: {refused.reason}")
    out.print()


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"{row.tokens_per_second:,.0f}",
        spread(row.ms_min, row.ms, row.ms_max),
        f"{row.share:.1%}",
        f"{row.first_call_seconds:,.1f}",
        _compared(row),
    )


def _compared(row: Row) -> str:
    if row.way == "ours":
        return ""
    if row.differing is None:
        return "not compared"
    if row.differs_at is None:
        return "equal"
    return f"{row.differing} differ from token {row.differs_at + 1}"
