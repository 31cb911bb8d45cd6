"""Corpus: whether files are text, what they say, and what of it is held out.

pytest tests/data/test_corpus.py
"""

from __future__ import annotations

import bz2
import gzip
import itertools
import lzma
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgpt.data import corpus
from flashgpt.data.corpus import documents, held_out, sample, survey
from flashgpt.data.files import SourceFile, find_files
from flashgpt.tokenizer import Tokenizer


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def names(*sources: str | Path) -> list[str]:
    return [file.name for file in find_files([str(source) for source in sources])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "books"
    for name in ("b.txt", "a.txt", "sub/c.md", "sub/deep/d.txt", ".hidden", ".git/config"):
        write(root / name, f"text of {name}")
    return root


def test_unreadable_files_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = find_files([str(folder)])

    def refuse(path: object, *_: object, **__: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(corpus, "open", refuse, raising=False)
    with pytest.raises(ValueError, match=r"a\.txt cannot be read: Permission denied; change"):
        survey(files)
    with pytest.raises(ValueError, match=r"a\.txt cannot be read"):
        list(documents(files))


BAD = [
    (b"abc\xff", "an invalid byte at offset 3"),
    (b"\xc3\xa9\xe4\xb8", "an unfinished character at offset 2"),
    (b"ab\x00cd", "a NUL byte at offset 2"),
    (b"x" * (1 << 20) + b"\xe4\xb8", f"an unfinished character at offset {1 << 20}"),
    (b"x" * ((1 << 20) - 1) + b"\xe4(", f"an invalid byte at offset {(1 << 20) - 1}"),
    ("text".encode("utf-16"), "an invalid byte at offset 0"),
]


@pytest.mark.parametrize(
    ("packed", "name"),
    [
        (gzip.compress, "gzip data"),
        (lzma.compress, "xz data"),
        (bz2.compress, "bzip2 data"),
        (lambda content: b"PK\x03\x04\x14\x00" + content, "a zip archive"),
    ],
)
def test_a_packed_text_is_to_be_unpacked(
    packed: Callable[[bytes], bytes], name: str, folder: Path
) -> None:
    bad = write(folder / "bad", packed(b"words and words"))
    with pytest.raises(ValueError, match=f"got {name} in .*bad; unpack it or leave it out"):
        survey(find_files([str(bad)]))


def test_a_text_may_begin_as_packed_ones_do(folder: Path) -> None:
    assert survey(find_files([str(write(folder / "good", b"BZh is text"))])).files


@pytest.mark.parametrize(("content", "fault"), BAD)
def test_what_is_not_text_is_refused_by_name_and_skipped_in_a_folder(
    content: bytes, fault: str, folder: Path
) -> None:
    bad = write(folder / "bad.bin", content)
    with pytest.raises(
        ValueError, match=f"must be UTF-8 text, got {fault} in {re.escape(str(bad))}"
    ):
        survey(find_files([str(bad)]))
    found = survey(find_files([str(folder)]))
    assert found.skipped == ("books/bad.bin",)
    assert [file.name for file in found.files] == [n for n in names(folder) if "bad" not in n]


def test_empty_files_are_refused_by_name_and_nothing_in_a_folder(folder: Path) -> None:
    empty = write(folder / "empty.txt", "")
    found = survey(find_files([str(folder)]))
    assert "books/empty.txt" not in [file.name for file in found.files]
    assert found.skipped == ()
    with pytest.raises(ValueError, match=r"must hold text, got an empty file .*empty\.txt"):
        survey(find_files([str(empty)]))


def test_a_folder_without_any_text_is_named(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "binary" / "one", b"\x00")
    write(tmp_path / "binary" / "two", b"")
    with pytest.raises(ValueError, match=r"binary', whose files are all empty or not text"):
        survey(find_files([str(folder), str(tmp_path / "binary")]))


def test_a_survey_tells_sizes_and_changed_contents(folder: Path) -> None:
    write(folder / "a.txt", "\u00e9" * 700_000)
    read: list[int] = []
    first = survey(find_files([str(folder)]), read.append)
    assert first.sizes[0] == 1_400_000
    assert sum(read) == sum(first.sizes)
    assert survey(find_files([str(folder)])) == first
    write(folder / "a.txt", "\u00e9" * 699_999 + "\u00e8")
    second = survey(find_files([str(folder)]))
    assert second.sizes == first.sizes
    assert second.digests[0] != first.digests[0]
    assert second.digests[1:] == first.digests[1:]


def test_text_is_not_changed_and_documents_are_closed(tmp_path: Path) -> None:
    texts = ["one\r\ntwo\rthree\n\n", "\ufeff\u4e2d\u6587 \U0001f642", "x"]
    for number, text in enumerate(texts):
        write(tmp_path / f"{number}.txt", text)
    pieces = list(documents(find_files([str(tmp_path)])))
    assert [(piece.group, piece.text, piece.first, piece.last) for piece in pieces] == [
        (number, text, True, True) for number, text in enumerate(texts)
    ]


@given(
    parts=st.lists(
        st.sampled_from(["word", "it's", "\n", "\r\n", " ", "    ", "\t", "12", "!?", "\u00e9"])
        | st.text(max_size=3),
        max_size=80,
    ).filter(lambda parts: "".join(parts).replace("\x00", ""))
)
@settings(max_examples=150, deadline=None)
def test_pieces_make_the_text_and_have_the_tokens_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str]
) -> None:
    text = "".join(parts).replace("\x00", "")
    path = write(tmp_path_factory.mktemp("pieces") / "text.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE", 16)
        pieces = list(documents(find_files([str(path)])))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert all(0 < len(piece.text) <= 16 for piece in pieces)
    for before, after in itertools.pairwise(pieces):
        natural = after.text[0] in " \n" and not before.text[-1].isspace()
        unbroken = len(before.text) == 16 and not re.search(r"\S[ \n]", before.text)
        assert natural or unbroken
        if not natural:
            return
    tokenizer = Tokenizer.train(["word it's word it's\n\n    word\r\n    12 12!?!? "] * 3, 300)
    ids = [token for piece in pieces for token in tokenizer.encode(piece.text)]
    assert ids == tokenizer.encode(text)


def test_a_large_file_comes_in_bounded_pieces(tmp_path: Path) -> None:
    line = "some words of an ordinary line\n"
    path = write(tmp_path / "large.txt", line * 20_000)
    pieces = list(documents(find_files([str(path)])))
    assert max(len(piece.text) for piece in pieces) <= corpus.PIECE
    assert all(piece.text[0] == "\n" for piece in pieces[1:])
    assert "".join(piece.text for piece in pieces) == line * 20_000


def many(root: Path, sizes: list[int]) -> corpus.Survey:
    for number, size in enumerate(sizes):
        write(root / f"{number:03d}.txt", f"{number:03d} ".ljust(size, "x"))
    return survey(find_files([str(root)]))


def test_five_per_cent_are_held_out_whatever_the_place_and_order(tmp_path: Path) -> None:
    found = many(tmp_path / "here" / "corpus", [100] * 100)
    held = held_out(found)
    assert len(held) == 5
    assert held_out(many(tmp_path / "there" / "corpus", [100] * 100)) == held
    assert len(held_out(many(tmp_path / "twenty", [100] * 20))) == 1
    assert held_out(many(tmp_path / "nineteen", [100] * 19)) == frozenset()


def test_growing_the_corpus_keeps_the_split_nearly(tmp_path: Path) -> None:
    before = many(tmp_path / "corpus", [100] * 200)
    held = {before.files[index].name for index in held_out(before)}
    after = many(tmp_path / "corpus", [100] * 220)
    assert held <= {after.files[index].name for index in held_out(after)}


@given(
    sizes=st.lists(st.sampled_from([1, 10, 100, 5000, 100_000]), min_size=20, max_size=60),
    salt=st.integers(0, 10**6),
)
@settings(max_examples=100, deadline=None)
def test_something_is_held_out_and_never_too_much(sizes: list[int], salt: int) -> None:
    files = tuple(
        SourceFile(Path(f"{number}"), f"{salt}/{number}", False, "corpus")
        for number in range(len(sizes))
    )
    held = held_out(corpus.Survey(files, tuple(sizes), ("",) * len(sizes), (), len(sizes)))
    assert 1 <= len(held) < len(sizes)
    assert sum(sizes[index] for index in held) * 10 <= sum(sizes)


def test_the_sample_is_the_training_text_alone(tmp_path: Path) -> None:
    found = many(tmp_path / "many", [100] * 40)
    held = held_out(found)
    texts = [file.path.read_text() for file in found.files]
    assert list(sample(found, held)) == [t for n, t in enumerate(texts) if n not in held]
    single = survey(find_files([str(write(tmp_path / "one.txt", "\u00e9" * 950 + "V" * 100))]))
    assert "".join(sample(single, frozenset())) == "\u00e9" * 950


def test_a_large_corpus_is_thinned_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = [chr(0x100 + number) for number in range(30)]
    for letter in letters:
        write(tmp_path / "many" / letter, letter * 5 * 4096)
    found = survey(find_files([str(tmp_path / "many")]))
    held = held_out(found)
    wanted = 33
    monkeypatch.setattr(corpus, "SAMPLE", wanted * 2 * 4096)
    blocks = list(sample(found, held))
    assert list(sample(found, held)) == blocks
    assert len(blocks) == wanted
    assert all(block == block[0] * 4096 for block in blocks)
    taken = [sum(block[0] == letter for block in blocks) for letter in letters]
    assert [number for number, count in enumerate(taken) if not count] == sorted(held)
    assert max(taken) <= 2
