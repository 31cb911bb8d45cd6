"""Text sources: whether files are text, and what they say.

Owns the check that files are UTF-8 text, reading in pieces, and which text is held out for
validation or teaches a tokenizer. Does not own which files there are (`flashgpt.data.files`), or
tokens (`flashgpt.data.shards`).

One file is one document. Nothing in the text is changed: line ends stay as they are.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator

from flashgpt.data.files import SourceFile, unreadable

# Characters in one piece of text; bounds memory, and gives the tokenizer's threads equal work.
PIECE = 1 << 16
# Characters a tokenizer learns from, and how many of them stand together when text is thinned.
SAMPLE = 8_000_000
_BLOCK = 4096
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a first reading found: the text files with their sizes (bytes) and digests, in order,
    and the names of the files left out because they are not UTF-8 text."""

    files: tuple[SourceFile, ...]
    sizes: tuple[int, ...]
    digests: tuple[str, ...]
    skipped: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a document, at most `PIECE` characters; `first` opens the document, `last` closes
    it."""

    document: int
    text: str
    first: bool
    last: bool


def survey(
    files: Iterable[SourceFile], advance: Callable[[int], None] = lambda bytes_read: None
) -> Survey:
    """Reads every file once: is it text, how long is it, what is its digest.

    Args:
        files: from `find_files`.
        advance: told the bytes of each portion read.

    Raises:
        ValueError: a file named explicitly is empty or not UTF-8 text (names the byte), a file
            cannot be read, or a source has no text at all.
    """
    kept: list[tuple[SourceFile, int, str]] = []
    skipped = []
    without: dict[str, None] = {}
    for file in files:
        without[file.source] = None
        digest = hashlib.blake2b(digest_size=32)
        size, fault = _check(file, digest.update, advance)
        if file.explicit and fault:
            raise ValueError(
                f"data.source file must be UTF-8 text, got {fault} in {file.path}; convert it to "
                "UTF-8 or leave it out"
            )
        if file.explicit and not size:
            raise ValueError(f"data.source file must hold text, got an empty file {file.path}")
        if fault:
            skipped.append(file.name)
        elif size:
            kept.append((file, size, digest.hexdigest()))
    for file, _, _ in kept:
        without.pop(file.source, None)
    if without:
        raise ValueError(
            f"data.source must name UTF-8 text, got {next(iter(without))!r}, whose files are all "
            "empty or not text"
        )
    return Survey(
        files=tuple(file for file, _, _ in kept),
        sizes=tuple(size for _, size, _ in kept),
        digests=tuple(digest for _, _, digest in kept),
        skipped=tuple(skipped),
    )


def documents(files: Iterable[SourceFile]) -> Iterator[Piece]:
    """The text of the files in pieces, in order, in constant memory.

    A document longer than `PIECE` is cut where a newline follows something that is no white
    space, else before such a space. GPT-2's splitting rule has a boundary there, so the pieces
    give the same tokens as the whole; only text that has neither is cut anywhere.

    Raises:
        ValueError: a file cannot be read, or is no longer UTF-8.
    """
    for document, file in enumerate(files):
        pending, first = "", True
        try:
            with open(file.path, encoding="utf-8", newline="") as stream:
                while more := stream.read(PIECE + 1 - len(pending)):
                    pending += more
                    if len(pending) > PIECE:
                        at = _cut(pending)
                        yield Piece(document, pending[:at], first, last=False)
                        pending, first = pending[at:], False
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data.source file {file.path} cannot be read: {error}") from error
        yield Piece(document, pending, first, last=True)


def held_out(found: Survey) -> frozenset[int]:
    """The documents kept for validation: about 5 % of the bytes, at least one document.

    Documents are ranked by the digest of their name and taken until 5 % is reached; one that
    would take the total over 10 % is passed over, so that a giant is never held out. Empty with
    fewer than 20 documents: then whole documents are too coarse to hold out.
    """
    count, total = len(found.files), sum(found.sizes)
    if count < 20:
        return frozenset()
    ranks = [
        hashlib.blake2b(file.name.encode("utf-8", "surrogateescape")).digest()
        for file in found.files
    ]
    held: set[int] = set()
    held_bytes = 0
    for document in sorted(range(count), key=lambda index: (ranks[index], index)):
        if (held_bytes + found.sizes[document]) * 10 <= total:
            held.add(document)
            held_bytes += found.sizes[document]
        if held_bytes * 20 >= total:
            break
    return frozenset(held)


def sample(found: Survey, held: frozenset[int]) -> Iterator[str]:
    """Training text for a tokenizer to learn from, in order.

    Nothing of the documents in `held`; if none is held out, nothing of the last 5 % of the bytes.
    Text past 8 million characters is thinned to about that many, in blocks spread evenly over all
    documents. Memory does not grow with the corpus.
    """
    chosen = [document for document in range(len(found.files)) if document not in held]
    left = sum(found.sizes[document] for document in chosen)
    if not held:
        left -= left // 20
    whole = max(left, SAMPLE)
    step = PIECE if left <= SAMPLE else _BLOCK
    credit = 0
    for piece in documents(found.files[document] for document in chosen):
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


def _check(
    file: SourceFile, update: Callable[[bytes], None], advance: Callable[[int], None]
) -> tuple[int, str]:
    """Size in bytes, and what is not text about the file ("" if it is text)."""
    if file.path.suffix == ".jsonl":
        return 0, "JSON lines, whose fields are not read yet"
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


def _cut(text: str) -> int:
    """Where to cut: before the last newline (else space) that follows a visible character."""
    for mark in ("\n", " "):
        at = text.rfind(mark)
        while at > 0:
            if not text[at - 1].isspace():
                return at
            at = text.rfind(mark, 0, at)
    return PIECE
