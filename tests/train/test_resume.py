"""Resume: bit for bit the run that was not interrupted; what may change, and what is refused.

pytest tests/train/test_resume.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from flashgpt.data.batches import Batches
from flashgpt.model.gpt2 import GPTModel
from flashgpt.train import checkpoint, optimizer, step
from flashgpt.train.step import dropout_seed

Cli = Callable[..., Any]


@pytest.mark.parametrize(
    ("use_flash", "masks", "kind"),
    [
        (True, "shared", "adamw"),
        (True, "kernel", "adamw"),
        (False, "shared", "adamw"),
        (False, "kernel", "adamw"),
        (True, "shared", "muon"),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, train: Callable[..., Any], cli: Cli, use_flash: bool, masks: str, kind: str
) -> None:
    switch = ("--model.use-flash", use_flash, "--train.dropout-masks", masks)
    switch += ("--train.optimizer", kind)
    whole = train(tmp_path / "whole", *switch)
    halves = train(tmp_path / "halves", *switch, "--train.stop-at", 6)
    assert len(halves.metrics) == 6
    stopped = halves.checkpoints[-1]
    assert stopped.name == "step_00000006"
    shown = cli("train", "--resume", "--out", halves.folder).done()
    assert f"goes on from {stopped}" in shown
    assert halves.same_as(whole)
    kept = ("step", "loss", "lr", "grad_norm", "epoch")
    for mine, other in zip(halves.metrics, whole.metrics, strict=True):
        assert {k: mine[k] for k in kept} == {k: other[k] for k in kept}
    assert halves.metrics[-1] == whole.metrics[-1]  # evaluations too
    without = train(tmp_path / "without", *switch, "--model.drop-rate", 0)
    assert not without.same_as(whole)  # so dropout was on
    receipt = json.loads((whole.folder / "state.json").read_text())["receipt"]
    lines = [line for line in receipt if ", dropout" in line]
    assert lines and all((", own masks" in line) == (masks == "kernel") for line in lines)
    assert all(f"attention: {line}" in shown for line in lines)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
@pytest.mark.parametrize("use_flash", [True, False])
def test_a_compiled_run_goes_on_bit_for_bit(
    use_flash: bool, tmp_path: Path, train: Callable[..., Any], trained: Any, cli: Cli
) -> None:
    """Compiled once for all steps: seeds, rates, micro-batches, evaluations between, a resume."""
    small = ("--model.n-layers", 1, "--train.steps", 4, "--train.compile", "on")
    small += ("--model.use-flash", use_flash, "--train.micro-batch", 2, "--train.eval-every", 1)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        halves = train(tmp_path / "halves", *small, "--train.stop-at", 2)
        shown = cli("train", "--resume", "--out", halves.folder).done()
    assert "compiles the model" in shown and "runs without torch.compile" not in shown
    assert counters["frames"] == {"total": 1, "ok": 1}
    torch._dynamo.reset()  # as in another process
    counters.clear()
    whole = train(tmp_path / "whole", *small)
    kept = {name: n for name, n in counters["aot_autograd"].items() if "cache" in name}
    assert kept == {"autograd_cache_hit": 1}  # all was found that was made before
    assert counters["inductor"]["fxgraph_cache_hit"] == 2
    mine, other = halves.tensors(), whole.tensors()
    assert len(mine) > 40 and all(torch.equal(mine[name], other[name]) for name in mine | other)
    logs = [[(e["loss"], e["grad_norm"]) for e in run.metrics] for run in (halves, whole)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("lost", ["weights", "moments", "masks", "batches"])
def test_that_comparison_sees_anything_not_restored(
    trained: Any, copied: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    for newest in copied.checkpoints[-1:]:
        (newest / "config.json").unlink()  # so that it goes on from step 8
    if lost == "weights":
        monkeypatch.setattr(
            checkpoint.huggingface,
            "own_tensors",
            lambda cfg, *_: dict(GPTModel(cfg).named_parameters()),
        )
    elif lost == "moments":
        monkeypatch.setattr(optimizer.Optimizer, "load_state_tensors", lambda *_: None)
    elif lost == "masks":
        monkeypatch.setattr(step, "dropout_seed", lambda seed, at: dropout_seed(seed, at - 8))
    else:
        batch = Batches.batch
        monkeypatch.setattr(
            Batches, "batch", lambda self, step, *a, **k: batch(self, step - 8, *a, **k)
        )
    cli("train", "--resume", "--out", copied.folder).done()
    assert not copied.same_as(trained)


def test_resume_without_a_run_starts_at_0_and_says_so(
    tmp_path: Path, cli: Cli, options: list[str], trained: Any
) -> None:
    shown = cli("train", *options, "--resume", "--out", tmp_path / "new").done()
    assert f"no checkpoint in {tmp_path / 'new'}: starts at step 0" in shown
    assert type(trained)(tmp_path / "new").same_as(trained)


def test_resume_of_a_finished_run_does_nothing_and_says_so(copied: Any, cli: Cli) -> None:
    before = {path: path.stat().st_ino for path in copied.checkpoints}
    assert "step 12 of 12 is done" in cli("train", "--resume", "--out", copied.folder).done()
    assert {path: path.stat().st_ino for path in copied.checkpoints} == before
    assert len(copied.metrics) == 12


def test_more_steps_go_on_from_the_last(copied: Any, cli: Cli) -> None:
    cli("train", "--resume", "--out", copied.folder, "--train.steps", 14).done()
    assert [entry["step"] for entry in copied.metrics] == list(range(1, 15))
    assert copied.checkpoints[-1].name == "step_00000014"


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 7), ("tokens-per-step", 384), ("optimizer", "muon")]
)
def test_what_makes_batches_masks_and_moments_does_not_change_on_resume(
    name: str, value: object, copied: Any, cli: Cli
) -> None:
    command = ("train", "--resume", "--out", copied.folder, "--train.steps", 14)
    refused = cli(*command, f"--train.{name}", value).error(1)
    assert f"train.{name.replace('-', '_')} must be " in refused and f"got {value}" in refused
    assert len(copied.metrics) == 12


def test_other_changes_on_resume_are_said(copied: Any, cli: Cli) -> None:
    command = ("train", "--resume", "--out", copied.folder, "--train.steps", 14)
    shown = cli(*command, "--train.lr", 0.5, "--train.log-every", 2).done().splitlines()
    assert [line for line in shown if "from here on" in line] == [
        "train.steps is 14 from here on, was 12",
        "train.lr is 0.5 from here on, was 0.01",
    ]


@pytest.mark.parametrize(
    ("key", "value"), [("n-layers", 3), ("n-heads", 4), ("activation", "gelu"), ("qkv-bias", True)]
)
def test_another_model_does_not_resume(key: str, value: object, copied: Any, cli: Cli) -> None:
    refused = cli("train", "--resume", "--out", copied.folder, f"--model.{key}", value).error(1)
    assert f"model.{key.replace('-', '_')} must be " in refused and f"got {value}" in refused
    assert len(copied.metrics) == 12


def test_other_text_does_not_resume(copied: Any, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("other words " * 400)
    command = ("train", "--resume", "--out", copied.folder, "--data.source", tmp_path / "other.txt")
    refused = cli(*command, "--train.steps", 20).error(1)
    assert "was trained on other text or with another tokenizer" in refused
    assert len(copied.metrics) == 12
