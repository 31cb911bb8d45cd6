"""JSON lines: one object a line, one document each.

Owns which strings of an object are the document, and which of them count in the loss. Does not own
how text is cut, or which documents are held out (`flashgpt.data.corpus`).

An object with the field `data.field` names is that text. Else one with `prompt` and `completion` is
both, nothing put between them; they are tokenised apart, so that no token lies across the border,
and only the completion's tokens and the closing `<|endoftext|>` count in the loss. Blank lines and
objects without a character of text are passed over.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Document:
    """The document of a line (from 1): its texts one after another, each with whether it is there
    to be read only and does not count in the loss, and their length (UTF-8 bytes)."""

    line: int
    texts: tuple[tuple[str, bool], ...]
    n_bytes: int


def is_jsonl(path: Path) -> bool:
    """Whether a file holds JSON lines: its name says so."""
    return path.suffix == ".jsonl"


def documents(
    path: Path, field: str, hear: Callable[[bytes], None] = lambda line: None
) -> Iterator[Document]:
    """The documents of a file, a line in memory at a time.

    Args:
        hear: told every line of the file as it is read.

    Raises:
        ValueError: names the line that is no UTF-8, no JSON object, or has no text.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            hear(line)
            if not line.strip():
                continue
            try:
                texts = _texts(line, field)
                n_bytes = sum(len(text.encode("utf-8")) for text, _ in texts)
            except UnicodeEncodeError:
                raise ValueError(_message("half a surrogate pair", path, number, field)) from None
            except _Fault as fault:
                raise ValueError(_message(str(fault), path, number, field)) from fault
            if n_bytes:
                yield Document(number, texts, n_bytes)


class _Fault(Exception):
    """What is wrong with a line."""


def _texts(line: bytes, field: str) -> tuple[tuple[str, bool], ...]:
    try:
        found = json.loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise _Fault(f"an invalid byte at offset {error.start}") from error
    except json.JSONDecodeError as error:
        raise _Fault(f"no JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise _Fault(f"no JSON that can be read ({error})") from error
    if not isinstance(found, dict):
        raise _Fault("JSON that is no object")
    if field in found:
        ignored = {field: False}
    elif {"prompt", "completion"} <= found.keys():
        ignored = {"prompt": True, "completion": False}
    else:
        raise _Fault(f"the fields {', '.join(map(repr, list(found)[:8])) or 'none'}")
    for name in ignored:
        if not isinstance(found[name], str):
            raise _Fault(f"{name!r} that is no string")
    return tuple((found[name], ignored[name]) for name in ignored)


def _message(fault: str, path: Path, line: int, field: str) -> str:
    return (
        f"data.source line must be a JSON object with a string {field!r}, or prompt and "
        f"completion, got {fault} in line {line} of {path}; name the field with data.field, or "
        "mend the line"
    )
