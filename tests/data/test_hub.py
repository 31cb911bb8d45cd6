"""Data sets by their name on the hub, out of a cache that these tests make; never the network.

pytest tests/data/test_hub.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from flashgpt.data.files import find_files

Cli = Callable[..., Any]
REVISION = "0" * 40
PARTS = [f"train-{number:05}-of-00003.jsonl" for number in range(3)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network: what asks for it is told that it is offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def cached(cache: Path, name: str, *files: str) -> Path:
    """A data set in the cache; each file is JSON lines that say its name."""
    repo = cache / f"datasets--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(REVISION)
    folder = repo / "snapshots" / REVISION
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        entries = [{"text": f"{file} {i}"} for i in range(30)]
        (folder / file).write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return folder


def listed(cache: Path, name: str, *files: str) -> None:
    """Leaves the list of all files of a data set in the cache, as a download does."""
    path = cache / f"datasets--{name.replace('/', '--')}" / "trees" / f"{REVISION}.json"
    path.parent.mkdir()
    entries = {file: {"size": 1, "blob_id": "0"} for file in files}
    path.write_text(json.dumps({"format_version": 1, "files": entries}))


def names(source: str) -> list[str]:
    return [file.name for file in find_files([source])]


def test_training_files_are_taken_in_order(cache: Path) -> None:
    cached(
        cache, "org/set",
        *("README.md", "data/test-0.jsonl", "data/train-1.jsonl", "data/train-0.jsonl"),
        "data/training_notes.jsonl",
    )  # fmt: skip
    expected = ["org/set/data/train-0.jsonl", "org/set/data/train-1.jsonl"]
    for source in ("hf://org/set", "hf://datasets/org/set", "hf://org/set/data", "hf://org/set/"):
        assert names(source) == expected
    assert names("hf://org/set/data/test-0.jsonl") == ["org/set/data/test-0.jsonl"]


def test_parquet_goes_before_json_lines_and_these_before_text(cache: Path) -> None:
    cached(cache, "org/one", "a.txt", "a.jsonl", "a.parquet")
    cached(cache, "org/two", "a.txt", "a.jsonl")
    cached(cache, "org/three", "a.txt", "b.txt")
    assert names("hf://org/one") == ["org/one/a.parquet"]
    assert names("hf://org/two") == ["org/two/a.jsonl"]
    assert names("hf://org/three") == ["org/three/a.txt", "org/three/b.txt"]


def test_a_folder_named_train_is_for_training(cache: Path) -> None:
    cached(cache, "org/set", "data/test/0.jsonl", "data/train/0.jsonl", "data/train/1.jsonl")
    cached(cache, "org/all", "a/trained/0.jsonl")
    expected = ["org/set/data/train/0.jsonl", "org/set/data/train/1.jsonl"]
    for source in ("hf://org/set", "hf://org/set/data", "hf://org/set/data/train"):
        assert names(source) == expected
    assert names("hf://org/set/data/test") == ["org/set/data/test/0.jsonl"]
    assert names("hf://org/all") == ["org/all/a/trained/0.jsonl"]


def test_what_is_named_may_be_all_that_was_fetched(cache: Path) -> None:
    cached(cache, "org/part", "data/train.jsonl")
    listed(cache, "org/part", "README.md", "data/train.jsonl", "other/train.jsonl")
    for source in ("hf://org/part/data", "hf://org/part/data/train.jsonl"):
        assert names(source) == ["org/part/data/train.jsonl"]


def test_all_parts_of_a_set_are_wanted_and_one_by_its_name(cache: Path) -> None:
    cached(cache, "org/whole", *PARTS, "train-1-of-2.jsonl", "train-2-of-2.jsonl")
    cached(cache, "org/parts", "test-00000-of-00002.jsonl", *PARTS[1:])
    assert len(names("hf://org/whole")) == 5
    assert names(f"hf://org/parts/{PARTS[1]}") == [f"org/parts/{PARTS[1]}"]


def test_a_data_set_is_prepared_by_its_name(cache: Path, cli: Cli) -> None:
    cached(cache, "org/set", "train.jsonl", "test.jsonl")
    cli("prepare", "hf://org/set", "--tokenizer", "bytes", "--out", "tokens").done()
    tokens = Path("tokens/train-00000.bin").read_bytes()
    assert "train.jsonl 7".encode("utf-16-le") in tokens  # ids of bytes, two bytes each
    assert "test.jsonl".encode("utf-16-le") not in tokens


WRONG = [
    ("hf://org/absent", "org/absent is not in the Hugging Face cache; put it there: hf download"),
    ("hf://org", "must be hf://OWNER/NAME, or a folder of it, got 'hf://org'"),
    ("hf://org/several", "must name one folder of hf://org/several, got a, b; write hf://org/sev"),
    ("hf://org/trains", "got b/train, a; write hf://org/trains/b/train"),
    ("hf://org/less", "org/less is not all in the Hugging Face cache; fetch the rest, or name a"),
    ("hf://org/less/b", "org/less/b is not all in the Hugging Face cache; fetch the rest: hf down"),
    ("hf://org/parts", "got x, .; write hf://org/parts/x"),
    ("hf://org/first", f"all parts of a set, got 'hf://org/first' without {PARTS[0]}; hf down"),
    ("hf://org/parts/x", f"without {PARTS[1]}; hf download --repo-type dataset org/parts --incl"),
    ("hf://org/pictures", "must hold .parquet, .jsonl, .txt files, got 'hf://org/pictures'"),
    ("hf://org/several/c", "must hold .parquet, .jsonl, .txt files, got 'hf://org/several/c'"),
]


@pytest.mark.parametrize(("source", "says"), WRONG)
def test_what_cannot_be_read_is_said_in_a_line(
    cache: Path, cli: Cli, source: str, says: str
) -> None:
    cached(cache, "org/several", "a/train.jsonl", "b/train.jsonl")
    cached(cache, "org/trains", "a/train.jsonl", "b/train/0.jsonl")
    cached(cache, "org/less", "a/train.jsonl")
    listed(cache, "org/less", "a/train.jsonl", "b/train.jsonl")
    cached(cache, "org/first", *PARTS[1:])
    cached(cache, "org/parts", *PARTS, f"x/{PARTS[0]}", f"x/{PARTS[2]}")
    cached(cache, "org/pictures", "a.png")
    assert says in cli("prepare", source, "--tokenizer", "bytes", "--out", "tokens").error(1)
    assert not Path("tokens").exists()
