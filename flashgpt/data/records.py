"""Records of which each is a document: what the text of one is, in whichever file it stands.

Owns which strings of a record are the document, and which of them count in the loss. Does not own
the reading of files (`flashgpt.data.jsonl`, `flashgpt.data.parquet`), or how text is cut and which
documents are held out (`flashgpt.data.corpus`).

A record with the field `data.field` names is that text. Else one with `prompt` and `completion` is
both, nothing put between them; they are tokenised apart, so that no token lies across the border,
and only the completion's tokens and the closing `<|endoftext|>` count in the loss. Records without
a character of text are passed over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Document:
    """The document of a record (from 1): its texts one after another, each with whether it is there
    to be read only and does not count in the loss, and their length (UTF-8 bytes)."""

    number: int
    texts: tuple[tuple[str, bool], ...]
    n_bytes: int


class Fault(Exception):
    """What is wrong with a record."""


def fields(there: Iterable[str], field: str) -> dict[str, bool]:
    """Names of the fields that are the text, each with whether it does not count in the loss.

    Raises:
        Fault: none of those that are there.
    """
    names = list(there)
    if field in names:
        return {field: False}
    if {"prompt", "completion"} <= set(names):
        return {"prompt": True, "completion": False}
    raise Fault(f"the fields {', '.join(map(repr, names[:8])) or 'none'}")


def document(number: int, record: Mapping[str, Any], field: str) -> Document | None:
    """The document of a record; None without a character of text.

    Raises:
        Fault: it has no text, or one that is no string or no UTF-8.
    """
    chosen = fields(record, field)
    for name in chosen:
        if not isinstance(record[name], str):
            raise Fault(f"{name!r} that is no string")
    texts = tuple((record[name], ignored) for name, ignored in chosen.items())
    try:
        n_bytes = sum(len(text.encode("utf-8")) for text, _ in texts)
    except UnicodeEncodeError:
        raise Fault("half a surrogate pair") from None
    return Document(number, texts, n_bytes) if n_bytes else None
