"""`flashgpt evaluate`. pytest tests/verbs/test_evaluate.py"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]


def test_a_runs_own_validation_text(trained: Any, cli: Cli) -> None:
    found = json.loads(cli("evaluate", trained.folder, "--json").done())
    assert found["perplexity"] == math.exp(found["loss"])
    assert set(found) == {"loss", "perplexity", "bits_per_byte", "tokens", "bytes"}
    assert found["loss"] == pytest.approx(trained.metrics[-1]["val_loss"], rel=1e-9)
    line = cli("evaluate", trained.folder).done()
    assert line == (
        f"loss {found['loss']:.4f} nats per token, perplexity {found['perplexity']:,.2f}, "
        f"{found['bits_per_byte']:.4f} bits per byte ({found['tokens']:,} tokens, "
        f"{found['bytes']:,} bytes)\n"
    )


def test_a_stride_gives_more_context(trained: Any, cli: Cli) -> None:
    found = [
        json.loads(cli("evaluate", trained.folder, "--json", *stride).done())
        for stride in ((), ("--stride", 32), ("--stride", 8))
    ]
    assert found[0] == found[1] and found[2]["loss"] != found[0]["loss"]
    assert found[2]["tokens"] == found[0]["tokens"]
    line = cli("evaluate", trained.folder, "--stride", 33).error(1)
    assert "stride must be in 1 .. context_length 32, got 33" in line


def test_another_text(
    tmp_path: Path, trained: Any, cli: Cli, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text("Quite \u00e9 another text. " * 20, encoding="utf-8")
    mine = json.loads(cli("evaluate", trained.folder, "--source", text, "--json").done())
    other = json.loads(cli("evaluate", trained.folder, "--source", "other.txt", "--json").done())
    # Each split loses its first token; `<|endoftext|>` is predicted and has no bytes.
    assert (other["tokens"], other["bytes"]) == (23 * 20 - 1, 23 * 20 - 2)
    assert other["bits_per_byte"] > 1.2 * mine["bits_per_byte"]
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]  # nothing is left behind


def test_completions_alone_are_counted(tmp_path: Path, trained: Any, cli: Cli) -> None:
    pairs, texts = tmp_path / "pairs.jsonl", tmp_path / "texts.jsonl"
    pairs.write_text(json.dumps({"prompt": "cat sat ", "completion": "mat"}) + "\n")
    texts.write_text(json.dumps({"body": "cat sat mat"}) + "\n")
    found = json.loads(cli("evaluate", trained.folder, "--source", pairs, "--json").done())
    # The last 5 % are "t" and the end of text, and the first of them is no target.
    assert (found["tokens"], found["bytes"]) == (3, 2)
    whole = cli("evaluate", trained.folder, "--source", texts, "--field", "body", "--json").done()
    assert json.loads(whole)["tokens"] == 10
    refused = cli("evaluate", trained.folder, "--field", "body").error(2)
    assert "--field is for records of --source" in refused


def test_a_text_of_a_few_bytes(tmp_path: Path, trained: Any, cli: Cli) -> None:
    """So short that of the part held out only `<|endoftext|>` is predicted."""
    (tmp_path / "s.txt").write_text("short text.")
    ran = cli("evaluate", trained.folder, "--source", tmp_path / "s.txt", "--json")
    found = json.loads(ran.done())
    bits = found["loss"] * found["tokens"] / math.log(2) / found["bytes"]
    assert found["bits_per_byte"] == pytest.approx(bits) and math.isfinite(bits)


def test_best_is_the_checkpoint_with_the_lowest_loss(copied: Any, cli: Cli) -> None:
    state = json.loads((copied.folder / "state.json").read_text())
    (copied.folder / "state.json").write_text(json.dumps({**state, "best": "step_00000004"}))
    best = json.loads(cli("evaluate", copied.folder, "--best", "--json").done())
    last = json.loads(cli("evaluate", copied.folder, "--json").done())
    assert best["loss"] > last["loss"]


def test_a_plain_folder_needs_a_text_and_a_tokenizer(
    tmp_path: Path, trained: Any, cli: Cli, text: Path
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(trained.checkpoints[-1], plain, ignore=shutil.ignore_patterns("trainer"))
    assert f"{plain} has no config.toml to say what text it was trained on" in cli(
        "evaluate", plain
    ).error(1)
    assert cli("evaluate", plain, "--source", text).done().startswith("loss ")
    (plain / "tokenizer.json").unlink()
    line = cli("evaluate", plain, "--source", text).error(1)
    assert f"{plain} has no tokenizer; put a tokenizer.json beside" in line


def test_another_tokenizer_is_refused(copied: Any, cli: Cli) -> None:
    path = copied.folder / "config.toml"
    changed = path.read_text().replace('tokenizer = "bytes"', 'tokenizer = "bpe"')
    path.write_text(changed.replace("vocab_size = 8192", "vocab_size = 300"))
    assert "was trained with another tokenizer" in cli("evaluate", copied.folder).error(1)
