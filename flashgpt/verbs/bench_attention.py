"""Time and memory of attention kernels on this machine, beside PyTorch's own doors.

Every kernel that runs here, forward and forward + backward, dropout off and on, over sequence
lengths at a constant number of tokens per call. All kernels of a length are timed in alternation;
times are medians with their range. FLOP are those that causal attention needs, whatever a kernel
spends. The peak is the speed of a large square product in the same run, and memory what torch
allocates beside q, k and v. OUT gets attention.json, speed.png and memory.png; the last line
printed is the content of attention.json.

examples:
  flashgpt bench attention
  flashgpt bench attention --lengths 256 1024 --dropout 0
  flashgpt bench attention --dtype fp32 --heads 16 --head-dim 128 --out bench/wide
  flashgpt bench attention --save
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typing_extensions import Doc

from flashgpt.verbs.bench import check_writable, environment, flop_unit, spread
from flashgpt.verbs.parse import Flag, parse, usage

if TYPE_CHECKING:
    from rich.console import Console

    from flashgpt.attention import measured
    from flashgpt.measure.bench_attention import Pass, Result, Setup, Timing

LENGTHS = {
    "cpu": (64, 128, 256, 512, 1024, 2048, 4096),
    "cuda": (256, 512, 1024, 2048, 4096, 8192, 16384),
}
TOKENS = {"cpu": 4096, "cuda": 65536}


@dataclasses.dataclass(frozen=True)
class Args:
    """Options of `bench attention`."""

    lengths: Annotated[
        tuple[int, ...], Doc("tokens per sequence; 64 to 4096 on a CPU, 256 to 16384 on a GPU")
    ] = ()
    tokens: Annotated[int | None, Doc("tokens per call; 4096 on a CPU, 65536 on a GPU")] = None
    heads: Annotated[int, Doc("attention heads")] = 12
    head_dim: Annotated[int, Doc("features per head")] = 64
    dropout: Annotated[float, Doc("probability where dropout is on; 0 leaves that out")] = 0.1
    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], Doc("auto: fp32 on a CPU, bf16 on a GPU")
    ] = "auto"
    rounds: Annotated[int, Doc("times each call is timed, at most")] = 7
    flex: Annotated[bool, Flag, Doc("FlexAttention too; compiles about 10 s per length")] = False
    out: Annotated[str, Doc("folder for attention.json and the pictures")] = "bench"
    save: Annotated[bool, Flag, Doc("let `use_flash` choose by this measurement here")] = False
    json: Annotated[bool, Flag, Doc("print nothing but the line of JSON")] = False


def main(argv: Sequence[str]) -> int:
    """Runs `flashgpt bench attention`."""
    args = parse(Args, "bench attention", argv, __doc__)
    from flashgpt.attention import measured
    from flashgpt.measure.plots import draw_attention
    from flashgpt.train.checkpoint import write_json
    from flashgpt.verbs.console import console

    with usage():
        setup = _setup(args)
    folder = Path(args.out)
    check_writable(folder)
    out = None if args.json else console()
    result = _measure(setup, out)
    where = environment(setup.device)
    dtype = str(setup.dtype).removeprefix("torch.")
    found = {
        "environment": where,
        "setup": {**dataclasses.asdict(setup), "dtype": dtype, "device": setup.device.type},
        **dataclasses.asdict(result),
    }
    title = (
        f"{where['device']}, {dtype}, {setup.heads} heads of {setup.head_dim}, "
        f"{setup.tokens:,} tokens per call, torch {where['torch']}, {where['date']}"
    )
    draw_attention(found["rows"], folder, title)
    write_json(folder / "attention.json", found)
    lines = [f"written to {folder}: attention.json, speed.png, memory.png"]
    if args.save:
        path = measured.save(_to_save(result, dtype), setup.device)
        lines.append(f"saved to {path}; `choose` now uses it on this device")
    if out is not None:
        _show(out, result, setup)
        for line in lines:
            out.print(line)
    print(json.dumps(found))
    return 0


def _setup(args: Args) -> Setup:
    import torch

    from flashgpt.measure.bench_attention import Setup
    from flashgpt.train.runtime import device

    here = device("auto")
    dtypes = {
        "auto": torch.bfloat16 if here.type == "cuda" else torch.float32,
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
    }
    return Setup(
        lengths=tuple(sorted(set(args.lengths))) or LENGTHS[here.type],
        tokens=TOKENS[here.type] if args.tokens is None else args.tokens,
        heads=args.heads,
        head_dim=args.head_dim,
        dropout=args.dropout,
        dtype=dtypes[args.dtype],
        device=here,
        rounds=args.rounds,
        flex=args.flex,
    )


def _measure(setup: Setup, out: Console | None) -> Result:
    from flashgpt.measure.bench_attention import measure
    from flashgpt.verbs.console import counting

    if out is None:
        return measure(setup)
    with counting(out) as progress:
        return measure(setup, out.print, lambda done, total: progress(done, total, "measuring"))


def _to_save(result: Result, dtype: str) -> list[measured.Row]:
    """The times that `choose` may use: those of our kernels, standard apart."""
    from flashgpt.attention.kernels import KERNELS
    from flashgpt.attention.measured import Row
    from flashgpt.attention.standard import NAME

    rows: dict[tuple[int, bool, bool], Row] = {}
    for row in result.rows:
        if row.kernel not in KERNELS or row.kernel == NAME:
            continue
        for gradient, timed in ((False, row.forward), (True, row.forward_backward)):
            if timed is not None:
                key = row.length, row.dropout, gradient
                kept = rows.setdefault(key, Row(dtype, *key, milliseconds={}))
                kept.milliseconds[row.kernel] = timed.ms
    return list(rows.values())


def _show(out: Console, result: Result, setup: Setup) -> None:
    """Prints the tables and who was refused."""
    from flashgpt.verbs.console import table

    peak = result.peak_flop_per_second
    unit, scale = flop_unit(peak)
    columns = (
        *("kernel", "T", "forward ms", "forward + backward ms"),
        *(unit, "of peak", "peak MiB", "x standard"),
    )
    for dropout in dict.fromkeys(row.dropout for row in result.rows):
        rows = [_cells(row, scale) for row in result.rows if row.dropout == dropout]
        title = f"\ndropout {f'{setup.dropout:g}' if dropout else 'off'}"
        out.print(table(title, columns, rows))
    out.print(
        f"\npeak: {peak / scale:,.1f} {unit}, a large square product; {unit}, of peak, MiB and "
        "x standard are of forward + backward, or of forward where there is no backward"
    )
    out.print("\nnot measured:")
    seen: dict[tuple[str, str], list[str]] = {}
    for refused in result.refused:
        what = f"dropout {'on' if refused.dropout else 'off'}"
        what += ", backward" if refused.gradient else ""
        if len(refused.lengths) < len(setup.lengths):
            what += f", T {', '.join(map(str, refused.lengths))}"
        seen.setdefault((refused.kernel, refused.reason), []).append(what)
    for (kernel, reason), cases in seen.items():
        out.print(f"  {kernel:14} {reason} ({'; '.join(cases)})")
    out.print()


def _cells(row: Timing, scale: float) -> tuple[str, ...]:
    own = row.forward_backward or row.forward
    return (
        row.kernel,
        f"{row.length}",
        _spread(row.forward),
        _spread(row.forward_backward),
        f"{own.flop_per_second / scale:,.1f}",
        f"{own.share_of_peak:.0%}",
        f"{row.peak_bytes / 2**20:,.1f}",
        "-" if row.times_standard is None else f"{row.times_standard:.2f}",
    )


def _spread(found: Pass | None) -> str:
    return "-" if found is None else spread(found.ms_min, found.ms, found.ms_max)
