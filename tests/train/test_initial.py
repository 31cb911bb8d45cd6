"""Starting from weights: a run's, Hugging Face's, fewer positions.

pytest tests/train/test_initial.py
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import flashgpt
from flashgpt.model.gpt2 import GPTModel
from flashgpt.tokenizer import Tokenizer
from flashgpt.toml import load_toml
from flashgpt.train.initial import load_into, shape

Cli = Callable[..., Any]


@pytest.fixture
def tune(tmp_path: Path, text: Path, cli: Cli) -> Callable[..., Any]:
    """tune(folder, ...): fine-tunes what lies in a folder on the words, for 4 steps."""

    def run(source: object, *more: object) -> Any:
        command = ("train", "--model.init-from", source, "--data.source", text)
        sizes = ("--train.tokens-per-step", 128, "--train.steps", 4, "--sample.max-new-tokens", 4)
        places = ("--data.cache", tmp_path / "cache", "--out", tmp_path / "tuned")
        return cli(*command, *sizes, *places, *more)

    return run


@pytest.fixture
def huggingface(tmp_path: Path) -> tuple[Path, Any]:
    """A GPT-2 that transformers wrote, with our bytes tokenizer beside it."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    ids = dict(bos_token_id=256, eos_token_id=256)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ids))
    model.save_pretrained(tmp_path / "gpt2")
    Tokenizer.bytes().save(tmp_path / "gpt2")
    return tmp_path / "gpt2", model


def test_a_run_is_fine_tuned_with_its_own_shape_and_tokenizer(
    trained: Any, tune: Callable[..., Any], tmp_path: Path, cli: Cli
) -> None:
    """A rate of almost nothing leaves the weights where they were."""
    shown = tune(trained.folder, "--train.lr", 1e-12, "--train.weight-decay", 0).done()
    assert f"starts from the weights of {trained.checkpoints[-1]}" in shown
    tuned = type(trained)(tmp_path / "tuned")
    before, after = trained.tensors(), tuned.tensors()
    for name in before:
        if name.startswith("transformer"):
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-10)
    # The validation loss of the first evaluation is that of the run's end.
    assert tuned.metrics[-1]["val_loss"] == pytest.approx(trained.metrics[-1]["val_loss"], abs=1e-6)
    config = load_toml(tuned.folder / "config.toml")
    assert config.model.emb_dim == 32
    # That very checkpoint, whatever the run it is of does later, and a tokenizer of its own.
    assert config.model.init_from == str(trained.checkpoints[-1])
    assert config.data.tokenizer == str(tuned.folder / "tokenizer")


def test_fine_tuning_starts_where_transformers_ends(
    huggingface: tuple[Path, Any], tune: Callable[..., Any], tmp_path: Path
) -> None:
    folder, theirs = huggingface
    tune(folder, "--model.drop-rate", 0, "--train.stop-at", 1, "--train.seed", 5).done()
    metrics = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").open()]
    model = GPTModel(shape(str(folder)))
    load_into(model, str(folder))
    ids = torch.arange(48)[None] % 257
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids), theirs.eval()(ids).logits)
    assert metrics[0]["loss"] == pytest.approx(float(torch.tensor(257.0).log()), abs=0.3)
    weights = load_file(tmp_path / "tuned/checkpoints/step_00000001/model.safetensors")
    moved = weights["transformer.wpe.weight"] - theirs.transformer.wpe.weight.detach()
    assert 0 < float(moved.abs().max()) < 0.01


def test_a_shorter_context_keeps_the_first_positions(
    trained: Any, tune: Callable[..., Any], tmp_path: Path
) -> None:
    shown = tune(trained.folder, "--model.context-length", 8, "--train.lr", 1e-12).done()
    assert "the first 8 of its 32 positions" in shown
    model, _ = flashgpt.load(tmp_path / "tuned")
    source, _ = flashgpt.load(trained.folder)
    assert model.cfg.context_length == 8
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), source(ids), rtol=0, atol=1e-6)


def test_the_start_is_needed_once(
    trained: Any, tune: Callable[..., Any], tmp_path: Path, cli: Cli
) -> None:
    """A stopped run has weights and a tokenizer of its own; where it came from may be gone."""
    source = tmp_path / "source"
    shutil.copytree(trained.folder, source)
    whole = tune(source, "--out", tmp_path / "whole").done()
    assert "starts from the weights" in whole
    tune(source, "--train.stop-at", 2).done()
    shutil.rmtree(source)
    shown = cli("train", "--resume", "--out", tmp_path / "tuned").done()
    assert cli("evaluate", tmp_path / "tuned").status == 0
    assert "starts from the weights" not in shown
    assert type(trained)(tmp_path / "tuned").same_as(type(trained)(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--model.context-length", 64), "must be at most 32 .* positions are learnt"),
        (("--model.emb-dim", 64), "model.emb_dim must be 32 as in .* got 64; leave it out"),
        (("--model.preset", "gpt2"), "model.preset must be left out with model.init_from"),
        (("--train.tokens-per-step", 100), "must be a multiple of model.context_length"),
    ],
)
def test_what_the_weights_do_not_allow_is_refused(
    change: tuple[object, ...], message: str, trained: Any, tune: Callable[..., Any]
) -> None:
    ran = tune(trained.folder, *change)
    assert ran.status in (1, 2)
    assert re.search(message, ran.error(ran.status))


def test_the_tokenizer_must_fit(
    huggingface: tuple[Path, Any], trained: Any, tune: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = huggingface
    other = Tokenizer.train(["some words to learn from, some words"], 300)
    other.save(tmp_path / "other")
    refused = tune(folder, "--data.tokenizer", tmp_path / "other").error(1)
    assert f"data.tokenizer must be that of {folder}, got {tmp_path / 'other'}" in refused
    tune(folder, "--data.tokenizer", "bytes", "--train.stop-at", 1).done()  # it is the same one
    (folder / "tokenizer.json").unlink()
    refused = tune(folder, "--out", tmp_path / "second").error(1)
    assert f"{folder} has no tokenizer; name the one" in refused
    tune(folder, "--data.tokenizer", "bytes", "--out", tmp_path / "third").done()
    big = tune(folder, "--data.tokenizer", tmp_path / "other", "--out", tmp_path / "fourth")
    assert "data.tokenizer must have at most the 257 ids" in big.error(1)


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty folder"])
def test_a_start_that_is_none_is_refused(
    what: str, tmp_path: Path, tune: Callable[..., Any]
) -> None:
    place = tmp_path / "place"
    if what == "a file":
        place.write_text("weights")
    elif what == "an empty folder":
        place.mkdir()
    assert str(place) in tune(place).error(1)
    assert not (tmp_path / "tuned").exists()


def test_a_run_that_always_resumes_starts_from_the_weights_and_their_tokenizer(
    trained: Any, tune: Callable[..., Any], tmp_path: Path
) -> None:
    shown = tune(trained.folder, "--resume", "--train.stop-at", 2).done()
    assert "starts from the weights" in shown
    again = tune(trained.checkpoints[-1], "--resume").done()
    assert "goes on from" in again and "starts from the weights" not in again
    refused = tune(tmp_path / "elsewhere", "--resume").error(2)
    assert "--model.init-from is for a new run" in refused


def test_the_config_repeats_a_fine_tuned_run(
    copied: Any, tune: Callable[..., Any], tmp_path: Path, cli: Cli
) -> None:
    """Even when its source has been trained further since."""
    tune(copied.folder).done()
    cli("train", "--resume", "--out", copied.folder, "--train.steps", 16).done()
    again = tmp_path / "again"
    cli("train", tmp_path / "tuned" / "config.toml", "--out", again).done()
    assert type(copied)(again).same_as(type(copied)(tmp_path / "tuned"))
