"""Parquet files: one row, one record (`flashgpt.data.records`). Needs pyarrow, the extra `hub`.

Reads the columns of text alone, a row group at a time, so memory is that of one group's text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashgpt.data.records import Document, Fault, document, fields

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

BATCH_ROWS = 1024  # that become Python strings at once
_CHUNK = 1 << 20


def documents(
    path: Path, field: str, hear: Callable[[bytes], None] = lambda content: None
) -> Iterator[Document]:
    """The documents of a file.

    Args:
        hear: told the content of the file in portions, all of it before the first document.

    Raises:
        ValueError: pyarrow is not installed, the file is no Parquet file or damaged, or it has no
            text; names the row that has none.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as content:
        while portion := content.read(_CHUNK):
            hear(portion)
    with _opened(path) as file:
        try:
            columns = list(fields(file.schema_arrow.names, field))
        except Fault as fault:
            raise _refusal(fault, str(path), field) from fault
        for number, record in enumerate(_records(file, columns, path), 1):
            try:
                found = document(number, record, field)
            except Fault as fault:
                raise _refusal(fault, f"row {number} of {path}", field) from fault
            if found:
                yield found


def _opened(path: Path) -> ParquetFile:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(
            f"data.source file {path} needs the package pyarrow: pip install 'flashgpt[hub]'"
        ) from error
    try:
        return ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _records(file: ParquetFile, columns: list[str], path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow

    try:
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(BATCH_ROWS, [group], columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"data.source file {path} is no Parquet file, or damaged: {error}")


def _refusal(fault: Fault, where: str, field: str) -> ValueError:
    return ValueError(
        f"data.source file must have a column {field!r} of strings, or prompt and completion, got "
        f"{fault} in {where}; name the column with --field (train: --data.field), or mend the file"
    )
