"""A prepare that was ended goes on where it was, to the same bytes.

pytest tests/data/test_journal.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from flashgpt.data import encode
from flashgpt.data import prepare as preparing
from flashgpt.data.prepare import prepare
from flashgpt.data.shards import TokenData
from flashgpt.runconfig import DataConfig
from flashgpt.tokenizer import Tokenizer

BATCH, PART_BATCHES = 300, 2
GOES_ON = "encoding, from where it was"

# Prepares argv[4] as argv[5], and stands still before call argv[3] of argv[1].argv[2].
GATED = f"""
import importlib, sys
from pathlib import Path
from flashgpt.runconfig import DataConfig
from flashgpt.data import encode
from flashgpt.data.prepare import prepare
encode.BATCH, encode.PART_BATCHES = {BATCH}, {PART_BATCHES}
module, _, owner = sys.argv[1].partition(":")
owner = getattr(importlib.import_module("flashgpt.data." + module), owner)
method, left = getattr(owner, sys.argv[2]), int(sys.argv[3])
def gated(*arguments, **keywords):
    global left
    left -= 1
    if not left:
        print("at the gate", flush=True)
        sys.stdin.readline()
    return method(*arguments, **keywords)
setattr(owner, sys.argv[2], gated)
prepare(DataConfig((sys.argv[4],), "bpe", 300), out=Path(sys.argv[5]))
"""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "BATCH", BATCH)
    monkeypatch.setattr(encode, "PART_BATCHES", PART_BATCHES)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Forty documents of 60 to 100 characters: five parts."""
    (tmp_path / "text").mkdir()
    for n in range(40):
        lines = f"document {n} says:\n" + f"{n * n} times {n}\r\n" * (3 + n % 3)
        (tmp_path / "text" / f"{n:02d}.txt").write_bytes(lines.encode())
    return tmp_path / "text"


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed prepare makes."""
    return content(prepare(DataConfig((str(source),), "bpe", 300), out=tmp_path / "whole"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill(source: Path, out: Path, owner: str, name: str, call: int) -> None:
    """A prepare that is killed before a call of owner.name."""
    command = [sys.executable, "-c", GATED, owner, name, str(call), str(source), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"at the gate\n"
        process.kill()
        assert process.wait(timeout=60) == -signal.SIGKILL


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize(
    ("owner", "name", "call", "parts"),
    [
        ("journal:Journal", "keep_tokenizer", 1, 0),
        ("journal:Journal", "keep_part", 1, 0),
        ("journal:Journal", "keep_part", 4, 3),
        ("journal:os", "fsync", 5, 2),  # a part is written, and not renamed yet
        ("prepare:json", "dump", 1, 5),  # the shards are written
    ],
)
def test_a_killed_prepare_goes_on_to_the_same_bytes(
    source: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: str,
    name: str,
    call: int,
    parts: int,
) -> None:
    out = tmp_path / "made" / "tokens"
    kill(source, out, owner, name, call)
    assert os.listdir(out.parent) == [".tokens.tmp"]
    assert len(list((out.parent / ".tokens.tmp").glob("part-*.npz"))) == parts
    phases, seen = phases_and_texts(monkeypatch, source, out)
    assert ("training the tokenizer" in phases) == (name == "keep_tokenizer")
    assert (GOES_ON in phases, "encoding" in phases) == (parts > 0, parts == 0)
    texts = [path.read_bytes().decode() for path in sorted(source.iterdir())]
    assert seen == texts[-len(seen) :] if parts < 5 else not seen
    assert len(seen) < 40 or parts == 0
    assert content(out) == whole
    assert os.listdir(out.parent) == ["tokens"]


def phases_and_texts(
    monkeypatch: pytest.MonkeyPatch, source: Path, out: Path
) -> tuple[set[str], list[str]]:
    """Prepares; the phases that it told, and every text that it encoded."""
    phases: set[str] = set()
    seen: list[str] = []
    encode_batches = Tokenizer.encode_batches

    def watched(self: Tokenizer, batches: Iterable[Sequence[str]]) -> Iterator[list[list[int]]]:
        def told() -> Iterator[Sequence[str]]:
            for texts in batches:
                seen.extend(texts)
                yield texts

        return encode_batches(self, told())

    def tell(done: int, total: int, phase: str) -> None:
        assert 0 < done <= total
        phases.add(phase)

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_batches", watched)
        prepare(DataConfig((str(source),), "bpe", 300), out=out, progress=tell)
    return phases, seen


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_what_a_late_kill_leaves_over_is_removed(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "made" / "tokens"
    kill(source, out, "journal:shutil", "rmtree", 3)  # all that is left to do
    assert sorted(os.listdir(out.parent)) == [".tokens.tmp", "tokens"]
    assert phases_and_texts(monkeypatch, source, out) == ({"reading"}, [])
    assert os.listdir(out.parent) == ["tokens"]
    assert content(out) == whole


def test_an_interrupt_keeps_what_is_done(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "made" / "tokens"
    half = sum(path.stat().st_size for path in source.iterdir()) // 2

    def interrupt(done: int, total: int, phase: str) -> None:
        if phase == "encoding" and done > half:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(DataConfig((str(source),), "bpe", 300), out=out, progress=interrupt)
    phases, seen = phases_and_texts(monkeypatch, source, out)
    assert phases == {"reading", GOES_ON}
    assert 0 < len(seen) < 40
    assert content(out) == whole
    assert os.listdir(out.parent) == ["tokens"]


@pytest.mark.parametrize("change", ["text", "setting", "layout", "note"])
def test_what_was_done_for_another_request_is_discarded(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    def interrupt(done: int, total: int, phase: str) -> None:
        if phase == "encoding" and done == total:
            raise KeyboardInterrupt

    data, out = DataConfig((str(source),), "bpe", 300), tmp_path / "made" / "tokens"
    with pytest.raises(KeyboardInterrupt):
        prepare(data, out=out, progress=interrupt)
    left = out.parent / ".tokens.tmp"
    assert list(left.glob("part-*.npz")) and (left / "tokenizer.json").exists()
    if change == "text":
        (source / "00.txt").write_text("another text")
    elif change == "setting":
        data = DataConfig((str(source),), "bpe", 290)
    elif change == "layout":
        monkeypatch.setattr(preparing, "LAYOUT", "parts of another version")
    else:
        (left / "request").unlink()
    phases: set[str] = set()
    prepare(data, out=out, progress=lambda done, total, phase: phases.add(phase))
    assert phases == {"reading", "training the tokenizer", "encoding"}
    assert content(out) == content(prepare(data, out=tmp_path / "fresh"))
    assert TokenData.open(out).vocab_size == data.vocab_size
    assert os.listdir(out.parent) == ["tokens"]
