"""Parquet files: rows are documents as JSON lines are, read a row group at a time.

pytest tests/data/test_parquet.py
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashgpt.data import parquet
from flashgpt.data.prepare import prepare
from flashgpt.data.shards import TokenData
from flashgpt.runconfig import DataConfig

TEXTS = [f"row {i} says \u00e9 {i * i}\n" * (1 + i % 3) for i in range(60)]


@pytest.fixture
def pq() -> Any:
    return pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: the extra hub")


def write(pq: Any, path: Path, columns: dict[str, Sequence[Any]], **how: Any) -> Path:
    import pyarrow

    pq.write_table(pyarrow.table(columns), path, **how)
    return path


def opened(source: Path, **data: Any) -> TokenData:
    config = DataConfig((str(source),), "bytes", cache=str(source.parent / "cache"), **data)
    return TokenData.open(prepare(config))


def lines(path: Path, objects: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in objects))
    return path


def documents(data: TokenData) -> dict[str, list[list[tuple[int, bool]]]]:
    """The documents of each split, every id with whether it does not count, in sorted order: which
    are held out goes by the name of the file too, which differs."""
    found: dict[str, list[list[tuple[int, bool]]]] = {}
    for name, split in (("train", data.train), ("val", data.val)):
        (ids,), (starts,) = split.tokens, split.starts
        ignored = split.ignored.get(0, np.zeros(len(ids), np.bool_))
        pairs = list(zip(ids.tolist(), ignored.tolist(), strict=True))
        ends = [*starts.tolist()[1:], len(ids)]
        found[name] = [pairs[a:b] for a, b in zip(starts.tolist(), ends, strict=True)]
    return found


@pytest.mark.parametrize("kind", ["text", "body", "pairs"])
def test_rows_give_the_documents_of_the_same_json_lines(pq: Any, tmp_path: Path, kind: str) -> None:
    if kind == "pairs":
        asked = [f"{i}? " for i in range(len(TEXTS))]
        columns: dict[str, Sequence[Any]] = {"prompt": asked, "completion": TEXTS, "n": asked}
    else:
        columns = {kind: TEXTS, "other": list(range(len(TEXTS)))}
    field = {} if kind == "pairs" else {"field": kind}
    table = write(pq, tmp_path / "a.parquet", columns, row_group_size=7)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    ours, theirs = (
        documents(opened(path, **field)) for path in (table, lines(tmp_path / "a.jsonl", rows))
    )
    assert sorted(ours["train"] + ours["val"]) == sorted(theirs["train"] + theirs["val"])
    assert len(ours["train"]) + len(ours["val"]) == len(TEXTS) and ours["val"]
    masked = any(ignored for document in ours["train"] for _, ignored in document)
    assert masked is (kind == "pairs")


def test_row_groups_are_read_one_at_a_time_and_alone(
    pq: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(pq, tmp_path / "a.parquet", {"text": TEXTS, "n": TEXTS}, row_group_size=20)
    asked: list[tuple[list[int], list[str]]] = []
    iter_batches = pq.ParquetFile.iter_batches

    def watched(self: Any, rows: int, groups: list[int], columns: list[str]) -> Any:
        asked.append((groups, columns))
        return iter_batches(self, rows, groups, columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    heard: list[bytes] = []
    found = parquet.documents(path, "text", heard.append)
    first = next(found)
    assert (first.number, first.texts) == (1, ((TEXTS[0], False),))
    assert asked == [([0], ["text"])] and b"".join(heard) == path.read_bytes()
    assert [document.texts[0][0] for document in found] == TEXTS[1:]
    assert [groups for groups, _ in asked] == [[0], [1], [2]]


def test_dictionaries_large_strings_and_empty_rows(pq: Any, tmp_path: Path) -> None:
    import pyarrow

    values = pyarrow.array(["a", "", "b"])
    for kind, column in (
        ("large", values.cast(pyarrow.large_string())),
        ("dictionary", values.dictionary_encode()),
    ):
        path = write(pq, tmp_path / f"{kind}.parquet", {"text": column})
        found = [(d.number, d.texts[0][0], d.n_bytes) for d in parquet.documents(path, "text")]
        assert found == [(1, "a", 1), (3, "b", 1)], kind


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"words": ["a"]}, "got the fields 'words' in {path}; name the column with --field"),
    ({"text": ["a", None]}, "got 'text' that is no string in row 2 of {path}"),
    ({"text": [1]}, "got 'text' that is no string in row 1 of {path}"),
    ({"prompt": ["a"]}, "must have a column 'text' of strings, or prompt and completion"),
]


@pytest.mark.parametrize(("columns", "says"), WRONG)
def test_a_file_without_text_says_where(
    pq: Any, tmp_path: Path, columns: dict[str, Any], says: str
) -> None:
    path = write(pq, tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match=re.escape(says.format(path=path))):
        opened(path)


def test_a_damaged_file_is_named(pq: Any, tmp_path: Path) -> None:
    path = write(pq, tmp_path / "a.parquet", {"text": TEXTS}, compression="none")
    content = bytearray(path.read_bytes())
    for name, bad in (
        ("cut", content[:-20]),
        ("text", b"no table at all"),
        ("page", content[:10] + bytes(200) + content[210:]),
    ):
        damaged = tmp_path / f"{name}.parquet"
        damaged.write_bytes(bad)
        with pytest.raises(ValueError, match=f"{name}.parquet is no Parquet file, or damaged"):
            opened(damaged)


def test_without_pyarrow_the_remedy_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=re.escape("pip install 'flashgpt[hub]'")) as caught:
        opened(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
