"""Models by name, out of a cache that these tests make; never the network.

pytest tests/interop/test_hub.py
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import flashgpt
from flashgpt.interop import hub

Cli = Callable[..., Any]
REVISION = "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network: what asks for it is told that it is offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def _cached(cache: Path, name: str, source: Path) -> Path:
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(REVISION)
    ignore = shutil.ignore_patterns("trainer")
    return Path(shutil.copytree(source, repo / "snapshots" / REVISION, ignore=ignore))


@pytest.mark.parametrize("name", ["gpt2", "some-org/some.model_1"])
def test_a_cached_model_loads_by_name(cache: Path, trained: Any, cli: Cli, name: str) -> None:
    _cached(cache, name, trained.checkpoints[-1])
    model, tokenizer = flashgpt.load(name)
    expected, _ = flashgpt.load(trained.folder)
    assert tokenizer is not None and tokenizer.vocab_size == 257
    assert all(
        torch.equal(tensor, expected.state_dict()[key])
        for key, tensor in model.state_dict().items()
    )
    greedy = ("--prompt", "the", "--temperature", 0)
    text = cli("generate", name, *greedy).done()
    assert text == cli("generate", trained.folder, *greedy).done()
    assert "tokenizer of 257 ids" in cli("convert", name, "out", "--to", "huggingface").done()


def test_a_folder_goes_before_a_cached_name(cache: Path, trained: Any) -> None:
    _cached(cache, "gpt2", trained.checkpoints[0])
    shutil.copytree(trained.checkpoints[-1], "gpt2")
    here, there = flashgpt.load("gpt2")[0], flashgpt.load(trained.folder)[0]
    assert torch.equal(here.wte.weight, there.wte.weight)


@pytest.mark.usefixtures("cache")
def test_only_gpt2s_own_names_are_asked_of_the_network(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def unreachable(name: str, *, local_files_only: bool, **_: Any) -> str:
        asked.append((name, local_files_only))
        raise huggingface_hub.errors.LocalEntryNotFoundError("no\nroute")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert hub.find("runs/demo") is None and hub.find("org/gpt2") is None
    assert hub.find("/abs/olute") is None and hub.find("a/b/c") is None and hub.find("..") is None
    assert "runs/demo is no folder" in cli("generate", "runs/demo", "--prompt", "a").error(1)
    assert {name for name, _ in asked} == {"runs/demo", "org/gpt2"}
    assert all(cached_only for _, cached_only in asked)
    asked.clear()
    refused = cli("generate", "gpt2-xl", "--prompt", "a").error(1)
    assert "gpt2-xl is neither in the Hugging Face cache nor can it be downloaded" in refused
    assert asked == [("gpt2-xl", True), ("gpt2-xl", False)]


def test_a_cache_with_the_tokenizer_alone_is_no_model(cache: Path, trained: Any) -> None:
    snapshot = _cached(cache, "gpt2", trained.checkpoints[-1])
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="gpt2 is neither in the Hugging Face cache nor"):
        flashgpt.load("gpt2")
