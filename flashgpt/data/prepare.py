"""From text to a prepared folder of token files.

Owns what identifies a request, and finding, making and replacing its folder. What is in the folder,
and the reading, is in `flashgpt.data.shards`; which files are text, in `flashgpt.data.corpus`; the
encoding in `flashgpt.data.encode`. Memory does not grow with the corpus.

A preparation that ended before it was done (kill, Ctrl-C, power) leaves what is done of it in a
hidden folder beside the one it makes; the same request goes on from there, to the same bytes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashgpt.data import corpus, foreign
from flashgpt.data.encode import LAYOUT, encode
from flashgpt.data.files import SourceFile, find_files
from flashgpt.data.journal import Journal
from flashgpt.data.progress import Progress, counter
from flashgpt.data.shards import (
    FORMAT,
    FORMAT_IGNORED,
    TokenData,
    file_digest,
    hash_json,
    read_record,
    record_digest,
)
from flashgpt.data.writer import Stream, write_splits
from flashgpt.locks import alone
from flashgpt.runconfig import DataConfig
from flashgpt.tokenizer import Tokenizer

Make = Callable[[Journal], Stream]


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
    A record of a .jsonl or .parquet file is a document; see `flashgpt.data.records`. Token files
    that another program made are taken over as `flashgpt.data.foreign` says.

    Args:
        data: which text, which tokenizer. One source that is a prepared folder is checked and
            returned, if `data` does not ask for another tokenizer than it has.
        out: the folder to make; left out, one in `data.cache`, named after the corpus, the
            tokenizer and a fingerprint of both, so that equal requests find it again.
        progress: called with bytes done, bytes in all, and the name of the phase.
        shard_tokens: ids in one token file at most.

    Raises:
        ValueError: bad sources or tokenizer, too few tokens to split, or `out` is something else
            than this corpus prepared; nothing is overwritten.
        OSError: the folder cannot be written, for example because no space is left.
    """
    tell = progress or (lambda done, total, phase: None)
    ready = Path(data.source[0]).expanduser()
    if len(data.source) == 1 and (ready / "dataset.json").is_file():
        return _accept(ready, data, out)
    given = None if data.tokenizer == "bpe" else Tokenizer.load(data.tokenizer)
    files = find_files(data.source)
    read = _read_tokens if foreign.are_tokens(files) else _read_text
    record, make = read(data, files, given, shard_tokens, tell)
    kind = data.tokenizer if data.tokenizer in ("bpe", "bytes", "gpt2") else _slug(data.tokenizer)
    place = f"{record['name']}-{kind}-{record['fingerprint'][:12]}"
    folder = out or Path(data.cache).expanduser() / place
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The next process that prepares here then finds the work done.
        with alone(folder.parent, lambda: tell(0, 1, "waiting for another prepare")):
            work = folder.parent / f".{folder.name}.tmp"
            if _is_ready(folder, record["fingerprint"], ours=out is None):
                shutil.rmtree(work, ignore_errors=True)  # left over where a kill came at the end
            else:
                with Journal.opened(work, f"{record['fingerprint']}, {LAYOUT}") as journal:
                    _finish(folder, journal, make(journal), record, shard_tokens)
    except OSError as error:
        raise OSError(
            error.errno,
            f"prepared tokens cannot be written to {folder}: {error.strerror}; free space there "
            "or choose another folder (data.cache, or out)",
        ) from error
    return folder


def expected_vocab_size(data: DataConfig) -> int:
    """Ids of the tokenizer that `prepare` will use (count); of one that is to be trained those that
    are asked for: a short text gives fewer.

    Raises:
        ValueError: the tokenizer, or the prepared folder, cannot be read.
    """
    ready = Path(data.source[0]).expanduser()
    if (ready / "dataset.json").is_file():
        return Tokenizer.load(ready).vocab_size
    return data.vocab_size if data.tokenizer == "bpe" else Tokenizer.load(data.tokenizer).vocab_size


def _accept(ready: Path, data: DataConfig, out: Path | None) -> Path:
    """A prepared folder given as the source, if nothing asked for contradicts it."""
    if out is not None:
        raise ValueError(f"out must be left out for a prepared folder, got {out}; {ready} is ready")
    opened = TokenData.open(ready)
    record = read_record(ready)
    had = record["tokenizer"]
    if data.field not in (DataConfig.field, record.get("field")):
        raise ValueError(
            f"data.field must be that of the prepared folder {ready}, got {data.field!r}; leave it "
            "out"
        )
    if data.tokenizer == "bpe":
        fits = data.vocab_size in (DataConfig.vocab_size, had["vocab_size"], opened.vocab_size)
    elif data.tokenizer == "gpt2":
        fits = had["name"] == "gpt2"
    else:
        fits = Tokenizer.load(data.tokenizer).digest == opened.tokenizer.digest
    if not fits and Path(data.tokenizer).exists():  # it may be that of the weights to start from
        raise ValueError(
            f"data.source {ready} was prepared with another tokenizer ({had['name']}, "
            f"{opened.vocab_size} ids) than {data.tokenizer}; prepare the text with that one: "
            f"flashgpt prepare TEXT --tokenizer {shlex.quote(data.tokenizer)}"
        )
    if not fits:
        raise ValueError(
            f"data.tokenizer and data.vocab_size must be those of the prepared folder {ready} "
            f"({had['name']}, {opened.vocab_size}), got {data.tokenizer} and {data.vocab_size}; "
            "leave them out"
        )
    return ready


def _read_text(
    data: DataConfig,
    files: Sequence[SourceFile],
    given: Tokenizer | None,
    shard_tokens: int,
    tell: Progress,
) -> tuple[dict[str, Any], Make]:
    """Reads text once: the start of dataset.json, and how the tokens are made."""
    size = sum(file.path.stat().st_size for file in files)
    found = corpus.survey(files, counter(tell, size, "reading"), data.field)
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
    if found.groups:  # there are records; without them the fingerprint is what it always was
        parts.append(["field", data.field])
    else:
        _check_no_field(data)
    field = {"field": data.field} if found.groups else {}
    record = _new_record(data, parts, skipped=len(found.skipped), **field)
    return record, lambda journal: encode(found, given, data.vocab_size, journal, tell)


def _read_tokens(
    data: DataConfig,
    files: Sequence[SourceFile],
    given: Tokenizer | None,
    shard_tokens: int,
    tell: Progress,
) -> tuple[dict[str, Any], Make]:
    """The same for token files that another program made."""
    _check_no_field(data)
    if given is None:
        raise ValueError(
            f"data.tokenizer must name the tokenizer that {files[0].path} was made with (gpt2, or "
            "the path of one), got bpe, which is trained on text"
        )
    size = sum(file.path.stat().st_size for file in files)
    found = foreign.survey(files, given, counter(tell, size, "reading"))
    parts = [FORMAT, given.digest, shard_tokens, "token files", found.identity]
    record = _new_record(data, parts, skipped=0)
    return record, lambda journal: foreign.stream(found, given, tell)


def _check_no_field(data: DataConfig) -> None:
    if data.field != DataConfig.field:
        raise ValueError(
            f"data.field is for .jsonl and .parquet files, got {data.field!r} and no such file in "
            "data.source; leave it out"
        )


def _new_record(data: DataConfig, parts: list[Any], **more: Any) -> dict[str, Any]:
    """The start of dataset.json: what was asked for, and the fingerprint of what it depends on."""
    return {
        "format": FORMAT,
        "name": _slug(data.source[0]),
        "fingerprint": hash_json(parts),
        "sources": list(data.source),
        **more,
        "tokenizer": {"name": data.tokenizer, "vocab_size": data.vocab_size},
    }


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


def _finish(
    folder: Path, journal: Journal, stream: Stream, record: dict[str, Any], shard_tokens: int
) -> None:
    """Writes the prepared folder aside, flushed, then renames it."""
    tokens = journal.tokens
    record["tokenizer"]["digest"] = stream.tokenizer.digest
    stream.tokenizer.save(tokens)
    record["splits"] = write_splits(stream, tokens, shard_tokens)
    record["files"] = {path.name: file_digest(path) for path in sorted(tokens.iterdir())}
    if any(name.endswith(".ignored.bin") for name in record["files"]):
        record["format"] = FORMAT_IGNORED
    record["digest"] = record_digest(record)
    with (tokens / "dataset.json").open("w", encoding="utf-8", newline="\n") as file:
        json.dump(record, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    if folder.exists():
        shutil.rmtree(folder)
    tokens.rename(folder)


def _slug(source: str) -> str:
    """The part of a folder's name that says where the text came from."""
    stem = Path(source).expanduser().resolve().stem
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-") or "corpus"
