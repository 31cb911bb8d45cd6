"""Speed and memory of a full training step on this machine, beside Hugging Face's GPT-2.

Forward, loss, backward, clipping, AdamW: with `use_flash` on and off, eager and compiled, for each
dropout, and of Hugging Face's GPT2LMHeadModel (PyTorch's fused attention, its own loss) with the
same shape, tokens and optimizer settings. bf16 autocast on a GPU, fp32 on a CPU. Compiling takes
about a minute per variant on a CPU. MFU is against the speed of a large square product in the same
run, peak memory counts weights, gradients and optimizer state, and the first step holds the
compilation. A profile of three more steps says where the milliseconds go. OUT gets train.json and
train.png; the last line printed is the content of train.json.

examples:
  flashgpt bench train
  flashgpt bench train --dropout 0 --compile off
  flashgpt bench train --preset gpt2-medium --batch 8 --no-peers --out bench/medium
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typing_extensions import Doc

from flashgpt.config import GPT2_VOCAB_SIZE, PRESETS, GPTConfig, preset
from flashgpt.verbs.bench import check_writable, environment, flop_unit, spread
from flashgpt.verbs.parse import Flag, parse, usage

if TYPE_CHECKING:
    from rich.console import Console

    from flashgpt.measure.bench_train import Result, Row, Setup

# Of the output head, for all models alike: a multiple of 64, which matrix units prefer.
VOCAB_SIZE = -(-GPT2_VOCAB_SIZE // 64) * 64
CPU_MODEL = {"vocab_size": 8192, "emb_dim": 384, "n_heads": 6, "n_layers": 6, "qkv_bias": True}
CONTEXT = {"cpu": 256, "cuda": 1024}
BATCH = {"cpu": 8, "cuda": 16}
STEPS = {"cpu": 2, "cuda": 10}


@dataclasses.dataclass(frozen=True)
class Args:
    """Options of `bench train`."""

    preset: Annotated[
        str | None,
        Doc(f"shape: {', '.join(PRESETS)}; gpt2 on a GPU, 6 layers of 384 on a CPU if left out"),
    ] = None
    context: Annotated[int | None, Doc("tokens per sequence; 256 on a CPU, 1024 on a GPU")] = None
    batch: Annotated[int | None, Doc("sequences per step; 8 on a CPU, 16 on a GPU")] = None
    dropout: Annotated[tuple[float, ...], Doc("probabilities to measure with")] = (0.0, 0.1)
    compile: Annotated[Literal["both", "on", "off"], Doc("on: compiled only; off: eager only")] = (
        "both"
    )
    no_peers: Annotated[bool, Flag, Doc("leave Hugging Face's model out")] = False
    steps: Annotated[int | None, Doc("steps in a round; 2 on a CPU, 10 on a GPU")] = None
    rounds: Annotated[int, Doc("rounds of each variant")] = 5
    out: Annotated[str, Doc("folder for train.json and the picture")] = "bench"
    json: Annotated[bool, Flag, Doc("print nothing but the line of JSON")] = False


def main(argv: Sequence[str]) -> int:
    """Runs `flashgpt bench train`."""
    args = parse(Args, "bench train", argv, __doc__)
    from flashgpt.measure.plots_train import draw_train
    from flashgpt.train.checkpoint import write_json
    from flashgpt.verbs.console import console

    with usage():
        setup = _setup(args)
    folder = Path(args.out)
    check_writable(folder)
    out = None if args.json else console()
    result = _measure(setup, out)
    found = _found(setup, result)
    draw_train(found["rows"], folder / "train.png", _title(found))
    write_json(folder / "train.json", found)
    if out is not None:
        _show(out, result)
        out.print(f"written to {folder}: train.json, train.png")
    print(json.dumps(found))
    return 0


def _setup(args: Args) -> Setup:
    from flashgpt.measure.bench_train import Setup
    from flashgpt.train.runtime import device

    here = device("auto")
    context = CONTEXT[here.type] if args.context is None else args.context
    if args.preset is None and here.type == "cpu":
        cfg = GPTConfig.from_dict({**CPU_MODEL, "context_length": context, "drop_rate": 0.0})
    else:
        name = args.preset or "gpt2"
        cfg = preset(name, vocab_size=VOCAB_SIZE, context_length=context, drop_rate=0.0)
    return Setup(
        cfg=cfg,
        batch=BATCH[here.type] if args.batch is None else args.batch,
        dropouts=tuple(dict.fromkeys(args.dropout)),
        compile=args.compile,
        peers=not args.no_peers,
        steps=STEPS[here.type] if args.steps is None else args.steps,
        rounds=args.rounds,
        device=here,
    )


def _measure(setup: Setup, out: Console | None) -> Result:
    from flashgpt.measure.bench_train import measure
    from flashgpt.verbs.console import counting

    if out is None:
        return measure(setup)
    with counting(out) as progress:
        return measure(setup, out.print, lambda done, total: progress(done, total, "measuring"))


def _found(setup: Setup, result: Result) -> dict[str, Any]:
    """The content of train.json."""
    from flashgpt.measure.step_parts import MEANING
    from flashgpt.measure.train_variants import HUGGING_FACE

    where = environment(setup.device)
    if any(row.model == HUGGING_FACE for row in result.rows):
        import transformers

        where["transformers"] = transformers.__version__
    precision = "fp32" if setup.autocast is None else "bf16 autocast"
    return {
        "environment": where,
        "setup": {
            **dataclasses.asdict(setup),
            "device": setup.device.type,
            "precision": precision,
        },
        "parts": MEANING,
        **dataclasses.asdict(result),
    }


def _title(found: dict[str, Any]) -> str:
    cfg, setup, where = found["setup"]["cfg"], found["setup"], found["environment"]
    return (
        f"{found['parameters'] / 1e6:.0f}M parameters, {setup['batch']} x {cfg['context_length']} "
        f"tokens, {setup['precision']}\n{where['device']}, torch {where['torch']}, {where['date']}"
    )


def _show(out: Console, result: Result) -> None:
    """Prints the tables and who was refused."""
    from flashgpt.measure.step_parts import MEANING, PARTS
    from flashgpt.verbs.console import table

    columns = (
        *("model", "", "tokens/s", "ms per step", "MFU", "peak MiB", "first step s"),
        "attention",
    )
    for p in dict.fromkeys(row.dropout for row in result.rows):
        rows = [row for row in result.rows if row.dropout == p]
        out.print(table(f"\ndropout {p:g}", columns, [_cells(row) for row in rows]))
        shares = [
            (row.model, _how(row), *(f"{row.parts[name]:,.1f}" for name in PARTS)) for row in rows
        ]
        out.print(table("\nmilliseconds of a step", ("model", "", *PARTS), shares))
    out.print()
    for name in PARTS:
        out.print(f"  {name:10} {MEANING[name]}")
    unit, scale = flop_unit(result.peak_flop_per_second)
    out.print(
        f"\nMFU: {result.flop_per_token / 1e6:,.1f} MFLOP per token, of {unit} "
        f"{result.peak_flop_per_second / scale:,.1f}, a large square product"
    )
    if result.refused:
        out.print("\nnot measured:")
    for refused in result.refused:
        out.print(f"  {refused}: {refused.reason}")
    out.print()


def _how(row: Row) -> str:
    return f"{'compiled' if row.compiled else 'eager'}{', graph' if row.graph else ''}"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.model,
        _how(row),
        f"{row.tokens_per_second:,.0f}",
        spread(row.ms_min, row.ms, row.ms_max),
        f"{row.mfu:.1%}",
        f"{row.peak_bytes / 2**20:,.0f}",
        f"{row.first_step_seconds:,.1f}",
        ", ".join(row.kernels) or "its own",
    )
