"""Proves on a user's own run that an interruption changes nothing: N + N steps against 2 N.

From the run's newest good checkpoint 2 N steps are done in one go, and again with a stop, a
checkpoint and a fresh start after N. What differs then is named. The run itself is not touched.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flashgpt.data.shards import TokenData
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import RunConfig
from flashgpt.toml import load_toml
from flashgpt.train import checkpoint
from flashgpt.train.trainer import Trainer

LOGGED = ("step", "loss", "lr", "grad_norm", "epoch")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One thing that must be equal bit for bit.

    Attributes:
        values: how many numbers were compared.
        largest: the largest difference; 0 when all are equal.
    """

    use_flash: bool
    what: str
    values: int
    largest: float

    @property
    def passed(self) -> bool:
        """Whether all are equal."""
        return self.largest == 0


def prove(
    run: Path,
    data: TokenData,
    steps: int,
    tell: Callable[[str], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
) -> list[Comparison]:
    """Compares `2 steps` steps in one go with twice `steps`, on both settings of the switch.

    Args:
        run: its folder. Its newest good checkpoint is where it starts; without one, at step 0.
        tell: hears what is done now.
        note: hears where it starts, and what was passed over.
    """
    start = None
    for found_there in checkpoint.good(run):
        if isinstance(found_there, checkpoint.Checkpoint):
            start = found_there
            break
        note(f"passed over: {found_there}")
    note(f"from {start.path}" if start else "from step 0: the run has no good checkpoint")
    found: list[Comparison] = []
    with tempfile.TemporaryDirectory(dir=run, prefix=".proof-") as scratch:
        for use_flash in (True, False):
            config = load_toml(run / "config.toml")
            model = dataclasses.replace(config.model, use_flash=use_flash)
            config = dataclasses.replace(config, model=model)
            place = Path(scratch) / f"flash-{use_flash}"
            found += _compare(start, run, data, config, steps, place, tell)
            shutil.rmtree(place)
    return found


def _compare(
    start: checkpoint.Checkpoint | None,
    run: Path,
    data: TokenData,
    config: RunConfig,
    steps: int,
    place: Path,
    tell: Callable[[str], None],
) -> list[Comparison]:
    first = start.step if start else 0
    last = first + 2 * steps
    use_flash = bool(config.model.use_flash)
    ends = {"whole": [last], "halves": [first + steps, last]}
    for name, stops in ends.items():
        if start is not None:
            shutil.copytree(start.path, place / name / checkpoint.FOLDER / start.path.name)
            if (run / "state.json").exists():
                shutil.copy(run / "state.json", place / name)
        for stop in stops:
            tell(f"use_flash = {use_flash}, {name}: to step {stop}")
            _train(config, data, place / name, stop, last)
    names = [place / name / checkpoint.FOLDER / checkpoint.name_of(last) for name in ends]
    files = {
        "weights": "model.safetensors",
        "optimizer": "trainer/optimizer.safetensors",
        "guard": "trainer/guard.safetensors",
    }
    found = [
        _difference(use_flash, what, *(load_file(path / file) for path in names))
        for what, file in files.items()
    ]
    logs = [_log(place / name / "metrics.jsonl", first) for name in ends]
    return [*found, _difference(use_flash, "losses, gradient norms, epochs", *logs)]


def _train(config: RunConfig, data: TokenData, out: Path, stop: int, last: int) -> None:
    """A fresh model and trainer, as a new process would make them, up to step `stop`."""
    train = dataclasses.replace(
        config.train,
        steps=max(config.train.steps, last),
        stop_at=stop,
        eval_every=0,
        eval_tokens=1,
        final_eval_tokens=1,
        checkpoint_every=0,
        log_every=1,
    )
    torch.manual_seed(train.seed)
    cfg = config.model.resolve(data.tokenizer.vocab_size)
    trainer = Trainer(GPTModel(cfg), data.tokenizer, train)
    trainer.fit(data, out, dataclasses.replace(config, train=train), resume=True)


def _log(path: Path, first: int) -> dict[str, Tensor]:
    entries: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [[float(entry[key]) for key in LOGGED] for entry in entries if entry["step"] > first]
    return {"log": torch.tensor(rows, dtype=torch.float64)}


def _difference(
    use_flash: bool, what: str, one: dict[str, Tensor], other: dict[str, Tensor]
) -> Comparison:
    largest = 0.0 if one.keys() == other.keys() else math.inf
    for name in one.keys() & other.keys():
        mine, others = one[name], other[name]
        if mine.shape != others.shape or mine.dtype != others.dtype:
            largest = math.inf
        elif not torch.equal(_bits(mine), _bits(others)):
            apart = float((mine.double() - others.double()).abs().max())
            largest = max(largest, math.inf if math.isnan(apart) else apart)
    return Comparison(use_flash, what, sum(tensor.numel() for tensor in one.values()), largest)


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: equal for two NaN of the same kind, and for nothing that differs."""
    return tensor.reshape(-1).contiguous().view(torch.uint8)
