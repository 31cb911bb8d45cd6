"""Training: exact resume, micro-batches, refusals, signals, a crash at any place of a save.

pytest tests/train/test_loop.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgpt import orchestrator
from flashgpt.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from flashgpt.data.prepare import prepare
from flashgpt.data.shards import TokenData
from flashgpt.model.gpt2 import GPTModel
from flashgpt.toml import load_toml
from flashgpt.train import loop, optimizer, runtime
from flashgpt.train.loop import Listener, Trainer, dropout_seed

Cli = Callable[..., Any]


@pytest.fixture
def run(shared: Path, text: Path) -> RunConfig:
    """The tiny run as a config, without evaluations on the way."""
    return RunConfig(
        ModelConfig(n_layers=2, emb_dim=32, n_heads=2, context_length=32, drop_rate=0.1),
        DataConfig((str(text),), "bytes", cache=str(shared / "cache")),
        TrainConfig(steps=3, tokens_per_step=128, lr=1e-2, eval_every=0),
        SampleConfig(max_new_tokens=1),
    )


@pytest.fixture
def data(run: RunConfig) -> TokenData:
    return TokenData.open(prepare(run.data))


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


def test_activation_checkpointing_changes_no_bit(
    tmp_path: Path, train: Callable[..., Any], trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    switched: list[bool] = []
    set_checkpointing = GPTModel.set_checkpointing
    monkeypatch.setattr(
        GPTModel,
        "set_checkpointing",
        lambda self, on: (switched.append(on), set_checkpointing(self, on)),
    )
    run = train(tmp_path / "run", "--train.activation-checkpointing", True)
    assert switched == [True]
    assert run.same_as(trained) and run.metrics == trained.metrics


@pytest.mark.parametrize("lost", ["weights", "moments", "masks", "batches"])
def test_that_comparison_sees_anything_not_restored(
    trained: Any, copied: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    for checkpoint in copied.checkpoints[-1:]:
        (checkpoint / "config.json").unlink()  # so that it goes on from step 8
    if lost == "weights":
        monkeypatch.setattr(loop.checkpoint.huggingface, "load_weights", lambda *_: None)
    elif lost == "moments":
        monkeypatch.setattr(optimizer.Optimizer, "load_state_tensors", lambda *_: None)
    elif lost == "masks":
        monkeypatch.setattr(loop, "dropout_seed", lambda seed, step: dropout_seed(seed, step - 8))
    else:
        batch = loop.Batches.batch
        monkeypatch.setattr(
            loop.Batches, "batch", lambda self, step, *a, **k: batch(self, step - 8, *a, **k)
        )
    cli("train", "--resume", "--out", copied.folder).done()
    assert not copied.same_as(trained)


def test_resume_without_a_run_starts_at_0_and_says_so(
    tmp_path: Path, cli: Cli, options: list[str], trained: Any
) -> None:
    shown = cli("train", *options, "--resume", "--out", tmp_path / "new").done()
    assert f"no good checkpoint in {tmp_path / 'new'}: starts at step 0" in shown
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
    remove = loop.checkpoint.shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        if "old-step" in str(path) and Path(path).exists():
            (path / "config.json").unlink()
            raise KeyboardInterrupt
        remove(path, **options)

    few = ("--train.checkpoint-every", 2, "--train.keep-checkpoints", 1)
    with monkeypatch.context() as patch:
        patch.setattr(loop.checkpoint.shutil, "rmtree", killed)
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


def _double(run: RunConfig, data: TokenData, out: Path, micro: int | None) -> Any:
    """Trains in float64; losses and weights."""
    section = TrainConfig(**{**vars(run.train), "micro_batch": micro})
    torch.manual_seed(section.seed)
    cfg = run.model.resolve(data.vocab_size)
    model = GPTModel(cfg).double()
    losses: list[float] = []
    trainer = Trainer(model, data.tokenizer, section)
    trainer.fit(data, out, run, listener=Listener(step=lambda e: losses.append(e["loss"])))
    return losses, [p.detach() for p in model.parameters()]


def test_micro_batches_make_the_same_step(
    tmp_path: Path, run: RunConfig, data: TokenData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Budget: float64 sums of up to 128 terms in another order err by 128 roundings, 3e-14, of
    the largest gradient. AdamW divides by |gradient| + 1e-8, so of a gradient near zero that error
    may become 3e-6 of the rate: 3 steps at 1e-2 make 1e-7. Losses are logged as sums of up to 4
    float32: 4 roundings. Other masks or other rows change both by more than 1e-3.
    """
    losses, weights = _double(run, data, tmp_path / "whole", None)
    for micro in (1, 2):
        found, moved = _double(run, data, tmp_path / f"micro{micro}", micro)
        for a, b in zip(losses, found, strict=True):
            assert abs(a - b) <= 4 * 2**-24 * a
        assert max((a - b).abs().max() for a, b in zip(weights, moved, strict=True)) <= 1e-7
    set_dropout = GPTModel.set_dropout
    monkeypatch.setattr(
        GPTModel, "set_dropout", lambda self, seed, row=0: set_dropout(self, seed, 0)
    )
    found, moved = _double(run, data, tmp_path / "masks", 1)
    assert max(abs(a - b) for a, b in zip(losses, found, strict=True)) > 1e-3
    assert max((a - b).abs().max() for a, b in zip(weights, moved, strict=True)) > 1e-3


def test_every_step_draws_other_masks_from_the_seed() -> None:
    seeds = {dropout_seed(seed, step) for seed in range(3) for step in range(50)}
    assert len(seeds) == 150 and all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert dropout_seed(7, 3) == dropout_seed(7, 3)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_never_reaches_the_weights(
    tmp_path: Path,
    cli: Cli,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    models: list[GPTModel] = []
    before: list[Tensor] = []

    def compiled(model: GPTModel, *_: object) -> Callable[[Tensor, Tensor], Tensor]:
        models.append(model)
        calls = iter(range(100))

        def forward(ids: Tensor, targets: Tensor) -> Tensor:
            loss: Tensor = model(ids, targets)
            if next(calls) < 5:
                return loss
            before.extend(p.detach().clone() for p in model.parameters())
            if broken == "loss":
                return loss * torch.inf
            return loss + (model.wte.weight[0, 0] * 0).sqrt()  # 0, but its derivative is NaN

        return forward

    monkeypatch.setattr(runtime, "compiled", compiled)
    refused = cli("train", *options, "--out", tmp_path / "run").error(1)
    assert "step 5: loss" in refused and "--resume" in refused
    after = list(models[0].parameters())
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ["step_00000004"]


def test_a_bad_prompt_is_refused_before_training(
    tmp_path: Path, cli: Cli, options: list[str]
) -> None:
    for prompt, message in (("", "at least one token"), ("x" * 33, "at most context_length 32")):
        refused = cli("train", *options, "--out", tmp_path / "run", "--sample.prompt", prompt)
        assert message in refused.error(1)
    assert not (tmp_path / "run").exists()


GATED = """
import sys
from flashgpt.cli import main
from flashgpt.train.loop import Trainer
step = Trainer._step
def gated(self, number, *rest):
    if number == 5:
        print("at the gate", flush=True)
        sys.stdin.readline()
    return step(self, number, *rest)
Trainer._step = gated
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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

    owner: Any = {"fsync": os, "rename": Path, "save_file": loop.checkpoint}[place]
    original = getattr(owner, place)
    monkeypatch.setattr(owner, place, armed)
    with pytest.raises(Killed):
        cli("train", *options, "--out", tmp_path / "run")
    monkeypatch.undo()
    folder = tmp_path / "run" / "checkpoints"
    left = {path.name for path in folder.iterdir()}
    assert left == {"step_00000004", ".saving-step_00000008"}
    assert loop.checkpoint.load(tmp_path / "run")[0].cfg.n_layers == 2
    shown = cli("train", "--resume", "--out", tmp_path / "run").done()
    assert f"goes on from {folder / 'step_00000004'}" in shown
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert type(trained)(tmp_path / "run").same_as(trained)
    assert type(trained)(tmp_path / "run").metrics == trained.metrics


def test_a_step_is_timed_without_a_run(run: RunConfig, data: TokenData) -> None:
    cfg = run.model.resolve(data.vocab_size)
    trainer = orchestrator.assemble(cfg, data.tokenizer, run.train).trainer
    assert 0 < trainer.time_step(data, 1e-9) < 60


def test_after_training_every_forward_draws_anew(
    tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_toml(trained.folder / "config.toml")
    changed = dataclasses.replace(run, model=dataclasses.replace(run.model, drop_rate=0.5))
    data = TokenData.open(prepare(run.data))
    system, _ = orchestrator.train(changed, data, tmp_path / "run")
    model = system.model.train()
    ids = torch.arange(16)[None]
    assert not torch.equal(model(ids), model(ids))
