"""Text sources: whether files are text, and what they say.

Owns the check that files are UTF-8 text, reading in pieces, and which text is held out for
validation or teaches a tokenizer. Does not own which files there are (`flashgpt.data.files`), or
tokens (`flashgpt.data.shards`).

One file is one document, but in a .jsonl or .parquet file each record is one
(`flashgpt.data.records`). Nothing in the text is changed: line ends stay as they are.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from flashgpt.data import jsonl, parquet
from flashgpt.data.files import SourceFile, unreadable
from flashgpt.data.records import Document

# Characters in one piece of text; bounds memory, and gives the tokenizer's threads equal work.
PIECE = 1 << 16
# Characters a tokenizer learns from, and how many of them stand together when text is thinned.
SAMPLE = 8_000_000
_BLOCK = 4096
_CHUNK = 1 << 20
# How files begin that hold text only when unpacked.
PACKED = {
    b"\x1f\x8b": "gzip data",
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "zstd data",
    b"\xfd7zXZ\0": "xz data",
    b"BZh": "bzip2 data",
}
GROUPS = 1 << 16
# What reads the records of a file, by the end of its name; any other file is text.
RECORDS = {".jsonl": jsonl.documents, ".parquet": parquet.documents}


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a first reading found.

    Attributes:
        files: those that have text, in order.
        sizes: UTF-8 bytes of text of each; of records, of the strings that are the documents.
        digests: of the content of each.
        skipped: names of the files left out because they are not UTF-8 text.
        n_documents: documents of all files.
        groups: with records, bytes of text in each of the groups that documents fall into; else
            empty, and each file is a group.
        field: the field of records that is the text.
    """

    files: tuple[SourceFile, ...]
    sizes: tuple[int, ...]
    digests: tuple[str, ...]
    skipped: tuple[str, ...]
    n_documents: int
    groups: tuple[int, ...] = ()
    field: str = "text"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a document, at most `PIECE` characters.

    Attributes:
        group: what is held out together with this document.
        first: it opens the document.
        last: it closes the document.
        ignored: it does not count in the loss, only what follows it does.
    """

    group: int
    text: str
    first: bool
    last: bool
    ignored: bool = False


def survey(
    files: Sequence[SourceFile],
    advance: Callable[[int], None] = lambda bytes_read: None,
    field: str = "text",
) -> Survey:
    """Reads every file once: is it text, how long is it, what is its digest.

    Args:
        files: from `find_files`.
        advance: told the bytes of each portion read.
        field: the field of records that is the text.

    Raises:
        ValueError: a file named explicitly is empty or not UTF-8 text (names the byte), a record of
            any file of records is bad (names it), a file cannot be read, or a source has no text.
    """
    kept: list[tuple[SourceFile, int, str]] = []
    skipped = []
    without: dict[str, None] = {}
    groups = [0] * GROUPS if _has_records(files) else []
    n_documents = 0
    for file in files:
        without[file.source] = None
        digest = hashlib.blake2b(digest_size=32)
        if _is_records(file):
            fault = ""
            size, count = _check_records(file, field, digest.update, advance, groups)
        else:
            size, fault = _check(file, digest.update, advance)
            count = 1
            if groups and not fault:
                groups[_group(file)] += size
        if file.explicit and fault:
            packed = _packed(file.path)
            raise ValueError(
                f"data.source file must be UTF-8 text, got {packed or fault} in {file.path}; "
                f"{'unpack it' if packed else 'convert it to UTF-8'} or leave it out"
            )
        if file.explicit and not size:
            raise ValueError(f"data.source file must hold text, got an empty file {file.path}")
        if fault:
            skipped.append(file.name)
        elif size:
            kept.append((file, size, digest.hexdigest()))
            n_documents += count
    for file, _, _ in kept:
        without.pop(file.source, None)
    if without:
        raise ValueError(
            f"data.source must name UTF-8 text, got {next(iter(without))!r}, whose files are all "
            "empty or not text"
        )
    chosen = tuple(file for file, _, _ in kept)
    return Survey(
        files=chosen,
        sizes=tuple(size for _, size, _ in kept),
        digests=tuple(digest for _, _, digest in kept),
        skipped=tuple(skipped),
        n_documents=n_documents,
        groups=tuple(groups) if _has_records(chosen) else (),
        field=field,
    )


def documents(files: Sequence[SourceFile], field: str = "text") -> Iterator[Piece]:
    """The text of the files in pieces, in order, in constant memory (but for the longest line of
    a .jsonl file, and a row group of a .parquet file).

    A text longer than `PIECE` is cut where a newline follows something that is no white space,
    else before such a space. GPT-2's splitting rule has a boundary there, so the pieces give the
    same tokens as the whole; only text that has neither is cut anywhere.

    Raises:
        ValueError: a file cannot be read, or is no longer text.
    """
    by_hash = _has_records(files)
    for number, file in enumerate(files):
        try:
            if _is_records(file):
                for document in RECORDS[file.path.suffix](file.path, field):
                    yield from _record_pieces(document, _group(file, document.number))
            else:
                group = _group(file) if by_hash else number
                with open(file.path, encoding="utf-8", newline="") as stream:
                    first = True
                    for text, last in _cut_up(stream):
                        yield Piece(group, text, first, last)
                        first = False
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data.source file {file.path} cannot be read: {error}") from error


def _record_pieces(document: Document, group: int) -> Iterator[Piece]:
    first = True
    for number, (text, ignored) in enumerate(document.texts, 1):
        closing = number == len(document.texts)
        for part, last in _cut_up(io.StringIO(text, newline="")):
            if part or closing:
                yield Piece(group, part, first, last and closing, ignored)
                first = False


def _cut_up(stream: TextIO) -> Iterator[tuple[str, bool]]:
    """The pieces of a text, each with whether it is the last."""
    pending = ""
    while more := stream.read(PIECE + 1 - len(pending)):
        pending += more
        if len(pending) > PIECE:
            at = _cut(pending)
            yield pending[:at], False
            pending = pending[at:]
    yield pending, True


def held_out(found: Survey) -> frozenset[int]:
    """The groups of documents kept for validation: about 5 % of the bytes, at least one document.

    A file is a group, ranked by the digest of its name. With records, a record or file falls into
    one of 65,536 groups by the digest of its name and number, so that memory does not grow with
    their number. Groups are taken in order until 5 % is reached; one that would take the total over
    10 % is passed over, so that a giant is never held out. Empty with fewer than 20 documents: then
    whole documents are too coarse to hold out.
    """
    if found.n_documents < 20:
        return frozenset()
    sizes = found.groups or found.sizes
    total = sum(sizes)
    order = [group for group, size in enumerate(sizes) if size]
    if not found.groups:
        ranks = [_digest(file.name, 64) for file in found.files]
        order.sort(key=lambda group: (ranks[group], group))
    held: set[int] = set()
    held_bytes = 0
    for group in order:
        if (held_bytes + sizes[group]) * 10 <= total:
            held.add(group)
            held_bytes += sizes[group]
        if held_bytes * 20 >= total:
            break
    return frozenset(held)


def _is_records(file: SourceFile) -> bool:
    return file.path.suffix in RECORDS


def _has_records(files: Sequence[SourceFile]) -> bool:
    return any(map(_is_records, files))


def _group(file: SourceFile, number: int = 0) -> int:
    return int.from_bytes(_digest(f"{file.name}\n{number}", 2), "little")


def _digest(name: str, size: int) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=size).digest()


def sample(found: Survey, held: frozenset[int]) -> Iterator[str]:
    """Training text for a tokenizer to learn from, in order.

    Nothing of the groups in `held`; if none is held out, nothing of the last 5 % of the bytes.
    Text past 8 million characters is thinned to about that many, in blocks spread evenly over all
    documents. Memory does not grow with the corpus.
    """
    left = sum(found.sizes)
    if held:
        left -= sum((found.groups or found.sizes)[group] for group in held)
    else:
        left -= left // 20
    whole = max(left, SAMPLE)
    step = PIECE if left <= SAMPLE else _BLOCK
    credit = 0
    for piece in documents(found.files, found.field):
        if piece.group in held:
            continue
        text = piece.text
        if not held:
            portion = text.encode("utf-8")[:left]
            text = portion.decode("utf-8", errors="ignore")
            left -= len(portion)
        for start in range(0, len(text), step):
            credit += SAMPLE
            if credit >= whole:
                credit -= whole
                yield text[start : start + step]
        if not left:
            return


def _check_records(
    file: SourceFile,
    field: str,
    update: Callable[[bytes], None],
    advance: Callable[[int], None],
    groups: list[int],
) -> tuple[int, int]:
    """Bytes of text of a file, and its documents; adds the bytes of each to its group."""

    def hear(portion: bytes) -> None:
        update(portion)
        advance(len(portion))

    size = count = 0
    try:
        for document in RECORDS[file.path.suffix](file.path, field, hear):
            groups[_group(file, document.number)] += document.n_bytes
            size += document.n_bytes
            count += 1
    except OSError as error:
        raise ValueError(unreadable(error, file.path)) from error
    return size, count


def _check(
    file: SourceFile, update: Callable[[bytes], None], advance: Callable[[int], None]
) -> tuple[int, str]:
    """Size in bytes, and what is not text about the file ("" if it is text)."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    size = 0
    try:
        with open(file.path, "rb") as stream:
            while chunk := stream.read(_CHUNK):
                kept_back = len(decoder.getstate()[0])
                nul = chunk.find(b"\0")
                try:
                    decoder.decode(chunk if nul < 0 else chunk[:nul])
                except UnicodeDecodeError as error:
                    return size, f"an invalid byte at offset {size - kept_back + error.start}"
                if nul >= 0:
                    return size, f"a NUL byte at offset {size + nul}"
                update(chunk)
                size += len(chunk)
                advance(len(chunk))
    except OSError as error:
        raise ValueError(unreadable(error, file.path)) from error
    if kept_back := len(decoder.getstate()[0]):
        return size, f"an unfinished character at offset {size - kept_back}"
    return size, ""


def _packed(path: Path) -> str:
    """What a file that is no text was packed by, by its first bytes ("" if it is not known)."""
    with open(path, "rb") as stream:
        first = stream.read(max(map(len, PACKED)))
    return next((name for start, name in PACKED.items() if first.startswith(start)), "")


def _cut(text: str) -> int:
    """Where to cut: before the last newline (else space) that follows a visible character."""
    for mark in ("\n", " "):
        at = text.rfind(mark)
        while at > 0:
            if not text[at - 1].isspace():
                return at
            at = text.rfind(mark, 0, at)
    return PIECE
