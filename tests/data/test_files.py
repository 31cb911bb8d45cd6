"""Files: which ones a corpus has, in which order, under which names.

pytest tests/data/test_files.py
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from flashgpt.data.files import find_files


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


def test_a_folder_gives_its_visible_files_in_order(folder: Path) -> None:
    assert names(folder) == ["books/a.txt", "books/b.txt", "books/sub/c.md", "books/sub/deep/d.txt"]
    assert not any(file.explicit for file in find_files([str(folder)]))


def test_names_do_not_depend_on_where_the_corpus_lies(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = names(folder)
    monkeypatch.chdir(folder.parent)
    assert names("books") == names("./books/") == expected
    monkeypatch.chdir(folder)
    assert names(".") == expected
    assert names("*.txt") == ["books/a.txt", "books/b.txt"]


def test_globs_reach_through_folders(folder: Path) -> None:
    assert names(folder / "*.txt") == ["books/a.txt", "books/b.txt"]
    assert names(folder / "**" / "*.txt") == ["books/a.txt", "books/b.txt", "books/sub/deep/d.txt"]
    assert names(folder / "s*" / "*") == ["books/sub/c.md"]


def test_a_name_with_wildcard_characters_is_the_file_if_there_is_one(tmp_path: Path) -> None:
    path = write(tmp_path / "what[1].txt", "text")
    (file,) = find_files([str(path)])
    assert (file.path, file.name, file.explicit) == (path, "what[1].txt", True)


def test_each_file_counts_once(folder: Path) -> None:
    (folder / "again.txt").symlink_to(folder / "a.txt")
    # Two loops: without care for folders already entered, the walk would take 2^40 turns.
    (folder / "loop").symlink_to(folder)
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "broken").symlink_to(folder / "nothing")
    found = find_files([str(folder), str(folder / "sub"), str(folder / "*.txt"), f"{folder}/b.txt"])
    real = [file.path.resolve().relative_to(folder).as_posix() for file in found]
    assert real == ["a.txt", "b.txt", "sub/c.md", "sub/deep/d.txt"]
    assert [file.explicit for file in found] == [False, True, False, False]


def test_a_linked_folder_is_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "there").symlink_to(folder / "sub")
    assert names(tmp_path / "links") == ["links/there/c.md", "links/there/deep/d.txt"]


def test_prepared_tokens_below_a_folder_are_no_text_of_it(folder: Path) -> None:
    expected = names(folder)
    for name in ("dataset.json", "train-00000.bin", "tokenizer.json"):
        write(folder / "data" / "books-bpe" / name, "{}")
    assert names(folder) == expected


def test_stdlib_is_pythons_own_source_without_its_tests() -> None:
    files = find_files(["stdlib"])
    found = [file.name for file in files]
    assert {"stdlib/os.py", "stdlib/json/decoder.py"} <= set(found)
    assert found == [file.name for file in find_files(["stdlib"])]
    parts = {part for name in found for part in name.split("/")}
    assert not parts & {"site-packages", "dist-packages", "__pycache__", "test", "tests"}
    assert all(name.endswith(".py") for name in found)
    assert sum(file.path.stat().st_size for file in files) > 8e6


@pytest.mark.parametrize("source", ["missing.txt", "missing/*.txt", "empty", "hidden", "folders/*"])
def test_a_source_without_files_is_named(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "folders" / "one").mkdir(parents=True)
    write(tmp_path / "hidden" / ".secret", "text")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.txt", "text")
    with pytest.raises(ValueError, match=re.escape(repr(source))) as raised:
        find_files(["good.txt", source])
    assert str(raised.value).startswith("data.source must name")
    assert "\n" not in str(raised.value)


def test_a_source_that_is_neither_file_nor_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe', which is neither"):
        find_files([str(tmp_path / "pipe")])


def test_unreadable_folders_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, *_: object, **__: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="books cannot be read: Permission denied; change"):
        find_files([str(folder)])
