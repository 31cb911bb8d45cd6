"""Around the steps: checkpoints, signals, a crash at any place of a save.

pytest tests/train/test_loop.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashgpt.train import checkpoint, loop
from flashgpt.train.parallel import Parallel
from flashgpt.train.saver import Saver

Cli = Callable[..., Any]


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_the_newest_checkpoints_and_the_best_stay(
    keep: int, tmp_path: Path, train: Callable[..., Any]
) -> None:
    every = ("--train.checkpoint-every", 2, "--train.eval-every", 2)
    every += ("--train.warmup-steps", 12, "--train.lr", 30)  # the further, the worse
    run = train(tmp_path / "run", *every, "--train.keep-checkpoints", keep)
    state = json.loads((run.folder / "state.json").read_text())
    names = [f"step_{step:08d}" for step in range(2, 13, 2)]
    expected = set(names[-keep:]) | {state["best"]} if keep else set(names)
    assert {path.name for path in run.checkpoints} == expected
    assert state["best"] != names[-1]
    assert list(run.folder.glob("checkpoints/.*")) == []


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_half_one(
    tmp_path: Path,
    train: Callable[..., Any],
    cli: Cli,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remove = checkpoint.shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        if "doomed-step" in str(path) and Path(path).exists():
            (path / "config.json").unlink()
            raise KeyboardInterrupt
        remove(path, **options)

    few = ("--train.checkpoint-every", 2, "--train.keep-checkpoints", 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        assert cli("train", *options, "--out", tmp_path / "run", *few).status == 130
    whole = train(tmp_path / "whole", *few)
    cli("train", "--resume", "--out", tmp_path / "run").done()
    resumed = type(whole)(tmp_path / "run")
    assert resumed.same_as(whole)
    assert list(resumed.folder.glob("checkpoints/.*")) == []


def test_a_folder_with_checkpoints_is_not_overwritten(
    copied: Any, cli: Cli, options: list[str]
) -> None:
    saving = copied.folder / "checkpoints" / ".saving-step_00000016"
    saving.mkdir()
    before = sorted(copied.folder.rglob("*"))
    refused = cli("train", *options, "--out", copied.folder).error(1)
    assert str(copied.folder) in refused and "--resume" in refused
    # Also what another process, which trains there, is saving just now.
    assert sorted(copied.folder.rglob("*")) == before and len(copied.metrics) == 12


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_loss_falls_on_text_that_can_be_learnt(
    tmp_path: Path, train: Callable[..., Any], kind: str
) -> None:
    options = ("--train.steps", 120, "--train.checkpoint-every", 0, "--train.optimizer", kind)
    learnt = train(tmp_path / "run", *options)
    first, last = learnt.metrics[0], learnt.metrics[-1]
    assert first["loss"] == pytest.approx(5.55, abs=0.15)  # ln 257 = 5.549
    assert last["loss"] < 2.0 and last["val_loss"] < 2.0
    assert [path.name for path in learnt.checkpoints] == ["step_00000120"]  # the last is saved


def test_a_bad_prompt_is_refused_before_training(
    tmp_path: Path, cli: Cli, options: list[str]
) -> None:
    for prompt, message in (("", "at least one token"), ("x" * 33, "at most context_length 32")):
        refused = cli("train", *options, "--out", tmp_path / "run", "--sample.prompt", prompt)
        assert message in refused.error(1)
    assert not (tmp_path / "run").exists()


GATED = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # as in a terminal
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from flashgpt.cli import main
from flashgpt.train.step import Stepper
launch = Stepper._launch
def gated(self, number, *rest):
    if number == 5:
        print("at the gate", flush=True)
        sys.stdin.readline()
    return launch(self, number, *rest)
Stepper._launch = gated
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_leaves_and_the_run_goes_on(
    tmp_path: Path, cli: Cli, options: list[str], trained: Any, number: signal.Signals
) -> None:
    command = [sys.executable, "-c", GATED, "train", *options, "--out", str(tmp_path / "run")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "at the gate\n":
                break
        process.send_signal(number)
        out, err = process.communicate("\n", timeout=120)
    assert process.returncode == 128 + number, err
    assert err == ""
    resume = f"flashgpt train --resume --out {tmp_path / 'run'}"
    assert "interrupted at step 6" in out and resume in out
    stopped = type(trained)(tmp_path / "run")
    assert stopped.checkpoints[-1].name == "step_00000006"
    assert not (stopped.folder / "samples.txt").exists()
    cli(*resume.split()[1:]).done()
    assert stopped.same_as(trained)
    assert stopped.metrics == trained.metrics


def test_the_last_step_is_saved_before_it_is_evaluated(
    tmp_path: Path, cli: Cli, options: list[str], trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that takes, and even if it is broken off."""
    evaluate = loop.evaluate

    def broken_off(*arguments: Any, max_tokens: int | None, **more: Any) -> Any:
        if max_tokens is None:
            raise KeyboardInterrupt
        return evaluate(*arguments, max_tokens=max_tokens, **more)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", broken_off)
        assert cli("train", *options, "--out", tmp_path / "run").status == 130
    run = type(trained)(tmp_path / "run")
    assert run.checkpoints[-1].name == "step_00000012" and run.same_as(trained)
    assert len(run.metrics) == 11
    assert "step 12: validation loss" in cli("train", "--resume", "--out", run.folder).done()
    assert run.metrics == trained.metrics and (run.folder / "samples.txt").exists()


def test_all_processes_wait_for_a_checkpoint_that_is_slow_to_write(
    tmp_path: Path, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host: NCCL ends a process that waits ten minutes for the first one."""
    lead, wait = Parallel.lead, Saver.wait
    under_way, together = list[Any](), list[bool]()

    def leading(self: Parallel, job: Callable[[], Any]) -> Any:
        under_way.append(job)
        try:
            return lead(self, job)
        finally:
            under_way.pop()

    def waiting(self: Saver) -> None:
        together.append(bool(under_way))
        wait(self)

    monkeypatch.setattr(Parallel, "lead", leading)
    monkeypatch.setattr(Saver, "wait", waiting)
    train(tmp_path / "run", "--train.checkpoint-every", 4)
    assert together == [True] * 4  # before each of three, and at the end


class Killed(BaseException):
    """Ends a save as kill -9 does: nothing is cleaned up."""


@pytest.mark.parametrize("place", ["fsync", "rename", "save_file"])
def test_a_kill_while_saving_loses_no_earlier_checkpoint(
    tmp_path: Path,
    cli: Cli,
    options: list[str],
    trained: Any,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    def armed(*arguments: Any, **keywords: Any) -> Any:
        if (tmp_path / "run" / "checkpoints" / ".saving-step_00000008").exists():
            raise Killed
        return original(*arguments, **keywords)

    owner: Any = {"fsync": os, "rename": Path, "save_file": checkpoint}[place]
    original = getattr(owner, place)
    monkeypatch.setattr(owner, place, armed)
    with pytest.raises(Killed):
        cli("train", *options, "--out", tmp_path / "run")
    monkeypatch.undo()
    folder = tmp_path / "run" / "checkpoints"
    left = {path.name for path in folder.iterdir()}
    assert left == {"step_00000004", ".saving-step_00000008"}
    assert checkpoint.load(tmp_path / "run")[0].cfg.n_layers == 2
    shown = cli("train", "--resume", "--out", tmp_path / "run").done()
    assert f"goes on from {folder / 'step_00000004'}" in shown
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert type(trained)(tmp_path / "run").same_as(trained)
    assert type(trained)(tmp_path / "run").metrics == trained.metrics
