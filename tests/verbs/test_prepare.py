"""`flashgpt prepare`. pytest tests/verbs/test_prepare.py"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashgpt.data.shards import TokenData

Cli = Callable[..., Any]


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_a_folder_is_made_and_train_takes_it(
    tmp_path: Path,
    cli: Cli,
    options: list[str],
    text: Path,
    tokenizer: str,
) -> None:
    out = tmp_path / "to kens"
    shown = cli("prepare", text, "--out", out, "--tokenizer", tokenizer, "--vocab-size", 300).done()
    size = 300 if tokenizer == "bpe" else 257
    assert TokenData.open(out).vocab_size <= size
    assert re.search(r"^words: [\d,]+ training tokens", shown, re.MULTILINE)
    ready = f"ready: {out}; train on it: flashgpt train --data.source '{out}'"
    assert ready in shown.splitlines()
    run = ["--data.source", str(out), "--out", str(tmp_path / "run"), "--train.stop-at", "1"]
    if tokenizer == "bpe":
        at = options.index("--data.tokenizer")
        options = options[:at] + options[at + 2 :]
    cli("train", *options, *run).done()


def test_without_out_it_lies_in_data_and_is_found_again(
    tmp_path: Path, cli: Cli, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = cli("prepare", text, "--tokenizer", "bytes").done()
    (made,) = (tmp_path / "data").iterdir()
    assert re.fullmatch(r"words-bytes-[0-9a-f]{12}", made.name)
    before = made.stat().st_mtime_ns
    second = cli("prepare", text, "--tokenizer", "bytes").done()
    assert second.splitlines()[-1] == first.splitlines()[-1]
    assert made.stat().st_mtime_ns == before and "encoding" not in second


def test_json_lines_with_a_field_of_their_own(tmp_path: Path, cli: Cli) -> None:
    path, out = tmp_path / "posts.jsonl", tmp_path / "tokens"
    path.write_text('{"body": "some words", "id": 1}\n' * 30)
    missing = cli("prepare", path, "--tokenizer", "bytes", "--out", out).error(1)
    assert f"got the fields 'body', 'id' in line 1 of {path}; name the field" in missing
    shown = cli("prepare", path, "--field", "body", "--tokenizer", "bytes", "--out", out).done()
    data = TokenData.open(out)
    assert data.train.n_documents + data.val.n_documents == 30
    assert data.train.n_bytes + data.val.n_bytes == 30 * len("some words")
    assert f"ready: {out}" in shown


def test_several_sources(tmp_path: Path, cli: Cli) -> None:
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text(f"{name} " * 50)
    out = tmp_path / "tokens"
    cli(
        "prepare", tmp_path / "a.txt", tmp_path / "*.md", "--tokenizer", "bytes", "--out", out
    ).done()
    data = TokenData.open(out)
    assert data.train.n_bytes + data.val.n_bytes == 6 * 50 + 5 * 50
