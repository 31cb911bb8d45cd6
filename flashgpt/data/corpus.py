"""Text sources: which files a corpus has, whether they are text, and what they say.

Owns the meaning of `data.source`, the check that files are UTF-8 text, reading in pieces, and
which text is held out for validation or teaches a tokenizer. Does not own tokens
(`flashgpt.data.shards`).

One file is one document. Nothing in the text is changed: line ends stay as they are.
"""

from __future__ import annotations

import codecs
import dataclasses
import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

# Characters in one piece of text; bounds memory, and gives the tokenizer's threads equal work.
PIECE = 1 << 16
# Characters a tokenizer learns from, and how many of them stand together when text is thinned.
SAMPLE = 8_000_000
_BLOCK = 4096
_CHUNK = 1 << 20
# Python's own tests are left out of `stdlib`. Measured on 3.11: 12.1 MB of library code remain,
# enough for the demo; the 19 MB of tests would be 60 % of the corpus, mostly tables of literals
# and near-copies of assertions, which teach a small model repetition.
_NO_STDLIB = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
}


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of the corpus: where it is, its name in the corpus (the same wherever the corpus
    lies), whether `data.source` names this very file, and the source that brought it in."""

    path: Path
    name: str
    explicit: bool
    source: str


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a first reading found: the text files with their sizes (bytes) and digests, in order,
    and the names of the files left out because they are not UTF-8 text."""

    files: tuple[TextFile, ...]
    sizes: tuple[int, ...]
    digests: tuple[str, ...]
    skipped: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a document, at most `PIECE` characters; `last` closes the document."""

    document: int
    text: str
    last: bool


def find_files(sources: Sequence[str]) -> list[TextFile]:
    """The files that `sources` name, each once, in a fixed order.

    Args:
        sources: text files, folders (searched in full, hidden names left out), globs (`**` goes
            through folders), or `stdlib` (the .py files of the running Python, tests left out).

    Raises:
        ValueError: a source is not there, cannot be read, or names no file.
    """
    found: dict[str, TextFile] = {}
    for source in sources:
        try:
            files = list(_files_of(source))
        except OSError as error:
            raise ValueError(_unreadable(error, source)) from error
        if not files:
            raise ValueError(f"data.source must name text files, got {source!r}, which has none")
        for file in files:
            real = os.path.realpath(file.path)
            if real not in found:
                found[real] = file
            elif file.explicit and not found[real].explicit:
                found[real] = dataclasses.replace(found[real], explicit=True, source=source)
    return list(found.values())


def survey(
    files: Iterable[TextFile], advance: Callable[[int], None] = lambda bytes_read: None
) -> Survey:
    """Reads every file once: is it text, how long is it, what is its digest.

    Args:
        files: from `find_files`.
        advance: told the bytes of each portion read.

    Raises:
        ValueError: a file named explicitly is empty or not UTF-8 text (names the byte), a file
            cannot be read, or a source has no text at all.
    """
    kept: list[tuple[TextFile, int, str]] = []
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


def documents(files: Iterable[TextFile]) -> Iterator[Piece]:
    """The text of the files in pieces, in order, in constant memory.

    A document longer than `PIECE` is cut where a newline follows something that is no white
    space, else before such a space. GPT-2's splitting rule has a boundary there, so the pieces
    give the same tokens as the whole; only text that has neither is cut anywhere.

    Raises:
        ValueError: a file cannot be read, or is no longer UTF-8.
    """
    for document, file in enumerate(files):
        pending = ""
        try:
            with open(file.path, encoding="utf-8", newline="") as stream:
                while more := stream.read(PIECE + 1 - len(pending)):
                    pending += more
                    if len(pending) > PIECE:
                        at = _cut(pending)
                        yield Piece(document, pending[:at], last=False)
                        pending = pending[at:]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data.source file {file.path} cannot be read: {error}") from error
        yield Piece(document, pending, last=True)


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


def _files_of(source: str) -> Iterator[TextFile]:
    path = Path(source).expanduser()
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        for file in _walk(root, _NO_STDLIB):
            if file.suffix == ".py":
                yield TextFile(file, _name("stdlib", file, root), False, source)
    elif path.is_dir():
        for file in _walk(path, set()):
            yield TextFile(file, _name(path.resolve().name, file, path), False, source)
    elif path.is_file():
        yield TextFile(path, path.name, True, source)
    elif path.exists():
        raise ValueError(f"data.source must be a file or folder, got {source!r}, which is neither")
    elif glob.has_magic(source):
        # Names start below the last folder in front of the first wildcard.
        parts = path.parts
        fixed = next(place for place, part in enumerate(parts) if glob.has_magic(part))
        root = Path(*parts[:fixed])
        matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not matches:
            raise ValueError(
                f"data.source must name text files, got {source!r}, which has no match"
            )
        for file in matches:
            if file.is_file():
                yield TextFile(file, _name(root.resolve().name, file, root), False, source)
    else:
        raise ValueError(
            f"data.source must name files that exist, got {source!r}; check the path, seen from "
            f"{Path.cwd()}"
        )


def _walk(root: Path, leave_out: set[str]) -> Iterator[Path]:
    """The files below a folder, sorted; links are followed, each real folder entered once."""
    entered: set[str] = set()
    for folder, folders, names in os.walk(root, onerror=_raise, followlinks=True):
        real = os.path.realpath(folder)
        # Tokens prepared from a folder may lie below it; they are no text of it.
        passed = real in entered or {"dataset.json", "train-00000.bin"} <= set(names)
        visible = [name for name in folders if name[0] != "." and name not in leave_out]
        folders[:] = [] if passed else sorted(visible)
        if not passed:
            files = (Path(folder, name) for name in sorted(names) if name[0] != ".")
            yield from (file for file in files if file.is_file())
        entered.add(real)


def _raise(error: OSError) -> None:
    raise error


def _unreadable(error: OSError, where: str | Path) -> str:
    return (
        f"data.source {error.filename or where} cannot be read: {error.strerror}; change its "
        "permissions or leave it out"
    )


def _name(top: str, file: Path, root: Path) -> str:
    return f"{top}/{file.relative_to(root).as_posix()}"


def _check(
    file: TextFile, update: Callable[[bytes], None], advance: Callable[[int], None]
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
        raise ValueError(_unreadable(error, file.path)) from error
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
