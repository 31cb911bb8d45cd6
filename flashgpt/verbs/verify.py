"""Proves on this machine that both settings of `use_flash` give the same numbers.

Every attention kernel that runs here, and a whole model with the switch on and off, forward and
gradients, dropout off and on, measured against float64. A value passes if its error is at most
twice (rms: 1.25 times) that of standard attention in the same precision, plus a floor of rounding;
"budget used" is the largest share of that. Dropout masks, causality and repeats are checked bit for
bit, memory when T doubles, and results that are known without attention. Exit status 0: everything
passed.

With --run: proves that the run goes on from a checkpoint bit for bit as if it had not stopped, on
both settings of the switch. The run is not touched.

examples:
  flashgpt verify
  flashgpt verify --checkpoint runs/demo
  flashgpt verify --full --json
  flashgpt verify --full --dtype bf16
  flashgpt verify --run runs/demo
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typing_extensions import Doc

from flashgpt.cli import UsageError
from flashgpt.verbs.parse import Flag, parse

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from flashgpt.attention.verify import Verdict
    from flashgpt.measure.audit import Audit
    from flashgpt.model.gpt2 import GPTModel


@dataclasses.dataclass(frozen=True)
class Args:
    """Options of `verify`."""

    checkpoint: Annotated[
        str | None, Doc("audit this run or GPT-2 folder; a small random model when left out")
    ] = None
    run: Annotated[str | None, Doc("prove that this run resumes bit for bit, and stop")] = None
    steps: Annotated[
        int | None, Doc("with --run: N of N + N steps against 2 N; 3 when left out")
    ] = None
    full: Annotated[bool, Flag, Doc("every size and shape of the grid (minutes, not seconds)")] = (
        False
    )
    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        Doc("of the kernels; auto: fp32 on a CPU, all three on a GPU"),
    ] = "auto"
    json: Annotated[bool, Flag, Doc("print one line of JSON, with every comparison")] = False


def main(argv: Sequence[str]) -> int:
    """Runs `flashgpt verify`."""
    args = parse(Args, "verify", argv, __doc__)
    import torch

    from flashgpt import orchestrator
    from flashgpt.config import preset
    from flashgpt.model.gpt2 import GPTModel
    from flashgpt.train.checkpoint import load
    from flashgpt.verbs.console import console

    out = console(stderr=args.json)
    if args.run:
        return _prove(out, Path(args.run), args)
    if args.steps is not None:
        raise UsageError("--steps is for --run; name a run, or leave it out")
    dtypes = _dtypes(args.dtype)
    if args.checkpoint:
        model, _ = load(args.checkpoint)
    else:
        torch.manual_seed(0)
        model = GPTModel(preset("tiny", vocab_size=512))
    for line in orchestrator.verification():
        out.print(line)
    found = audit(out, model, args.full, dtypes)
    if args.json:
        print(_json(found))
    return 0 if found.passed else 1


def _prove(out: Console, run: Path, args: Args) -> int:
    """N + N steps against 2 N on a run; prints what was compared, and the verdict."""
    from flashgpt.data.prepare import prepare
    from flashgpt.data.shards import TokenData
    from flashgpt.toml import load_toml
    from flashgpt.train.proof import prove
    from flashgpt.verbs.console import table

    steps = 3 if args.steps is None else args.steps
    if steps < 1:
        raise UsageError(f"--steps must be at least 1, got {steps}")
    if args.checkpoint or args.full:
        raise UsageError("--run stands alone; leave --checkpoint and --full out")
    if not (run / "config.toml").exists():
        raise ValueError(f"{run} is no run: it has no config.toml")
    data = TokenData.open(prepare(load_toml(run / "config.toml").data))
    with out.status("proving") as status:
        found = prove(run, data, steps, lambda text: status.update(f"proving {text}"), out.print)
    rows = [
        (
            f"use_flash = {row.use_flash}: {row.what}",
            f"{row.values:,}",
            "equal" if row.passed else f"differ by up to {row.largest:.1e}",
        )
        for row in found
    ]
    title = f"{steps} + {steps} steps against {2 * steps}"
    out.print(table(title, ("", "numbers", ""), rows))
    passed = all(row.passed for row in found)
    if passed:
        out.print("verdict: resumes bit for bit")
    else:
        out.print("verdict: FAILED; on a GPU train.deterministic = true makes steps repeat")
    if args.json:
        import json

        print(json.dumps({"passed": passed, "rows": [dataclasses.asdict(row) for row in found]}))
    return 0 if passed else 1


def _dtypes(name: str) -> tuple[torch.dtype, ...]:
    import torch

    from flashgpt import half_on_cpu
    from flashgpt.train.runtime import device

    if name == "bf16" and device("auto").type == "cpu" and (reason := half_on_cpu.refusal()):
        raise UsageError(f"--dtype bf16 is not for this CPU, where {reason}; use fp16")
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return () if name == "auto" else (names[name],)


def audit(
    out: Console, model: GPTModel, full: bool = False, dtypes: tuple[torch.dtype, ...] = ()
) -> Audit:
    """Runs the audit with a status line; prints table and verdict."""
    from flashgpt.measure.audit import run
    from flashgpt.train.runtime import device

    with out.status("verifying") as status:
        found = run(
            model,
            device("auto"),
            lambda text: status.update(f"verifying {text}"),
            full=full,
            dtypes=dtypes,
        )
    show(out, found)
    return found


def _json(found: Audit) -> str:
    """The audit and what it ran on, in one line."""
    import json

    from flashgpt.attention.measured import device_name
    from flashgpt.train.record import versions
    from flashgpt.train.runtime import device

    rows = [
        {**dataclasses.asdict(row), "passed": row.passed, "known": row.known} for row in found.rows
    ]
    machine = {"device": device_name(device("auto").type), **versions()}
    return json.dumps(
        {"passed": found.passed, "machine": machine, "checks": found.checks, "rows": rows}
    )


def show(out: Console, found: Audit) -> None:
    """Prints one row per kernel and tensor, worst case first, and the verdict."""
    from flashgpt.verbs.console import table

    worst: dict[tuple[str, str, str], Verdict] = {}
    for row in found.rows:
        kind = row.case.split(",")[0] if "," in row.case else ""  # model, decoding
        key = row.kernel, row.tensor, "same keys" if "same keys" in row.case else kind
        if key not in worst or row.used > worst[key].used:
            worst[key] = row
    rows = [
        (
            row.kernel,
            row.tensor,
            row.case,
            f"{row.max_error:.1e}",
            f"{row.standard_max_error:.1e}",
            f"{row.used:.0%}",
            "ok" if row.passed else "known" if row.known else "FAILED",
        )
        for row in worst.values()
        if row.kernel != "standard"
    ]
    columns = ("kernel", "tensor", "worst case", "error", "standard's", "budget used", "")
    out.print(table("errors against float64", columns, rows))
    for what, results in found.checks.items():
        names = ", ".join(f"{name} {'ok' if ok else 'FAILED'}" for name, ok in results.items())
        out.print(f"{what}: {names}")
    known = sum(row.known for row in found.rows)
    if known:
        out.print(
            f"known: {known} comparisons of PyTorch's half-precision kernels exceed the rule on "
            "hard values (docs/attention.md)"
        )
    if found.passed:
        count = len(found.rows) - known
        out.print(f"verdict: identical within the rule ({count} comparisons)")
    else:
        bad = sum(not (row.passed or row.known) for row in found.rows)
        out.print(f"verdict: FAILED ({bad} of {len(found.rows)} comparisons over budget)")
