"""Where a run starts: anew, or from its newest good checkpoint, and what it may change then."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from flashgpt.data.shards import TokenData
from flashgpt.interop.huggingface import read_config
from flashgpt.runconfig import TrainConfig
from flashgpt.train import checkpoint, runtime
from flashgpt.train.parallel import ALONE
from flashgpt.train.parts import Parts

LAUNCH = "launch"  # in a run's folder: the launch by torchrun that trained there last
# What a resumed run may not change: these make the batches, the masks and the optimizer's state.
FIXED = ("seed", "tokens_per_step", "optimizer")
# What it may change without a word: it takes part in no step. What several processes change they
# say by themselves.
FREE = (
    *("stop_at", "log_every", "eval_every", "eval_tokens", "final_eval_tokens"),
    *("checkpoint_every", "keep_checkpoints", "parallel"),
)


def check_start(config: TrainConfig, out: Path, resume: bool) -> None:
    """Refuses early what would fail after the data has been prepared.

    Raises:
        ValueError: `out` holds checkpoints and `resume` is off, it cannot be written, or a device
            or precision that this machine does not have.
    """
    runtime.autocast_dtype(config.precision, runtime.device(config.device))
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "cannot be written" if there.is_dir() else "is a file"
        raise ValueError(f"{there} {reason}; choose another --out")
    if not resume and checkpoint.steps(out):
        raise ValueError(f"{out} holds checkpoints; go on with --resume, or choose another --out")


def mark(out: Path, launch: str | None) -> None:
    """Notes which launch trains in a run's folder; None is no torchrun."""
    if launch is None:
        (out / LAUNCH).unlink(missing_ok=True)
    else:
        checkpoint.write_text(out / LAUNCH, launch)


def is_of(out: Path, launch: str | None, restarted: bool) -> bool:
    """Whether a launch, before it was restarted, trained in a folder.

    A mark with this name that was there before the first start is another launch's: it goes.
    """
    try:
        same = launch is not None and (out / LAUNCH).read_text(encoding="utf-8") == launch
    except (FileNotFoundError, NotADirectoryError):
        return False
    if same and not restarted:
        (out / LAUNCH).unlink()
    return same and restarted


def go_on(
    out: Path, data: TokenData, parts: Parts, note: Callable[[str], None]
) -> checkpoint.Checkpoint | None:
    """Loads the newest good checkpoint, and notes what was passed over and what changes.

    The first process chooses and reads; weights and moments are spread over all.

    Returns:
        the checkpoint; None when there is none: the run starts at step 0.

    Raises:
        ValueError: it is of another model or other text, or a setting of FIXED differs; or none of
            those that are there is good.
    """
    parallel = parts.parallel
    found, changes = parallel.lead(lambda: _newest(out, data, parts, note))
    if found is not None:
        checkpoint.load_into(found, parts)
    if changes:
        parts.guard.forget()  # what is usual may be something else from here on
    parallel.lead(lambda: checkpoint.set_aside(out, found.step if found else 0))
    if found is None:
        note(f"no checkpoint in {out}: starts at step 0")
        return None
    note(f"goes on from {found.path}")
    # Older checkpoints are of one process and do not say so.
    before, now = found.state.get("parallel", str(ALONE)), str(parallel)
    if before != now:
        note(f"steps are of {now} from here on, were of {before}: they round otherwise")
    for change in changes:
        note(change)
    return found


def _newest(
    out: Path, data: TokenData, parts: Parts, note: Callable[[str], None]
) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The newest good checkpoint, and what changes from it on; raises as `go_on`."""
    damaged = False
    for found in checkpoint.good(out):
        if isinstance(found, checkpoint.DamagedError):
            note(f"passed over: {found}")
            damaged = True
            continue
        if found.state["data"] != data.fingerprint:
            raise ValueError(
                f"{found.path} was trained on other text or with another tokenizer than "
                f"{data.folder}; restore the text, or start anew with another --out"
            )
        return found, _changes(found, parts)
    if damaged:  # to begin anew would write over the run's log
        raise ValueError(
            f"{out} has no good checkpoint to go on from; restore one, or start anew with another "
            "--out"
        )
    return None, []


def _changes(found: checkpoint.Checkpoint, parts: Parts) -> list[str]:
    """One line per setting that a resumed run changes for its steps to come.

    Raises:
        ValueError: a setting of FIXED differs; it is named.
    """
    there, here = read_config(found.path).to_dict(), parts.model.cfg.to_dict()
    changes = [
        f"model.{name} is {here[name]} from here on, was {there[name]}"
        for name in checkpoint.MAY_DIFFER
        if here[name] != there[name]
    ]
    now = dataclasses.asdict(parts.config)
    for name, before in found.state.get("train", {}).items():  # older checkpoints hold none
        if name in FREE or name not in now or now[name] == before:
            continue
        if name in FIXED:
            raise ValueError(
                f"train.{name} must be {before} as in {found.path}, got {now[name]}; "
                "choose another --out to start anew"
            )
        changes.append(f"train.{name} is {now[name]} from here on, was {before}")
    return changes
