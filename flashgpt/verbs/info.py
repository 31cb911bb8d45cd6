"""Versions, devices, and which attention kernels can run here; of a run, what it was run with.

examples:
  flashgpt info
  flashgpt info runs/demo
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated

from typing_extensions import Doc

from flashgpt.verbs.parse import Positional, parse


@dataclasses.dataclass(frozen=True)
class Args:
    """Options of `info`."""

    run: Annotated[str | None, Positional, Doc("a run's folder")] = None


def main(argv: Sequence[str]) -> int:
    """Runs `flashgpt info`."""
    args = parse(Args, "info", argv, __doc__)
    from flashgpt.verbs.console import console

    lines = _machine() if args.run is None else _run(args.run)
    out = console()
    for line in lines:
        out.print(line)
    return 0


def _named(versions: Mapping[str, str | None]) -> list[str]:
    return [f"{name} {version or '(none)'}" for name, version in versions.items()]


def _machine() -> list[str]:
    import torch

    from flashgpt import half_on_cpu
    from flashgpt.attention.kernels import KERNELS, choose, refusal
    from flashgpt.attention.request import Request
    from flashgpt.train.record import versions
    from flashgpt.train.runtime import device

    here = device("auto")
    lines = _named(versions())
    lines.append(f"CPU threads: {torch.get_num_threads()}")
    if here.type == "cuda":
        lines.append(f"GPU: {torch.cuda.get_device_name()} ({torch.cuda.device_count()})")
    else:
        lines.append("GPU: none that torch can use")
        reason = half_on_cpu.refusal()
        lines.append(f"train.precision bf16: {'runs' if reason is None else f'no: {reason}'}")
    dtype = torch.bfloat16 if here.type == "cuda" else torch.float32
    for dropout in (False, True):
        request = Request(here.type, dtype, 64, 1024, "square", dropout, False, True, False)
        lines.append(f"attention kernels for {request}:")
        for name in KERNELS:
            reason = refusal(name, request)
            lines.append(f"  {name:15} {'runs' if reason is None else f'no: {reason}'}")
        choice = choose(request)
        lines.append(f"  chosen: {choice.kernel} ({choice.order or 'built-in order'})")
    return lines


def _run(run: str) -> list[str]:
    from pathlib import Path

    from flashgpt.train.checkpoint import Checkpoint, good, read_state

    folder = Path(run)
    state = read_state(folder)
    lines = _named(state["versions"])
    lines.append(f"last checkpoint: {state['last']}")
    lines.append(f"best checkpoint: {state['best']} (validation loss {state['best_val_loss']})")
    for found in good(folder):
        if isinstance(found, Checkpoint):
            lines.append(f"  {found.path.name}: digests match")
        else:
            lines.append(f"  {found}")
    return [*lines, "attention kernels that served:", *(f"  {line}" for line in state["receipt"])]
