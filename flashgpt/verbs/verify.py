"""Proves on this machine that both settings of `use_flash` give the same numbers.

Every attention kernel that runs here, and a whole model with the switch on and off, forward and
gradients, dropout off and on, measured against float64. A value passes if its error is at most
twice (rms: 1.25 times) that of standard attention in the same precision, plus a floor of rounding;
"budget used" is the largest share of that. Exit status 0: everything passed.

examples:
  flashgpt verify
  flashgpt verify --checkpoint runs/demo
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from typing_extensions import Doc

from flashgpt.verbs.parse import parse

if TYPE_CHECKING:
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


def main(argv: Sequence[str]) -> int:
    """Runs `flashgpt verify`."""
    args = parse(Args, "verify", argv, __doc__)
    import torch

    from flashgpt import orchestrator
    from flashgpt.config import preset
    from flashgpt.model.gpt2 import GPTModel
    from flashgpt.train.checkpoint import load
    from flashgpt.verbs.console import console

    out = console()
    if args.checkpoint:
        model, _ = load(args.checkpoint)
    else:
        torch.manual_seed(0)
        model = GPTModel(preset("tiny", vocab_size=512))
    for line in orchestrator.verification():
        out.print(line)
    passed = audit(out, model).passed
    return 0 if passed else 1


def audit(out: Console, model: GPTModel) -> Audit:
    """Runs the audit with a status line; prints table and verdict."""
    from flashgpt.measure.audit import run
    from flashgpt.train.runtime import device

    with out.status("verifying") as status:
        found = run(model, device("auto"), note=lambda text: status.update(f"verifying {text}"))
    show(out, found)
    return found


def show(out: Console, found: Audit) -> None:
    """Prints one row per kernel and tensor, worst case first, and the verdict."""
    from flashgpt.verbs.console import table

    worst: dict[tuple[str, str, bool], tuple[float, Verdict]] = {}
    for row in found.rows:
        key = row.kernel, row.tensor, row.case.startswith("model")
        used = max(row.max_used, row.rms_used)
        if key not in worst or used > worst[key][0]:
            worst[key] = used, row
    rows = [
        (
            row.kernel,
            row.tensor,
            row.case,
            f"{row.max_error:.1e}",
            f"{row.standard_max_error:.1e}",
            f"{used:.0%}",
            "ok" if row.passed else "FAILED",
        )
        for used, row in worst.values()
        if row.kernel != "standard"
    ]
    columns = ("kernel", "tensor", "worst case", "error", "standard's", "budget used", "")
    out.print(table("errors against float64", columns, rows))
    checks = {
        "dropout masks equal bit for bit": found.masks,
        "no output depends on a later token": found.causal,
        "greedy tokens equal, switch on and off, cache on and off": {"model": found.greedy_equal},
    }
    for what, results in checks.items():
        names = ", ".join(f"{name} {'ok' if ok else 'FAILED'}" for name, ok in results.items())
        out.print(f"{what}: {names}")
    if found.passed:
        out.print(f"verdict: identical within the rule ({len(found.rows)} comparisons)")
    else:
        bad = sum(not row.passed for row in found.rows)
        out.print(f"verdict: FAILED ({bad} of {len(found.rows)} comparisons over budget)")
