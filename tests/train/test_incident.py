"""Incidents: where the first bad number came up, and the step done again from the folder alone.

pytest tests/train/test_incident.py
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flashgpt import orchestrator
from flashgpt.data.batches import Batches
from flashgpt.data.shards import TokenData
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import RunConfig
from flashgpt.train import incident
from flashgpt.train.diagnose import diagnose
from flashgpt.train.feed import Feed
from flashgpt.train.incident import Incident
from flashgpt.train.loop import Listener, TrainingError
from flashgpt.train.parts import build
from flashgpt.train.replay import replay
from flashgpt.train.step import dropout_seed

Cli = Callable[..., Any]


def run_into_nan(
    run: RunConfig, data: TokenData, out: Path, breaks: Callable[[GPTModel], None]
) -> list[str]:
    """Trains a model that gives no finite number after `breaks`; what the listener was told."""
    model = GPTModel(run.model.resolve(data.vocab_size))
    with torch.no_grad():
        breaks(model)
    trainer = orchestrator.Trainer(model, data.tokenizer, run.train)
    notes: list[str] = []
    with pytest.raises(TrainingError):
        trainer.fit(data, out, run, listener=Listener(note=notes.append))
    return notes


def overflow(model: GPTModel) -> None:
    """Makes the products of the second block's first matrix overflow in fp32."""
    model.h[1].mlp.c_fc.weight.fill_(1e38)


def attention(model: GPTModel) -> None:
    """Makes the scores of the second block's attention overflow, and nothing before them."""
    model.h[1].attn.c_attn.weight.mul_(1e25)


@pytest.mark.parametrize(
    ("breaks", "first"),
    [
        (lambda model: model.wpe.weight[0, 0].fill_(math.nan), "the weights wpe.weight"),
        (overflow, "the output of h.1.mlp.c_fc"),
        (attention, "what goes into h.1.attn.c_proj"),
    ],
)
def test_the_first_number_that_is_not_finite_is_found(
    breaks: Callable[[GPTModel], None], first: str, tmp_path: Path, run: RunConfig, data: TokenData
) -> None:
    notes = run_into_nan(run, data, tmp_path / "run", breaks)
    folder = tmp_path / "run" / "incidents" / "step_00000001"
    stored = json.loads((folder / "incident.json").read_text())
    assert stored["findings"]["first_non_finite"] == first
    assert any(f"is in {first}; {folder}" in note for note in notes)


def test_a_gradient_that_is_not_finite_is_found_where_it_came_up(
    run: RunConfig, data: TokenData
) -> None:
    model = GPTModel(run.model.resolve(data.vocab_size))
    parts = build(model, data.tokenizer, run.train)
    batches = Batches(data.train, 32, parts.rows, 1337)
    with Feed(batches, parts.rows, parts.rows, parts.device) as feed:
        micros = feed.take(0)
    hook = model.h[1].ln_1.register_forward_hook(
        lambda _module, _inputs, out: out.register_hook(lambda grad: grad * torch.nan) and None
    )
    found = diagnose(parts, micros, 0)
    assert math.isfinite(found.loss) and math.isnan(found.norm)
    assert found.first_non_finite == "the gradient at the output of h.1.ln_1"
    hook.remove()
    again = diagnose(parts, micros, 0)
    assert again.first_non_finite is None and math.isfinite(again.norm)
    assert again.norm == pytest.approx(
        math.sqrt(sum(norm**2 for norm in again.gradient_norms.values()))
    )
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture
def folder(tmp_path: Path, run: RunConfig, data: TokenData) -> Path:
    """An incident's folder that has left its run."""
    run_into_nan(run, data, tmp_path / "run", overflow)
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "run" / "incidents" / "step_00000002", moved)
    shutil.rmtree(tmp_path / "run")
    return moved


def test_an_incident_tells_what_was_run_and_where_the_batch_stands(
    folder: Path, run: RunConfig, data: TokenData
) -> None:
    found = Incident.load(folder)
    assert (found.step, found.config, found.dropout_seed) == (1, run, dropout_seed(1337, 1))
    assert found.reason == "loss is nan" and any("blocked" in line for line in found.receipt)
    ids, targets = Batches(data.train, 32, 4, 1337).batch(1)
    assert torch.equal(found.micros[0].ids_BT, torch.from_numpy(ids))
    assert torch.equal(found.micros[0].targets_BT, torch.from_numpy(targets))
    for row, (shard, offset) in enumerate(found.windows):
        assert data.train.tokens[shard][offset : offset + 32].tolist() == ids[row].tolist()
    assert json.loads((folder / "incident.json").read_text())["versions"]["torch"]


@pytest.mark.parametrize("use_flash", [True, False])
def test_a_replay_does_the_step_again_on_either_path(
    use_flash: bool, tmp_path: Path, folder: Path, cli: Cli
) -> None:
    shown = cli("train", "--replay", folder, "--model.use-flash", use_flash).done()
    assert "step 2 was left out: loss is nan" in shown
    assert ("attention: standard served" in shown) == (not use_flash)
    rows = {line[:30].strip(): line[30:].split() for line in shown.splitlines()}
    assert shown.count("the output of h.1.mlp.c_fc") == 2
    assert any(name.startswith("h.0.attn largest output") for name in rows)


def test_a_replay_on_the_same_path_gives_the_same_bits(
    run: RunConfig, data: TokenData, tmp_path: Path
) -> None:
    """Of a finite step, so that equality means something; the other path agrees within 1e-5."""
    torch.manual_seed(0)
    parts = build(GPTModel(run.model.resolve(data.vocab_size)), data.tokenizer, run.train)
    batches = Batches(data.train, 32, parts.rows, 1337)
    with Feed(batches, parts.rows, 2, parts.device) as feed:
        micros = feed.take(3)
    findings = diagnose(parts, micros, 77)
    made = Incident(
        *(3, "test", 1.0, 1.0, 0.0, 0.0, 77, 1.0, batches.windows(3), findings, [], run, micros)
    )
    saved = made.save(tmp_path, parts.model)
    assert saved == tmp_path / "incidents" / "step_00000004"
    for use_flash in (True, False):
        model = dataclasses.replace(run.model, use_flash=use_flash)
        _, now, receipt = replay(saved, dataclasses.replace(run, model=model))
        assert ("standard" in receipt[0]) == (not use_flash)
        assert (now == findings) == use_flash
        assert now.loss == pytest.approx(findings.loss, rel=1e-5)
        assert now.norm == pytest.approx(findings.norm, rel=1e-5)


def test_only_the_newest_incidents_keep_their_weights(
    tmp_path: Path, run: RunConfig, data: TokenData, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incident, "KEEP_WEIGHTS", 2)
    run_into_nan(run, data, tmp_path / "run", overflow)
    folders = sorted((tmp_path / "run" / "incidents").iterdir())
    assert [(path / "model.safetensors").exists() for path in folders] == [False, True, True]
    refused = cli("train", "--replay", folders[0]).error(1)
    assert f"{folders[0]} has no weights any more" in refused


def test_a_new_incident_keeps_its_weights_beside_old_ones_of_later_steps(
    tmp_path: Path, run: RunConfig, data: TokenData
) -> None:
    for step in (50, 60, 70):
        old = tmp_path / "run" / "incidents" / f"step_{step:08d}"
        old.mkdir(parents=True)
        (old / "model.safetensors").touch()
        os.utime(old / "model.safetensors", (step, step))
    run_into_nan(run, data, tmp_path / "run", overflow)
    kept = {path.parent.name for path in (tmp_path / "run").rglob("incidents/*/model.safetensors")}
    assert kept == {f"step_{step:08d}" for step in (1, 2, 3)}


@pytest.mark.parametrize("damage", ["no folder", "no json", "half a json", "no batch", "a run"])
def test_a_folder_that_is_no_incident_is_refused(
    damage: str, folder: Path, tmp_path: Path, cli: Cli, trained: Any
) -> None:
    if damage == "no json":
        (folder / "incident.json").unlink()
    elif damage == "half a json":
        text = (folder / "incident.json").read_text()
        (folder / "incident.json").write_text(text[: len(text) // 2])
    elif damage == "no batch":
        (folder / "batch.safetensors").write_bytes(b"none")
    elif damage != "a run":
        folder = tmp_path / "nowhere"
    target = trained.folder if damage == "a run" else folder
    refused = cli("train", "--replay", target).error(1)
    assert f"{target} is no incident's folder, or damaged" in refused


def test_an_incident_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, run: RunConfig, data: TokenData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(incident, "save_file", full)
    notes = run_into_nan(run, data, tmp_path / "run", overflow)
    refused = [note for note in notes if "is left out" in note]
    assert len(refused) == 3  # as many as without
    assert all("no incident was written" in note and "No space left" in note for note in refused)
    assert list((tmp_path / "run" / "incidents").iterdir()) == []
