"""What test_parallel.py looks at, trained in the processes that torchrun starts.

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 tests/train/processes.py \\
        train FOLDER/curve.toml --out FOLDER/chain --train.stop-at 20

FOLDER has curve.toml and pairs.toml; there come the runs, and result-RANK.json. First there is
`flashgpt train ...`, whose second process is killed in its thirteenth step, and which goes on in
the next start; then all other runs in the same processes; at last torchrun is stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flashgpt.cli import main
from flashgpt.data.prepare import prepare
from flashgpt.data.shards import TokenData
from flashgpt.launch import Launch
from flashgpt.model import gpt2
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import RunConfig
from flashgpt.toml import load_toml
from flashgpt.train import checkpoint, initial
from flashgpt.train.feed import Feed, MicroBatch
from flashgpt.train.loop import Listener
from flashgpt.train.parallel import ALONE, Parallel, started
from flashgpt.train.record import Record
from flashgpt.train.trainer import Trainer
from flashgpt.train.wrapping import wrap

Micros = list[MicroBatch]


def fit(
    run: RunConfig, out: Path, parallel: Parallel = ALONE, *, double: bool = False, **more: Any
) -> dict[str, Any]:
    """Trains, but draws nothing; what the process heard and how it ended."""
    data = TokenData.open(prepare(run.data))
    torch.manual_seed(run.train.seed)
    model = GPTModel(run.model.resolve(data.vocab_size))
    trainer = Trainer(model.double() if double else model, data.tokenizer, run.train, parallel)
    entries: list[dict[str, Any]] = []
    notes: list[str] = []
    listener = Listener(step=entries.append, note=notes.append)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "plot", lambda _: None)
        result = trainer.fit(data, out, run, listener=listener, **more)
    heard = {key: [entry[key] for entry in entries] for key in ("step", "loss", "grad_norm")}
    end = {"notes": notes, "steps": result.step, "interrupted": result.interrupted}
    found = result.evaluation
    return heard | end | {"val_loss": found and found.loss, "val_tokens": found and found.tokens}


@contextlib.contextmanager
def taking(change: Callable[[int, Micros], Micros]) -> Iterator[None]:
    """While entered, micro-batches are what `change` makes of them, by their step."""
    take = Feed.take
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Feed, "take", lambda self, step: change(step, take(self, step)))
        yield


def alike(_: int, micros: Micros) -> Micros:
    """Each micro-batch weighs as much as any other, whatever counts in it."""
    return [dataclasses.replace(micro, weight=0.25) for micro in micros]


def rows_from_zero(_: int, micros: Micros) -> Micros:
    """Rows are numbered in each process anew."""
    return [dataclasses.replace(micro, first_row=micro.first_row % 2) for micro in micros]


def broken(step: int, micros: Micros) -> Micros:
    """The third step has a loss that is not finite."""
    return [dataclasses.replace(m, weight=math.nan if step == 2 else m.weight) for m in micros]


def stopping(step: int, micros: Micros) -> Micros:
    """SIGTERM comes in the third step."""
    if step == 2:
        signal.raise_signal(signal.SIGTERM)
    return micros


def killed(step: int, micros: Micros) -> Micros:
    if step == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return micros


def ending(step: int, micros: Micros) -> Micros:
    """SIGTERM goes to torchrun in the third step, which waits until it has come back."""
    if step == 2:
        came, wakes = os.pipe()
        os.set_blocking(wakes, False)
        signal.set_wakeup_fd(wakes)
        os.kill(os.getppid(), signal.SIGTERM)
        os.read(came, 1)
        signal.set_wakeup_fd(-1)
    return micros


def in_second(
    parallel: Parallel | Launch, change: Callable[[int, Micros], Micros]
) -> contextlib.AbstractContextManager[None]:
    """`taking` in the second process, nothing in the first."""
    return taking(change) if parallel.rank == 1 else contextlib.nullcontext()


def seen_in_half_precision(run: RunConfig, parallel: Parallel) -> dict[str, Any]:
    """What the loss and a block see as their weights, in a forward and backward pass in bf16."""
    seen: dict[str, Any] = {}

    def note(name: str, weight: torch.Tensor) -> None:
        seen[name] = [type(weight).__name__, str(weight.dtype), list(weight.shape)]

    model = GPTModel(run.model.resolve(257))
    module = wrap(model, parallel, torch.bfloat16)
    layer = model.h[0].mlp.c_fc
    layer.register_forward_pre_hook(lambda layer, _: note("block", layer.weight))
    loss = gpt2.linear_cross_entropy
    ids = torch.arange(64).view(2, 32)
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(gpt2, "linear_cross_entropy", lambda *a: (note("head", a[1]), loss(*a))[1])
        module(ids, ids).backward()
    note("gradient", parallel.whole(model.wte.weight.grad))
    seen["tied"] = model.lm_head.weight is model.wte.weight
    return seen


def tuned(run: RunConfig, source: Path, parallel: Parallel) -> dict[str, Any]:
    """How far the weights of a run are from those that a model starts from."""
    model = GPTModel(run.model.resolve(257))
    wrap(model, parallel, None)
    note = initial.load_into(model, str(source), parallel)
    wanted = dict(checkpoint.load(source)[0].named_parameters())
    apart = [
        float((parallel.whole(p) - wanted[name]).abs().max())
        for name, p in model.named_parameters()
    ]
    return {"note": note, "apart": max(apart), "count": len(apart)}


def all_runs(folder: Path, parallel: Parallel) -> Iterator[tuple[str, dict[str, Any]]]:
    curve, pairs = (load_toml(folder / f"{name}.toml") for name in ("curve", "pairs"))
    ddp, fsdp = (dataclasses.replace(parallel, sharded=sharded) for sharded in (False, True))
    recomputed = dataclasses.replace(pairs.train, activation_checkpointing=True)
    yield "pairs-ddp", fit(pairs, folder / "pairs-ddp", ddp, double=True)
    again = dataclasses.replace(pairs, train=recomputed)
    yield "pairs-fsdp", fit(again, folder / "pairs-fsdp", fsdp, double=True)
    for wrong in (alike, rows_from_zero):
        with taking(wrong):
            yield wrong.__name__, fit(pairs, folder / wrong.__name__, ddp, double=True)
    for machines in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GROUP_WORLD_SIZE", str(machines))
            yield f"half-{machines}", seen_in_half_precision(curve, fsdp)
    yield "curve-ddp", fit(curve, folder / "curve-ddp", ddp)
    yield "curve-fsdp", fit(curve, folder / "curve-fsdp", fsdp)
    part = dataclasses.replace(curve, train=dataclasses.replace(curve.train, stop_at=35))
    yield "part", parallel.lead(lambda: fit(part, folder / "chain", resume=True))
    yield "chain", fit(curve, folder / "chain", fsdp, resume=True)
    for name, these in (("ddp", ddp), ("fsdp", fsdp)):
        yield f"tuned-{name}", tuned(curve, folder / "chain", these)
    short = dataclasses.replace(curve, train=dataclasses.replace(curve.train, steps=4))
    with in_second(parallel, broken):
        yield "broken", fit(short, folder / "broken", fsdp)
    with in_second(parallel, stopping):
        yield "stopping", fit(short, folder / "stopping", ddp)


if __name__ == "__main__":
    launch, there = Launch.here(), Path(sys.argv[2]).parent
    with in_second(launch, killed) if not launch.restarts else contextlib.nullcontext():
        if status := main():
            sys.exit(status)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "2"  # for names in the store that are not taken
    with started("ddp", torch.device("cpu")) as here:
        results = dict(all_runs(there, here))
        (there / f"result-{here.rank}.json").write_text(json.dumps(results))
        with in_second(here, ending):
            fit(load_toml(there / "curve.toml"), there / "ended", here)
