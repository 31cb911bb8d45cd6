"""Writes token files: what `flashgpt.data.shards` reads.

Owns the filling of shards and which tokens go to training and to validation. Does not own where
tokens come from (`flashgpt.data.encode`). Memory does not grow with the corpus.
"""

from __future__ import annotations

import array
import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from flashgpt.data.shards import FORMAT, HEADER_BYTES, MAGIC, Ids, docs_path, id_dtype, ignored_path
from flashgpt.tokenizer import Tokenizer

Bools = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Consecutive tokens, and of each whether it starts a document, whether it is held out for
    validation, and whether it does not count as a target."""

    ids: Ids
    first: Bools
    held: Bools
    ignored: Bools

    def where(self, chosen: Bools) -> Tokens:
        """The chosen ones of them."""
        if chosen.all():
            return self
        return Tokens(self.ids[chosen], self.first[chosen], self.held[chosen], self.ignored[chosen])

    def held_from(self, at: int) -> Tokens:
        """The same tokens, those from number `at` on held out; a document cut there starts anew."""
        place = np.arange(len(self.ids))
        first = self.first | (place == at)
        return dataclasses.replace(self, first=first, held=place >= at)


@dataclasses.dataclass(frozen=True)
class Stream:
    """All tokens of a corpus, in order.

    Attributes:
        border: number of the first token that is held out, with all after it; None where the
            tokens say themselves which are.
    """

    tokenizer: Tokenizer
    tokens: Iterable[Tokens]
    border: int | None


def last_part(total: int) -> int:
    """Where validation begins if it is the last 5 % of the tokens.

    Raises:
        ValueError: so few tokens that training would have less than two.
    """
    border = total - max(2, round(total / 20))
    if border < 2:
        raise ValueError(
            f"data.source must hold at least 4 tokens, got {total}; give more text to train on"
        )
    return border


def write_splits(stream: Stream, folder: Path, shard_tokens: int) -> dict[str, dict[str, Any]]:
    """Writes the shards of both splits into a folder; returns their entries in dataset.json."""
    writers = {
        split: _Writer(folder, split, stream.tokenizer, shard_tokens) for split in ("train", "val")
    }
    at = 0
    for tokens in stream.tokens:
        if stream.border is not None:
            tokens = tokens.held_from(stream.border - at)
        at += len(tokens.ids)
        for split, chosen in (("train", ~tokens.held), ("val", tokens.held)):
            if chosen.any():
                writers[split].add(tokens.where(chosen))
    return {split: writer.close() for split, writer in writers.items()}


class _Writer:
    """Writes one split's shards; a shard is opened only when there is an id to put into it."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._byte_lengths = tokenizer.byte_lengths
        self._dtype = id_dtype(tokenizer.vocab_size)
        self._file: BinaryIO | None = None
        self._mask: BinaryIO | None = None
        self._count = self._highest = 0
        self._starts = array.array("q")
        self._entry: dict[str, Any] = {"shards": [], "tokens": 0, "bytes": 0, "documents": 0}

    def add(self, tokens: Tokens) -> None:
        """Appends tokens."""
        begin = 0
        while begin < len(tokens.ids):
            file = self._file or self._open()
            part = slice(begin, begin + self._shard_tokens - self._count)
            ids = tokens.ids[part].astype(self._dtype, copy=False)
            file.write(ids.tobytes())
            self._starts.frombytes((np.flatnonzero(tokens.first[part]) + self._count).tobytes())
            if tokens.ignored[part].any():
                self._ignore(tokens.ignored[part])
            self._highest = max(self._highest, int(ids.max()))
            self._entry["bytes"] += int(self._byte_lengths[ids].sum())
            self._count += len(ids)
            begin += len(ids)
            if self._count == self._shard_tokens:
                self._finish(file)

    def close(self) -> dict[str, Any]:
        """Completes the last shard and returns the split's entry in dataset.json."""
        if self._file:
            self._finish(self._file)
        return self._entry

    def _open(self) -> BinaryIO:
        name = f"{self._split}-{len(self._entry['shards']):05d}.bin"
        self._entry["shards"].append(name)
        self._count = self._highest = 0
        self._starts = array.array("q")
        self._file = (self._folder / name).open("wb")
        self._file.write(bytes(HEADER_BYTES))
        return self._file

    def _ignore(self, ignored: Bools) -> None:
        """Notes of the next ids which do not count; where nothing is written a file has zeros."""
        if not self._mask:
            self._mask = ignored_path(self._folder / self._entry["shards"][-1]).open("wb")
        self._mask.seek(self._count)
        self._mask.write(ignored.tobytes())

    def _finish(self, file: BinaryIO) -> None:
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:3] = MAGIC, FORMAT, self._dtype.itemsize
        header[3:5].view("<i8")[0] = self._count
        header[5] = self._highest
        file.seek(0)
        file.write(header.tobytes())
        _close(file)
        if self._mask:
            self._mask.truncate(self._count)
            _close(self._mask)
        self._file = self._mask = None
        path = self._folder / self._entry["shards"][-1]
        np.save(docs_path(path), np.array(self._starts, "<i8"), allow_pickle=False)
        self._entry["tokens"] += self._count
        self._entry["documents"] += len(self._starts)


def _close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
