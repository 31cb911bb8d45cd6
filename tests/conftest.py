"""What the tests of training, generation and the command line share: a CLI runner and one tiny run.

The tiny run is trained once by the CLI and is read only; copy it before changing anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flashgpt.cli import main
from flashgpt.config import PRESETS

# Without a GPU, Triton kernels run in Triton's interpreter; it has to know before it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

WORDS = ("cat", "sat", "mat", "old", "dogs", "ran", "over", "green", "hills", "and", "slept")
STEPS = 12
MEASURED = ("tokens_per_second", "data_seconds", "peak_memory_bytes")


@pytest.fixture(autouse=True, scope="session")
def _no_cache_of_this_user(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[None]:
    """Kernels are chosen as built in, whatever `bench attention --save` left here.

    Compiled code is kept from one run of the tests to the next.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHGPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        if pytestconfig.cache is not None and "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(pytestconfig.cache.mkdir("compiled")))
        yield


@pytest.fixture(autouse=True, scope="module")
def _no_garbage_in_libraries() -> None:
    """What was imported so far is not looked through again wherever garbage is collected."""
    gc.collect()
    gc.freeze()


@dataclasses.dataclass(frozen=True)
class Ran:
    """How a command ended."""

    status: int
    out: str
    err: str

    def error(self, status: int) -> str:
        """The one line of its error."""
        assert self.status == status, (self.status, self.out, self.err)
        assert self.err.count("\n") == 1 and self.err.startswith("flashgpt: "), self.err
        assert "Traceback" not in self.err
        return self.err

    def done(self) -> str:
        """The output of a command that did what it was asked."""
        assert self.status == 0, (self.status, self.out, self.err)
        return self.out


@dataclasses.dataclass(frozen=True)
class Run:
    """The folder of a run, read."""

    folder: Path

    @property
    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted((self.folder / "checkpoints").glob("step_*"))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The objects of metrics.jsonl, without what is measured in seconds and bytes."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        return [{k: v for k, v in e.items() if k not in MEASURED} for e in entries]

    def tensors(self, step: int = -1) -> dict[str, Tensor]:
        """Weights and optimizer state of a checkpoint (the last one when left out)."""
        names = {path.name: path for path in self.checkpoints}
        folder = self.checkpoints[-1] if step < 0 else names[f"step_{step:08d}"]
        state = load_file(folder / "trainer" / "optimizer.safetensors")
        return {**load_file(folder / "model.safetensors"), **state}

    def same_as(self, other: Run) -> bool:
        """Whether the last checkpoints agree bit for bit."""
        mine, others = self.tensors(), other.tensors()
        assert mine.keys() == others.keys() and len(mine) > 80
        return all(torch.equal(mine[name], others[name]) for name in mine)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs a command in this process: cli("train", "--out", folder) -> Ran."""

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = int(end.code or 0)
        return Ran(status, *capsys.readouterr())

    return run


@pytest.fixture
def short_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    """An audit on two cases and one closed form, once; tests/attention has the rest."""
    from flashgpt.attention import verify  # imports Triton

    cases = verify.quick_cases
    for grid in ("quick_cases", "full_cases"):
        monkeypatch.setattr(verify, grid, lambda *kind: cases(*kind)[:2])
    monkeypatch.setattr(verify, "SAME_KEYS", {1.0: verify.SAME_KEYS[1.0]})
    monkeypatch.setattr(verify, "MIN_SEEDS", 1)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset `tiny`, smaller still."""
    small = {**PRESETS["tiny"], "n_layers": 1, "emb_dim": 32, "context_length": 32}
    monkeypatch.setitem(PRESETS, "tiny", small)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all tests of this process."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def text(shared: Path) -> Path:
    """A learnable text: 300 lines of eight words, of 11 words in all."""
    rng = random.Random(0)
    lines = [" ".join(rng.choice(WORDS) for _ in range(8)) + ".\n" for _ in range(300)]
    (shared / "words.txt").write_text("".join(lines))
    return shared / "words.txt"


@pytest.fixture(scope="session")
def options(shared: Path, text: Path) -> list[str]:
    """Options of a tiny run with dropout: 12 steps, evaluated and saved every 4."""
    wanted = {
        "data.source": text,
        "data.tokenizer": "bytes",
        "data.cache": shared / "cache",
        "model.n-layers": 2,
        "model.emb-dim": 32,
        "model.n-heads": 2,
        "model.context-length": 32,
        "model.drop-rate": 0.1,
        "train.tokens-per-step": 128,
        "train.steps": STEPS,
        "train.checkpoint-every": 4,
        "train.eval-every": 4,
        "train.eval-tokens": 256,
        "train.lr": 1e-2,
        "sample.max-new-tokens": 8,
    }
    return [part for name, value in wanted.items() for part in (f"--{name}", str(value))]


@pytest.fixture
def train(options: list[str], cli: Callable[..., Ran]) -> Callable[..., Run]:
    """Trains a tiny run by the CLI: train(folder, "--train.seed", 3) -> Run."""

    def run(folder: Path, *more: object) -> Run:
        cli("train", *options, "--out", folder, *more).done()
        return Run(folder)

    return run


@pytest.fixture(scope="session")
def trained(shared: Path, options: list[str]) -> Run:
    """One tiny run, made once; read only."""
    folder = shared / "trained"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", *options, "--out", str(folder)]) == 0
    return Run(folder)


@pytest.fixture
def copied(trained: Run, tmp_path: Path) -> Run:
    """The tiny run, copied, to be damaged."""
    shutil.copytree(trained.folder, tmp_path / "copied")
    return Run(tmp_path / "copied")


@pytest.fixture
def flip() -> Callable[[Path, int], None]:
    """Changes one bit of the byte at a place of a file."""

    def change(path: Path, at: int) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)

    return change
