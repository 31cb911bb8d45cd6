"""JSON lines: one object a line, a record each (`flashgpt.data.records`). Blank lines are passed
over."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flashgpt.data.records import Document, Fault, document


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
                found = document(number, _object(line), field)
            except Fault as fault:
                raise ValueError(
                    f"data.source line must be a JSON object with a string {field!r}, or prompt "
                    f"and completion, got {fault} in line {number} of {path}; name the field with "
                    "--field (train: --data.field), or mend the line"
                ) from fault
            if found:
                yield found


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise Fault(f"an invalid byte at offset {error.start}") from error
    except json.JSONDecodeError as error:
        raise Fault(f"no JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise Fault(f"no JSON that can be read ({error})") from error
    if not isinstance(found, dict):
        raise Fault("JSON that is no object")
    return found
