"""Token files: made once from text, checked whenever they are opened.

Owns the layout of the prepared folder and its reading; `flashgpt.data.prepare` writes it, and which
tokens a step sees is up to `flashgpt.data.batches`.

A prepared folder holds tokenizer.json and tokenizer_config.json, train-00000.bin and so on,
val-00000.bin and so on, a .docs.npy beside each, and dataset.json. A .bin is a header of 256
little-endian int32 (magic, format number, bytes per id, token count as two words, highest id) and
the ids as uint16 or uint32. Its .docs.npy (int64) says where in it documents start. Where some of
its ids do not count as targets there is an .ignored.bin too, one byte an id, 1 for those; only a
folder with such a file has format 2. Every document ends with `<|endoftext|>`. Memory does not grow
with the corpus.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashgpt.tokenizer import Tokenizer

FORMAT = 1  # of shards, and of folders in which every target counts
FORMAT_IGNORED = 2
MAGIC = int.from_bytes(b"FGPT", "little")
HEADER_BYTES = 256 * 4
_SLICE = 1 << 22  # ids read at once

Ids = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@dataclasses.dataclass(frozen=True)
class TokenSplit:
    """The training or the validation tokens.

    Attributes:
        tokens: the ids of each shard, uint16 or uint32, mapped from disk, not read.
        starts: per shard, where documents start in it (token offsets, int64). A document that
            began in an earlier shard has no start in the later one.
        n_bytes: UTF-8 bytes of text that the tokens stand for; `<|endoftext|>` stands for none.
        ignored: by number of the shard, which of its ids do not count as targets, mapped from
            disk. In a shard that is not in it, all count.
    """

    tokens: list[Ids]
    starts: list[npt.NDArray[np.int64]]
    n_bytes: int
    ignored: dict[int, npt.NDArray[np.bool_]] = dataclasses.field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        """Tokens in all shards, the closing `<|endoftext|>` of each document included."""
        return sum(len(shard) for shard in self.tokens)

    @property
    def n_documents(self) -> int:
        """Documents in all shards; a document cut by the split counts on both sides."""
        return sum(len(shard) for shard in self.starts)


@dataclasses.dataclass(frozen=True)
class TokenData:
    """A prepared folder, checked and open for reading."""

    folder: Path
    name: str
    train: TokenSplit
    val: TokenSplit
    tokenizer: Tokenizer
    fingerprint: str  # of text, tokenizer and layout: equal fingerprints mean equal tokens

    @classmethod
    def open(cls, folder: str | Path) -> TokenData:
        """Opens a prepared folder; reads every file once to check it.

        Raises:
            ValueError: no prepared folder, a damaged or missing file (named), ids outside the
                vocabulary, or a format this version is too old for.
        """
        folder = Path(folder)
        record = read_record(folder)
        for file, digest in record["files"].items():
            if not (folder / file).is_file() or file_digest(folder / file) != digest:
                raise ValueError(damaged_message(folder / file))
        tokenizer = Tokenizer.load(folder)
        splits = {}
        for split, entry in record["splits"].items():
            shards = [_open_shard(folder / file, tokenizer.vocab_size) for file in entry["shards"]]
            starts = [
                np.load(docs_path(folder / file), allow_pickle=False) for file in entry["shards"]
            ]
            masks = {
                number: ignored_path(folder / file) for number, file in enumerate(entry["shards"])
            }
            ignored = {
                number: _open_ignored(path, len(shards[number]))
                for number, path in masks.items()
                if path.name in record["files"]
            }
            splits[split] = TokenSplit(shards, starts, entry["bytes"], ignored)
        train, val = splits["train"], splits["val"]
        return cls(folder, record["name"], train, val, tokenizer, record["fingerprint"])

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer has (count)."""
        return self.tokenizer.vocab_size

    def describe(self) -> str:
        """One line for people: how much text, how many tokens, which vocabulary."""
        parts = (
            f"{split.n_tokens:,} {use} tokens ({split.n_bytes / 1e6:.2f} MB, "
            f"{split.n_documents:,} documents)"
            for split, use in ((self.train, "training"), (self.val, "validation"))
        )
        return f"{self.name}: {', '.join(parts)}, vocabulary {self.vocab_size:,}"


def _open_shard(path: Path, vocab_size: int) -> Ids:
    header = np.fromfile(path, "<i4", HEADER_BYTES // 4)
    if len(header) < HEADER_BYTES // 4 or header[0] != MAGIC:
        raise ValueError(damaged_message(path))
    _check_format(int(header[1]), path)
    count = int(header[3:5].view("<i8")[0])
    if header[2] not in (2, 4) or path.stat().st_size != HEADER_BYTES + count * int(header[2]):
        raise ValueError(damaged_message(path))
    ids: Ids = np.memmap(path, f"<u{header[2]}", "r", HEADER_BYTES, (count,))
    highest = max(int(ids[at : at + _SLICE].max()) for at in range(0, count, _SLICE))
    if highest >= vocab_size:
        raise ValueError(
            f"token ids must be below the tokenizer's {vocab_size}, got {highest} in {path}; run "
            "flashgpt prepare again"
        )
    if highest != header[5]:
        raise ValueError(damaged_message(path))
    return ids


def _open_ignored(path: Path, count: int) -> npt.NDArray[np.bool_]:
    if path.stat().st_size != count:
        raise ValueError(damaged_message(path))
    return np.memmap(path, np.bool_, "r")


def read_record(folder: Path) -> dict[str, Any]:
    """dataset.json, its format and its own digest checked."""
    path = folder / "dataset.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no prepared folder: no dataset.json; run flashgpt prepare")
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(damaged_message(path)) from error
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise ValueError(damaged_message(path))
    _check_format(record["format"], path)
    if record.get("digest") != record_digest(record):
        raise ValueError(damaged_message(path))
    return record


def _check_format(number: int, path: Path) -> None:
    if number > FORMAT_IGNORED:
        raise ValueError(
            f"{path} has format {number}, this flashgpt reads formats up to {FORMAT_IGNORED}; use "
            f"a flashgpt that reads format {number}, or run flashgpt prepare again"
        )


def record_digest(record: dict[str, Any]) -> str:
    return hash_json({key: value for key, value in record.items() if key != "digest"})


def hash_json(value: object) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode("ascii"), digest_size=32).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        made = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32))
    return made.hexdigest()


def damaged_message(path: Path) -> str:
    return f"{path} is damaged or missing; run flashgpt prepare again"


def docs_path(shard: Path) -> Path:
    return shard.with_suffix(".docs.npy")


def ignored_path(shard: Path) -> Path:
    return shard.with_suffix(".ignored.bin")


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
