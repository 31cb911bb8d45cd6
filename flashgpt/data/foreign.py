"""Token files that other programs made, as a source: nanoGPT's, llm.c's and modded-nanogpt's.

Owns their layouts, and which of them are validation. A source whose name ends in .bin is one:

    nanoGPT                  ids as little-endian uint16, nothing else
    llm.c, modded-nanogpt    256 little-endian int32 (20240520, 1, number of ids, zeros), the ids

Validation is the file beside it whose name has `val` for `train`: val.bin for train.bin, x_val.bin
for x_train.bin, and all of x_val_*.bin for x_train_000001.bin. Where there is none it is the last
5 % of the tokens. A document starts after each `<|endoftext|>`, which nanoGPT puts behind documents
and llm.c in front of them.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flashgpt.data import shards
from flashgpt.data.files import SourceFile, unreadable
from flashgpt.data.progress import Progress, counter
from flashgpt.data.writer import Stream, Tokens, last_part
from flashgpt.tokenizer import Tokenizer

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
_SLICE = 1 << 22  # ids read at once


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """A file of ids: where they begin in it (bytes), how many there are, and their digest."""

    path: Path
    offset: int
    count: int
    digest: str


@dataclasses.dataclass(frozen=True)
class Found:
    """What a first reading found: the files of each split; without any for validation, that is
    the end of the tokens."""

    train: tuple[TokenFile, ...]
    val: tuple[TokenFile, ...]

    @property
    def identity(self) -> list[list[tuple[int, str]]]:
        """What the tokens depend on."""
        return [[(file.count, file.digest) for file in split] for split in (self.train, self.val)]


def are_tokens(files: Sequence[SourceFile]) -> bool:
    """Whether the sources are token files: their own names end in .bin.

    Raises:
        ValueError: only some are.
    """
    chosen = [file.path.suffix == ".bin" and file.source.endswith(".bin") for file in files]
    if any(chosen) and not all(chosen):
        raise ValueError(
            "data.source must be token files (.bin) or text, got both "
            f"{files[chosen.index(True)].path} and {files[chosen.index(False)].path}; prepare them "
            "apart"
        )
    return all(chosen)


def survey(
    files: Sequence[SourceFile], tokenizer: Tokenizer, advance: Callable[[int], None]
) -> Found:
    """Reads every file once: is it whole, does the tokenizer have its ids, what is its digest.

    Args:
        files: from `find_files`.
        advance: told the bytes of each portion read.

    Raises:
        ValueError: a file is not as its layout has it, has ids past the vocabulary, or cannot be
            read.
    """
    paths = [file.path for file in files]
    val = {os.path.realpath(beside): beside for path in paths for beside in _validation(path)}
    train = [path for path in paths if os.path.realpath(path) not in val]
    return Found(
        train=tuple(_inspect(path, tokenizer, advance) for path in train),
        val=tuple(_inspect(path, tokenizer, advance) for path in val.values()),
    )


def stream(found: Found, tokenizer: Tokenizer, tell: Progress) -> Stream:
    """The ids of the files as the tokens of a corpus.

    Raises:
        ValueError: too few tokens, or while they are read, a file has become shorter.
    """
    total = sum(file.count for file in found.train)
    border = None if found.val else last_part(total)
    count = counter(tell, 2 * (total + sum(file.count for file in found.val)), "writing")

    def tokens() -> Iterator[Tokens]:
        for held, files in ((False, found.train), (True, found.val)):
            opens: bool | None = None  # whether the next id opens a document
            for ids in (ids for file in files for ids in _ids(file)):
                ends = ids == tokenizer.eos_id
                first = np.roll(ends, 1)
                first[0] = not ends[0] if opens is None else opens
                opens = bool(ends[-1])
                yield Tokens(ids, first, np.full(len(ids), held), np.zeros(len(ids), np.bool_))
                count(ids.nbytes)

    return Stream(tokenizer, tokens(), border)


def _validation(path: Path) -> list[Path]:
    """The validation files that belong to a training file."""
    match = re.fullmatch(r"(.*_)?train(_.*)?\.bin", path.name)
    if not match:
        return []
    rest = "_*" if match[2] else ""
    return sorted(path.parent.glob(f"{glob.escape(match[1] or '')}val{rest}.bin"))


def _inspect(path: Path, tokenizer: Tokenizer, advance: Callable[[int], None]) -> TokenFile:
    try:
        offset, count = _layout(path)
        digest, highest = hashlib.blake2b(digest_size=32), 0
        for ids in _ids(TokenFile(path, offset, count, "")):
            digest.update(ids.tobytes())
            highest = max(highest, int(ids.max()))
            advance(ids.nbytes)
    except OSError as error:
        raise ValueError(unreadable(error, path)) from error
    if highest >= tokenizer.vocab_size:
        raise ValueError(
            f"data.tokenizer must have every id of a token file, got id {highest} in {path} and a "
            f"vocabulary of {tokenizer.vocab_size}; name the tokenizer that the file was made with"
        )
    return TokenFile(path, offset, count, digest.hexdigest())


def _layout(path: Path) -> tuple[int, int]:
    """Where the ids begin (bytes), and how many there are."""
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", HEADER_BYTES // 4)
    magic, version, count = [*header[:3].tolist(), 0, 0, 0][:3]
    if not size:
        raise ValueError(f"data.source token file must hold ids, got an empty file {path}")
    if magic == shards.MAGIC:
        raise ValueError(
            "data.source must name the folder of token files that flashgpt prepared, got one of "
            f"its files, {path}"
        )
    # Ids are nowhere so long without any but 0; a header is, whatever its magic number.
    if magic != MAGIC and (len(header) < HEADER_BYTES // 4 or header[3:].any()):
        if size % 2:
            raise ValueError(
                f"data.source token file must be ids of two bytes, got {size} bytes in {path}; it "
                "is cut short, or no token file: text has another name than .bin"
            )
        return 0, size // 2
    if (magic, version) != (MAGIC, VERSION) and size >= HEADER_BYTES:
        raise ValueError(
            f"data.source token file must have the magic number {MAGIC} and version {VERSION}, got "
            f"{magic} and {version} in {path}; make it with llm.c's data scripts for GPT-2"
        )
    if size != HEADER_BYTES + 2 * count or count < 1:
        raise ValueError(
            f"data.source token file must be as long as its header says, got {size} bytes in "
            f"{path}, whose header says {count} ids; it is cut short or damaged: get it again"
        )
    return HEADER_BYTES, count


def _ids(file: TokenFile) -> Iterator[npt.NDArray[np.uint16]]:
    with open(file.path, "rb") as opened:
        opened.seek(file.offset)
        for at in range(0, file.count, _SLICE):
            ids = np.fromfile(opened, "<u2", min(_SLICE, file.count - at))
            if len(ids) < min(_SLICE, file.count - at):
                raise ValueError(
                    f"data.source must not change while it is read, got a shorter {file.path}; run "
                    "flashgpt prepare again"
                )
            yield ids
