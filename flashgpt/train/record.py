"""The folder of a run, and what is written there besides checkpoints.

config.toml     the run, complete; `flashgpt train config.toml` repeats it
metrics.jsonl   one object per logged step, evaluations included; NaN stands there as NaN
incidents/      a folder per step that the guard left out
loss.png        drawn from metrics.jsonl
samples.txt     text drawn from the model
state.json      last and best checkpoint, versions, revision, which kernels served
launch          by torchrun: which launch trained last, so that a restart knows its own run
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import logging
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flashgpt import __version__
from flashgpt.measure.plots import draw_loss
from flashgpt.runconfig import RunConfig
from flashgpt.toml import load_toml, to_toml
from flashgpt.train import checkpoint


class Record:
    """Writes the files of one run.

    Args:
        folder: the run's folder; is made when missing.
        writes: whether this process writes; else another one does, and the folder is left alone.

    Raises:
        OSError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self._writes = folder, writes
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
        self.metrics: list[dict[str, Any]] = []
        self.state: dict[str, Any] = {"last": None, "best": None, "best_val_loss": None}
        self.state["skipped"] = []  # ranges of steps that a rollback passed over

    def start(self, config: RunConfig, step: int) -> None:
        """Begins at `step`: drops what an interrupted run logged past it.

        Line by line, so that a last line cut short by a kill is dropped as well.
        """
        if not self._writes:
            return
        self.write_config(config)
        kept = []
        if step and self._metrics_path.exists():
            for line in self._metrics_path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    past = entry["step"] > step
                except (ValueError, TypeError, KeyError):
                    break
                if past:
                    break
                kept.append(entry)
        self.metrics = kept
        text = "".join(json.dumps(entry) + "\n" for entry in kept)
        checkpoint.write_text(self._metrics_path, text)
        if step:
            try:
                self.state |= checkpoint.read_state(self.folder)
            except ValueError as error:  # the checkpoint is good: go on, and choose the best anew
                logging.getLogger(__name__).warning("%s; the best checkpoint starts anew", error)
            if (self.state["best"] or "") > checkpoint.name_of(step):  # it is not on this way
                self.state |= {"best": None, "best_val_loss": None}

    def write_config(self, config: RunConfig) -> None:
        """Writes config.toml, unless the same one lies there."""
        path = self.folder / "config.toml"
        if not path.exists() or load_toml(path) != config:
            checkpoint.write_text(path, to_toml(config))

    def log(self, entry: dict[str, Any]) -> None:
        """Appends one object to metrics.jsonl."""
        if not self._writes:
            return
        self.metrics.append(entry)
        with (
            _naming(self._metrics_path),
            open(self._metrics_path, "a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(entry) + "\n")

    def saved(self, name: str, receipt: list[str]) -> None:
        """Notes the checkpoint just written."""
        self.state |= {"last": name, "receipt": receipt, "versions": versions()}
        self._write_state()

    def judged(self, name: str, val_loss: float) -> None:
        """Notes whether a checkpoint is the best one so far."""
        best = self.state["best_val_loss"]
        if best is None or val_loss < best:
            self.state |= {"best": name, "best_val_loss": val_loss}
            self._write_state()

    def _write_state(self) -> None:
        path = self.folder / "state.json"
        with _naming(path):
            checkpoint.write_json(path, self.state)

    def plot(self) -> None:
        """Draws loss.png."""
        if self._writes:
            draw_loss(self.metrics, self.folder / "loss.png", self.folder.name)

    @property
    def _metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Says of an error while writing which file it was, and what to do."""
    try:
        yield
    except OSError as error:
        text = f"{path} cannot be written: {error.strerror}; --resume goes on"
        raise OSError(error.errno, text) from error


def add_sample(folder: Path, step: int, text: str) -> None:
    """Appends a text drawn after `step` to the run's samples.txt."""
    with open(folder / "samples.txt", "a", encoding="utf-8") as file:
        file.write(f"--- after step {step} ---\n{text}\n")


def versions() -> dict[str, str | None]:
    """Versions of what computed the run; None of what is not installed, and the revision where
    flashgpt is no git checkout."""
    return {
        "flashgpt": __version__,
        "revision": _revision(Path(__file__).parents[1]),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _revision(package: Path) -> str | None:
    """The commit that the package's folder is at, with -dirty when its files differ from it."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    if shutil.which("git") is None or git("ls-files", "--error-unmatch", "__init__.py").returncode:
        return None  # not tracked: a package may lie in somebody's checkout of something else
    dirty = git("status", "--porcelain", "--untracked-files=no", ".").stdout.strip()
    return git("rev-parse", "HEAD").stdout.strip() + ("-dirty" if dirty else "")
