"""Which files a corpus has: the meaning of `data.source`.

Owns files, folders, globs, data sets of the hub and `stdlib`, their order and their names in the
corpus. Does not open them: what is in them is up to `flashgpt.data.corpus` and
`flashgpt.data.foreign`.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from flashgpt.data import hub

# Python's own tests are left out of `stdlib`. Measured on 3.11: 12.1 MB of library code remain,
# enough for the demo; the 19 MB of tests would be 60 % of the corpus, mostly tables of literals
# and near-copies of assertions, which teach a small model repetition.
_NO_STDLIB = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
}


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file of the corpus: where it is, its name in the corpus (the same wherever the corpus
    lies), whether `data.source` names this very file, and the source that brought it in."""

    path: Path
    name: str
    explicit: bool
    source: str


def find_files(sources: Sequence[str]) -> list[SourceFile]:
    """The files that `sources` name, each once, in a fixed order.

    Args:
        sources: text files, folders (searched in full, hidden names left out), globs (`**` goes
            through folders), `hf://OWNER/NAME` (`flashgpt.data.hub`), or `stdlib` (the .py files of
            the running Python, tests left out).

    Raises:
        ValueError: a source is not there, cannot be read, or names no file.
    """
    found: dict[str, SourceFile] = {}
    for source in sources:
        try:
            files = list(_files_of(source))
        except OSError as error:
            raise ValueError(unreadable(error, source)) from error
        if not files:
            raise ValueError(f"data.source must name text files, got {source!r}, which has none")
        for file in files:
            real = os.path.realpath(file.path)
            if real not in found:
                found[real] = file
            elif file.explicit and not found[real].explicit:
                found[real] = dataclasses.replace(found[real], explicit=True, source=source)
    return list(found.values())


def _files_of(source: str) -> Iterator[SourceFile]:
    path = Path(source).expanduser()
    if hub.is_hub(source):
        name, root, files = hub.find(source)
        for file in files:
            yield SourceFile(file, _name(name, file, root), True, source)
    elif source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        for file in _walk(root, _NO_STDLIB):
            if file.suffix == ".py":
                yield SourceFile(file, _name("stdlib", file, root), False, source)
    elif path.is_dir():
        for file in _walk(path, set()):
            yield SourceFile(file, _name(path.resolve().name, file, path), False, source)
    elif path.is_file():
        yield SourceFile(path, path.name, True, source)
    elif path.exists():
        raise ValueError(f"data.source must be a file or folder, got {source!r}, which is neither")
    elif glob.has_magic(source):
        # Names start below the last folder in front of the first wildcard.
        parts = path.parts
        fixed = next(place for place, part in enumerate(parts) if glob.has_magic(part))
        root = Path(*parts[:fixed])
        matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not matches:
            raise ValueError(
                f"data.source must name text files, got {source!r}, which has no match"
            )
        for file in matches:
            if file.is_file():
                yield SourceFile(file, _name(root.resolve().name, file, root), False, source)
    else:
        raise ValueError(
            f"data.source must name files that exist, got {source!r}; check the path, seen from "
            f"{Path.cwd()}"
        )


def _walk(root: Path, leave_out: set[str]) -> Iterator[Path]:
    """The files below a folder, sorted; links are followed, each real folder entered once."""
    entered: set[str] = set()
    for folder, folders, names in os.walk(root, onerror=_raise, followlinks=True):
        real = os.path.realpath(folder)
        # Tokens prepared from a folder may lie below it; they are no text of it.
        passed = real in entered or {"dataset.json", "train-00000.bin"} <= set(names)
        visible = [name for name in folders if name[0] != "." and name not in leave_out]
        folders[:] = [] if passed else sorted(visible)
        if not passed:
            files = (Path(folder, name) for name in sorted(names) if name[0] != ".")
            yield from (file for file in files if file.is_file())
        entered.add(real)


def _raise(error: OSError) -> None:
    raise error


def unreadable(error: OSError, where: str | Path) -> str:
    return (
        f"data.source {error.filename or where} cannot be read: {error.strerror}; change its "
        "permissions or leave it out"
    )


def _name(top: str, file: Path, root: Path) -> str:
    return f"{top}/{file.relative_to(root).as_posix()}"
