"""From text to a prepared folder of token files: tokenizer, split, shards, digests.

Owns the training of the tokenizer on the training part, the split into training and validation
tokens, and the writing. What is in the folder, and the reading, is in `flashgpt.data.shards`; which
files are text, in `flashgpt.data.corpus`. Memory does not grow with the corpus.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flashgpt.config import DataConfig
from flashgpt.data import corpus
from flashgpt.data.shards import (
    FORMAT,
    HEADER_BYTES,
    MAGIC,
    Ids,
    TokenData,
    docs_path,
    file_digest,
    hash_json,
    id_dtype,
    read_record,
    record_digest,
)
from flashgpt.tokenizer import Tokenizer

Progress = Callable[[int, int, str], None]
_BATCH = 1 << 21  # characters encoded at once
_SLICE = 1 << 22  # ids read at once


def prepare(
    data: DataConfig,
    *,
    out: Path | None = None,
    progress: Progress | None = None,
    shard_tokens: int = 100_000_000,
) -> Path:
    """Makes the prepared folder of a corpus, or finds it ready, and returns it.

    A tokenizer that is trained sees training text only: the whole of it, or, past 8 million
    characters, that many in blocks spread evenly over all documents. With 20 documents or more
    whole documents are held out for validation, about 5 %; with fewer, the last 5 % of the tokens.

    Args:
        data: which text, which tokenizer. One source that is a prepared folder is checked and
            returned, if `data` does not ask for another tokenizer than it has.
        out: the folder to make; left out, one in `data.cache`, named after the corpus, the
            tokenizer and a fingerprint of both, so that equal requests find it again.
        progress: called with bytes done, bytes in all, and the name of the phase.
        shard_tokens: ids in one token file at most.

    Raises:
        ValueError: bad sources or tokenizer, text too short to split, or `out` is something else
            than this corpus prepared; nothing is overwritten.
        OSError: the folder cannot be written, for example because no space is left.
    """
    tell = progress or (lambda done, total, phase: None)
    ready = Path(data.source[0]).expanduser()
    if len(data.source) == 1 and (ready / "dataset.json").is_file():
        return _accept(ready, data, out)
    given = None if data.tokenizer == "bpe" else Tokenizer.load(data.tokenizer)
    files = corpus.find_files(data.source)
    size = sum(file.path.stat().st_size for file in files)
    found = corpus.survey(files, _counter(tell, size, "reading"))
    record = _new_record(data, found, given, shard_tokens)
    kind = data.tokenizer if data.tokenizer in ("bpe", "bytes", "gpt2") else _slug(data.tokenizer)
    place = f"{record['name']}-{kind}-{record['fingerprint'][:12]}"
    folder = out or Path(data.cache).expanduser() / place
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.parent, tell):
            if not _is_ready(folder, record["fingerprint"], ours=out is None):
                _build(folder, found, given, record, shard_tokens, tell)
    except OSError as error:
        raise OSError(
            error.errno,
            f"prepared tokens cannot be written to {folder}: {error.strerror}; free space there "
            "or choose another folder (data.cache, or out)",
        ) from error
    return folder


def _accept(ready: Path, data: DataConfig, out: Path | None) -> Path:
    """A prepared folder given as the source, if nothing asked for contradicts it."""
    if out is not None:
        raise ValueError(f"out must be left out for a prepared folder, got {out}; {ready} is ready")
    opened = TokenData.open(ready)
    had = read_record(ready)["tokenizer"]
    if data.tokenizer == "bpe":
        fits = data.vocab_size in (DataConfig.vocab_size, had["vocab_size"], opened.vocab_size)
    elif data.tokenizer == "gpt2":
        fits = had["name"] == "gpt2"
    else:
        fits = Tokenizer.load(data.tokenizer).digest == opened.tokenizer.digest
    if not fits:
        raise ValueError(
            f"data.tokenizer and data.vocab_size must be those of the prepared folder {ready} "
            f"({had['name']}, {opened.vocab_size}), got {data.tokenizer} and {data.vocab_size}; "
            "leave them out"
        )
    return ready


def _new_record(
    data: DataConfig, found: corpus.Survey, given: Tokenizer | None, shard_tokens: int
) -> dict[str, Any]:
    """The start of dataset.json: what was asked for, and the fingerprint of what it depends on."""
    if found.skipped:
        logging.getLogger(__name__).warning(
            "files left out because they are not UTF-8 text: %d (%s%s)",
            len(found.skipped),
            ", ".join(found.skipped[:3]),
            " ..." if len(found.skipped) > 3 else "",
        )
    spec = given.digest if given else f"bpe {data.vocab_size}"
    names = [file.name for file in found.files]
    parts = [FORMAT, spec, shard_tokens, names, found.sizes, found.digests]
    return {
        "format": FORMAT,
        "name": _slug(data.source[0]),
        "fingerprint": hash_json(parts),
        "sources": list(data.source),
        "skipped": len(found.skipped),
        "tokenizer": {"name": data.tokenizer, "vocab_size": data.vocab_size},
    }


@contextlib.contextmanager
def _alone(parent: Path, tell: Progress) -> Iterator[None]:
    """Lets one process at a time prepare in a folder; the next one then finds the work done."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(0, 1, "waiting for another prepare")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            # Some network file systems have no locks; there, as on Windows, two at once collide.
            logging.getLogger(__name__).info("no lock on %s: %s", parent, error)
        yield
    finally:
        os.close(handle)


def _is_ready(folder: Path, fingerprint: str, *, ours: bool) -> bool:
    """Whether the folder is this corpus, complete; False where it is to be made (again)."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        same = read_record(folder)["fingerprint"] == fingerprint
    except ValueError:
        same = ours
    if not same:
        raise ValueError(
            f"out must be a new folder or this very corpus prepared, got {folder}, which is "
            "something else; choose another folder or delete it"
        )
    try:
        TokenData.open(folder)
    except ValueError as error:
        logging.getLogger(__name__).warning("preparing again: %s", error)
        return False
    return True


def _build(
    folder: Path,
    found: corpus.Survey,
    tokenizer: Tokenizer | None,
    record: dict[str, Any],
    shard_tokens: int,
    tell: Progress,
) -> None:
    """Writes the prepared folder under a temporary name, then renames it."""
    temporary = folder.parent / f".{folder.name}.tmp"
    if temporary.exists():
        shutil.rmtree(temporary)
    try:
        temporary.mkdir()
        held = corpus.held_out(found)
        if tokenizer is None:
            count = _counter(tell, min(sum(found.sizes), corpus.SAMPLE), "training the tokenizer")
            texts = _counted(corpus.sample(found, held), count)
            tokenizer = Tokenizer.train(texts, record["tokenizer"]["vocab_size"])
        record["tokenizer"]["digest"] = tokenizer.digest
        tokenizer.save(temporary)
        writers = {
            split: _Writer(temporary, split, tokenizer, shard_tokens) for split in ("train", "val")
        }
        ids = _encode(found, tokenizer, _counter(tell, sum(found.sizes), "encoding"))
        if held:
            for document, start, part in ids:
                writers["val" if document in held else "train"].add(part, start)
        else:
            _split_stream(ids, temporary / "stream", writers)
        record["splits"] = {split: writer.close() for split, writer in writers.items()}
        if sum(split["bytes"] for split in record["splits"].values()) != sum(found.sizes):
            raise ValueError(
                "data.source must not change while it is read, got another length the second "
                "time; run flashgpt prepare again"
            )
        record["files"] = {path.name: file_digest(path) for path in sorted(temporary.iterdir())}
        record["digest"] = record_digest(record)
        with (temporary / "dataset.json").open("w", encoding="utf-8", newline="\n") as file:
            json.dump(record, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _encode(
    found: corpus.Survey, tokenizer: Tokenizer, count: Callable[[int], None]
) -> Iterator[tuple[int, bool, Ids]]:
    """Document, whether it starts here, and ids, for all of the text in order."""
    dtype = id_dtype(tokenizer.vocab_size)
    start = True
    pieces: list[corpus.Piece] = []
    size = 0

    def encoded() -> Iterator[tuple[int, bool, Ids]]:
        nonlocal start
        encodings = tokenizer.encode_batch([piece.text for piece in pieces])
        for piece, ids in zip(pieces, encodings, strict=True):
            count(int(tokenizer.byte_lengths[ids].sum()))
            if piece.last:
                ids.append(tokenizer.eos_id)
            yield piece.document, start, np.array(ids, dtype)
            start = piece.last

    for piece in corpus.documents(found.files):
        pieces.append(piece)
        size += len(piece.text)
        if size >= _BATCH:
            yield from encoded()
            pieces, size = [], 0
    yield from encoded()


def _split_stream(
    ids: Iterable[tuple[int, bool, Ids]], path: Path, writers: dict[str, _Writer]
) -> None:
    """Training and validation from one stream: the last 5 % of the tokens are validation.

    The stream is written to a file first, because only its end tells how long it is.
    """
    starts = []
    total = 0
    with path.open("wb") as file:
        for _, start, part in ids:
            if start:
                starts.append(total)
            file.write(part.tobytes())
            total += len(part)
    border = total - max(2, round(total / 20))
    if border < 2:
        raise ValueError(
            f"data.source must hold at least 4 tokens, got {total}; give more text to train on"
        )
    stream = np.memmap(path, mode="r", dtype=part.dtype)
    edges = sorted({*starts, border, total})
    for begin, end in itertools.pairwise(edges):
        for at in range(begin, end, _SLICE):
            writer = writers["train" if begin < border else "val"]
            writer.add(stream[at : min(at + _SLICE, end)], start=at == begin)
    del stream
    path.unlink()


class _Writer:
    """Writes one split's shards; a shard is opened only when there is an id to put into it."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._byte_lengths = tokenizer.byte_lengths
        self._itemsize = id_dtype(tokenizer.vocab_size).itemsize
        self._file: BinaryIO | None = None
        self._count = self._highest = 0
        self._starts = array.array("q")
        self._entry: dict[str, Any] = {"shards": [], "tokens": 0, "bytes": 0, "documents": 0}

    def add(self, ids: Ids, start: bool) -> None:
        """Appends ids; `start`: the first of them begins a document."""
        while len(ids):
            file = self._file or self._open()
            if start:
                self._starts.append(self._count)
                start = False
            part = ids[: self._shard_tokens - self._count]
            ids = ids[len(part) :]
            file.write(part.tobytes())
            self._count += len(part)
            self._highest = max(self._highest, int(part.max()))
            self._entry["bytes"] += int(self._byte_lengths[part].sum())
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

    def _finish(self, file: BinaryIO) -> None:
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:3] = MAGIC, FORMAT, self._itemsize
        header[3:5].view("<i8")[0] = self._count
        header[5] = self._highest
        file.seek(0)
        file.write(header.tobytes())
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._file = None
        path = self._folder / self._entry["shards"][-1]
        np.save(docs_path(path), np.array(self._starts, "<i8"), allow_pickle=False)
        self._entry["tokens"] += self._count
        self._entry["documents"] += len(self._starts)


def _slug(source: str) -> str:
    """The part of a folder's name that says where the text came from."""
    stem = Path(source).expanduser().resolve().stem
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-") or "corpus"


def _counter(tell: Progress, total: int, phase: str) -> Callable[[int], None]:
    """Adds up what is done of a phase, and tells it."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done = min(done + more, total)
        tell(done, total, phase)

    return count


def _counted(texts: Iterable[str], count: Callable[[int], None]) -> Iterator[str]:
    for text in texts:
        yield text
        count(len(text))
