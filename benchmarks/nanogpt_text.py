"""The text of benchmarks.nanogpt_loss: Python sources as a compact file of token ids.

Owns making and reading a folder with

    train.bin, held_out.bin    ids, uint16, little-endian, documents closed by <|endoftext|>
    text.json                  token counts, sha256 of both files, sources, tokenizer

so that a machine without the sources, the tokenizers library or a network can train on it. The
tokenizer is a byte-level BPE trained on the text, by `flashgpt.data.prepare`; whole documents are
held out. Equal versions of Python and of the packages give equal files. Made by

    python -m benchmarks.nanogpt_loss --prepare FOLDER
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashgpt.data.prepare import prepare
from flashgpt.data.shards import TokenData, TokenSplit
from flashgpt.runconfig import DataConfig
from flashgpt.train.checkpoint import write_json

STANDARD_LIBRARY = ("stdlib",)
PARTS = ("train", "held_out")
SHUFFLE = 20240  # key of the order of the documents

Ids = npt.NDArray[np.uint16]


@dataclasses.dataclass(frozen=True)
class Text:
    """A prepared text.

    Attributes:
        train, held_out: the ids.
        record: the object of text.json.
    """

    train: Ids
    held_out: Ids
    record: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer has."""
        return int(self.record["tokenizer"]["vocab_size"])


def make(
    folder: Path, packages: Sequence[str], vocab_size: int, tokens: int, held_out: int
) -> dict[str, Any]:
    """Makes the folder from the standard library and installed packages; returns its record.

    Args:
        packages: installed packages whose .py files are text besides the standard library.
        vocab_size: of the tokenizer.
        tokens, held_out: ids wanted in the two files.

    Raises:
        ValueError: a package is not there, the vocabulary does not fit into 16 bits, or the text
            has too few tokens.
    """
    if vocab_size > 1 << 16:
        raise ValueError(f"vocab_size must be at most {1 << 16} for 16-bit ids, got {vocab_size}")
    sources = (*STANDARD_LIBRARY, *(f"{_place(name)}/**/*.py" for name in packages))
    phases: set[str] = set()

    def progress(done: int, total: int, phase: str) -> None:
        if phase not in phases:
            phases.add(phase)
            print(f"{phase} ({total:,} bytes)", flush=True)

    with tempfile.TemporaryDirectory() as aside:
        wanted = DataConfig(sources, "bpe", vocab_size, aside)
        data = TokenData.open(prepare(wanted, out=Path(aside, "prepared"), progress=progress))
        splits = {"train": (data.train, tokens), "held_out": (data.val, held_out)}
        found = {name: _shuffled(*split, name) for name, split in splits.items()}
        record = {
            "sources": [
                f"Python {platform.python_version()} standard library",
                *(f"{name} {importlib.metadata.version(name)}" for name in packages),
            ],
            "tokenizer": {"kind": "bpe", "vocab_size": data.vocab_size}
            | {"blake2b": data.tokenizer.digest},
            "available": {"train": data.train.n_tokens, "held_out": data.val.n_tokens},
        }
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in found.items():
        content = ids.astype("<u2").tobytes()
        temporary = folder / f".{name}.bin.tmp"
        temporary.write_bytes(content)
        temporary.replace(folder / f"{name}.bin")
        record[name] = {"tokens": len(ids), "sha256": hashlib.sha256(content).hexdigest()}
    write_json(folder / "text.json", record)
    return record


def _place(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"packages must be installed folders of modules, got {name!r}")
    return Path(spec.submodule_search_locations[0])


def _shuffled(split: TokenSplit, count: int, name: str) -> Ids:
    """The first `count` ids of the documents in a fixed random order."""
    if split.n_tokens < count:
        raise ValueError(
            f"text must have {count:,} tokens for {name}, got {split.n_tokens:,}; add packages"
        )
    pieces = []
    for ids, starts in zip(split.tokens, split.starts, strict=True):
        # What stands before the first start continues a document of the shard before.
        pieces += np.split(np.asarray(ids), starts[starts > 0])
    # NumPy promises the raw stream of a bit generator for all versions, and nothing else of it.
    stream = np.random.Philox(key=np.array([SHUFFLE, 0], np.uint64))
    order = np.argsort(stream.random_raw(len(pieces)), kind="stable")
    taken, size = [], 0
    for index in order.tolist():
        taken.append(pieces[index])
        size += len(pieces[index])
        if size >= count:
            break
    out: Ids = np.concatenate(taken)[:count].astype(np.uint16)
    return out


def read(folder: Path) -> Text:
    """A folder that `make` made, checked.

    Raises:
        ValueError: no such folder, or a file that is not the one text.json speaks of.
    """
    path = folder / "text.json"
    if not path.is_file():
        raise ValueError(f"text must be a folder made by --prepare, got {folder}: no text.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    found = {}
    for name in PARTS:
        file = folder / f"{name}.bin"
        content = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() != record[name]["sha256"]:
            raise ValueError(f"{file} is damaged or missing; run --prepare again")
        found[name] = np.frombuffer(content, "<u2")
    return Text(**found, record=record)
