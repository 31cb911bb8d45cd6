"""Encoding: how text comes in batches, and how much memory that takes.

pytest tests/data/test_encode.py
"""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgpt.data import encode
from flashgpt.data.corpus import Piece, documents, held_out, survey
from flashgpt.data.files import find_files
from flashgpt.data.prepare import prepare
from flashgpt.runconfig import DataConfig


@given(lengths=st.lists(st.integers(0, 30), max_size=80))
@settings(max_examples=100, deadline=None)
def test_batches_are_all_pieces_in_order_and_bounded(lengths: list[int]) -> None:
    pieces = [Piece(n, "x" * length, True, True) for n, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "BATCH", 50)
        patch.setattr(encode, "BATCH_PIECES", 7)
        made = list(encode.batches(pieces))
    assert [piece for batch in made for piece in batch] == pieces
    for batch in made:
        size = sum(len(piece.text) for piece in batch)
        assert 1 <= len(batch) <= 7
        assert size - len(batch[-1].text) < 50
        assert size >= 50 or len(batch) == 7 or batch is made[-1]


def peak_of_reading(path: Path) -> int:
    """Bytes allocated at most while a corpus is read twice, as prepare does."""
    tracemalloc.start()
    try:
        found = survey(find_files([str(path)]))
        held = held_out(found)
        for batch in encode.batches(documents(found.files)):
            assert any(piece.group not in held for piece in batch)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH", 10_000)
    peaks = []
    for count in (1000, 8000):
        path = tmp_path / f"{count}.jsonl"
        line = json.dumps({"prompt": "some words", "completion": "more words " * 3})
        path.write_text(f"{line}\n" * count)
        peaks.append(peak_of_reading(path))
    assert peaks[1] < peaks[0] + 200_000


def test_progress_reaches_the_bytes_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text('{"prompt": "\\u00e9", "completion": "abc"}\n' * 30)
    told: dict[str, tuple[int, int]] = {}

    def tell(done: int, total: int, phase: str) -> None:
        told[phase] = (done, total)

    prepare(DataConfig((str(path),), "bytes", cache=str(tmp_path / "cache")), progress=tell)
    assert told == {"reading": (path.stat().st_size,) * 2, "encoding": (150, 150)}
