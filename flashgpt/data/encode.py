"""From text to tokens, in parts that are kept: the long work of preparing.

Owns batches of text, their encoding while others are read and written, and what is in a part. Does
not own where parts are kept (`flashgpt.data.journal`) or what becomes of them
(`flashgpt.data.writer`).
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashgpt.data import corpus
from flashgpt.data.journal import Journal
from flashgpt.data.progress import Progress, counter
from flashgpt.data.shards import id_dtype
from flashgpt.data.writer import Stream, Tokens, last_part
from flashgpt.tokenizer import Tokenizer

# A batch is encoded at once: so many characters, or so many pieces where these are short.
BATCH, BATCH_PIECES = 1 << 21, 1 << 14
PART_BATCHES = 4  # batches in one part: what a kill costs at most, besides those in work
# The rules by which parts are cut and laid out; where they change, old parts must not be used.
LAYOUT = f"parts 1, batches of {BATCH}, {BATCH_PIECES}, {PART_BATCHES}"

Columns = dict[str, npt.NDArray[Any]]


def encode(
    found: corpus.Survey, given: Tokenizer | None, vocab_size: int, journal: Journal, tell: Progress
) -> Stream:
    """Encodes the text, as far as the journal does not have it yet.

    Args:
        given: the tokenizer; left out, one of `vocab_size` ids is trained on the training text.

    Raises:
        ValueError: a file cannot be read, is not as `found` says, or there is too little text.
    """
    held = corpus.held_out(found)
    total = sum(found.sizes)
    tokenizer = given or journal.tokenizer
    if tokenizer is None:
        count = counter(tell, min(total, corpus.SAMPLE), "training the tokenizer")
        tokenizer = Tokenizer.train(_counted(corpus.sample(found, held), count), vocab_size)
        journal.keep_tokenizer(tokenizer)
    done = len(journal.parts)
    count = counter(tell, total, "encoding, from where it was" if done else "encoding")
    ahead = batches(corpus.documents(found.files, found.field))
    for batch in itertools.islice(ahead, done * PART_BATCHES):
        count(_n_bytes(batch))
    for number, part in enumerate(_parts(ahead, tokenizer, held, count), done):
        journal.keep_part(number, part)
    parts = journal.parts
    if sum(_total(part, "bytes") for part in parts) != total:
        raise ValueError(
            "data.source must not change while it is read, got another length the second "
            "time; run flashgpt prepare again"
        )
    border = None if held else last_part(sum(_total(part, "lengths") for part in parts))
    return Stream(tokenizer, map(_read, parts), border)


def batches(pieces: Iterable[corpus.Piece]) -> Iterator[list[corpus.Piece]]:
    """Pieces that are encoded at once: enough to keep the threads busy, few enough for memory."""
    batch: list[corpus.Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH or len(batch) == BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _parts(
    ahead: Iterable[list[corpus.Piece]],
    tokenizer: Tokenizer,
    held: frozenset[int],
    count: Callable[[int], None],
) -> Iterator[Columns]:
    waiting: collections.deque[list[corpus.Piece]] = collections.deque()

    def texts() -> Iterator[list[str]]:
        for batch in ahead:
            waiting.append(batch)
            yield [piece.text for piece in batch]

    def columns() -> Iterator[Columns]:
        for encoded in tokenizer.encode_batches(texts()):
            made = _columns(waiting.popleft(), encoded, tokenizer, held)
            yield made
            count(int(made["bytes"].sum()))

    every = columns()
    while part := list(itertools.islice(every, PART_BATCHES)):
        yield {name: np.concatenate([batch[name] for batch in part]) for name in part[0]}


def _columns(
    batch: list[corpus.Piece], encoded: list[list[int]], tokenizer: Tokenizer, held: frozenset[int]
) -> Columns:
    """The ids of a batch one after another, and of each piece what `_read` needs."""
    for piece, ids in zip(batch, encoded, strict=True):
        if piece.last:
            ids.append(tokenizer.eos_id)
    lengths = np.array([len(ids) for ids in encoded], np.int64)
    every = itertools.chain.from_iterable(encoded)
    return {
        "ids": np.fromiter(every, id_dtype(tokenizer.vocab_size), int(lengths.sum())),
        "lengths": lengths,
        "first": np.array([piece.first for piece in batch]),
        "ignored": np.array([piece.ignored for piece in batch]),
        "held": np.array([piece.group in held for piece in batch]),
        "bytes": np.array([_n_bytes(batch)]),
    }


def _read(part: Path) -> Tokens:
    with np.load(part, allow_pickle=False) as columns:
        ids, lengths = columns["ids"], columns["lengths"]
        first = np.zeros(len(ids), np.bool_)
        first[(np.cumsum(lengths) - lengths)[columns["first"]]] = True
        held, ignored = (np.repeat(columns[name], lengths) for name in ("held", "ignored"))
        return Tokens(ids, first, held, ignored)


def _total(part: Path, name: str) -> int:
    with np.load(part, allow_pickle=False) as columns:
        return int(columns[name].sum())


def _n_bytes(batch: list[corpus.Piece]) -> int:
    return sum(len(piece.text.encode("utf-8")) for piece in batch)


def _counted(texts: Iterable[str], count: Callable[[int], None]) -> Iterator[str]:
    for text in texts:
        yield text
        count(len(text))
