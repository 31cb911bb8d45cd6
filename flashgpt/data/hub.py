"""Data sets of the Hugging Face hub as a source: `hf://OWNER/NAME` or `hf://OWNER/NAME/FOLDER`.

They are taken from the hub's cache; nothing is asked of the network. `hf download --repo-type
dataset OWNER/NAME` puts one there. `hf://datasets/OWNER/NAME`, as the hub's own tools write it, is
the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

PREFIX = "hf://"
FORM = re.compile(r"hf://(?:datasets/)?([\w.-]+/[\w.-]+)(?:/(.+?))?/?")
KINDS = (".parquet", ".jsonl", ".txt")  # the first that a data set has
TRAIN = "train"
PART = re.compile(r"(.*[-.])(\d+)-of-(\d+)(.*)")


def is_hub(source: str) -> bool:
    """Whether a source is one of the hub."""
    return source.startswith(PREFIX)


def find(source: str) -> tuple[str, Path, list[Path]]:
    """Name of a data set, its folder, and its training files there, sorted.

    Those are its files of the first kind that it has. Where names tell train, validation and test
    apart, of files or of the folders they are in, those of train.

    Raises:
        ValueError: no name of a data set, none of that name in the cache or not all of what is
            named, no files of text in it, or files in several folders, which are different data
            sets as a rule.
    """
    match = FORM.fullmatch(source)
    if not match:
        raise ValueError(f"data.source must be hf://OWNER/NAME, or a folder of it, got {source!r}")
    name, inside = match.groups()
    root = _cached(name, inside)
    below = root / (inside or ".")
    every = [below] if below.is_file() else sorted(below.rglob("*"))
    files = [path for path in every if path.is_file()]
    kind = next((kind for kind in KINDS if any(path.suffix == kind for path in files)), None)
    if kind is None:
        raise ValueError(
            f"data.source must hold {', '.join(KINDS)} files, got {source!r}, which has none in "
            f"the cache; {_download(name, inside)}"
        )
    chosen = _training([path for path in files if path.suffix == kind], below)
    folders = sorted(
        {path.parent.relative_to(root) for path in chosen},
        key=lambda at: (at.name != TRAIN, not at.name, at),
    )
    if len(folders) > 1:
        named = [folder.as_posix() for folder in folders]
        raise ValueError(
            f"data.source must name one folder of hf://{name}, got {', '.join(named[:8])}; write "
            f"hf://{name}/{named[0]}"
        )
    if lacking := None if below.is_file() else _lacking(path.name for path in chosen):
        raise ValueError(
            f"data.source must have all parts of a set, got {source!r} without {lacking}; "
            f"{_download(name, inside)}"
        )
    return name, root, chosen


def _training(files: Sequence[Path], below: Path) -> list[Path]:
    def is_named(path: Path) -> bool:
        folders = path.relative_to(below).parent.parts
        return TRAIN in folders or bool(re.match(rf"{TRAIN}(?![a-z])", path.name))

    return [path for path in files if is_named(path)] or list(files)


def _lacking(names: Iterable[str]) -> str | None:
    """The first part that is not there of files named as train-00003-of-00012.parquet is."""
    sets: dict[tuple[str, str, str], set[int]] = {}
    for name in names:
        if match := PART.fullmatch(name):
            before, number, count, after = match.groups()
            sets.setdefault((before, count, after), set()).add(int(number))
    for (before, count, after), found in sets.items():
        first = 1 if int(count) in found else 0
        for number in range(first, first + int(count)):
            if number not in found:
                return f"{before}{number:0{len(count)}}-of-{count}{after}"
    return None


def _cached(name: str, inside: str | None) -> Path:
    import huggingface_hub

    patterns = [inside, f"{inside}/*"] if inside else None
    try:
        found = huggingface_hub.snapshot_download(
            name, repo_type="dataset", local_files_only=True, allow_patterns=patterns
        )
    except (OSError, ValueError) as error:
        where = f"{name}/{inside}" if inside else name
        state, do = f"data set {name} is not", "put it there"
        if hasattr(error, "snapshot_path"):  # of an IncompleteSnapshotError, which is newer
            state, do = f"hf://{where} is not all", "fetch the rest"
            do += "" if inside else ", or name a folder that is all there"
        raise ValueError(
            f"{state} in the Hugging Face cache; {do}: {_download(name, inside)}"
        ) from error
    return Path(found)


def _download(name: str, inside: str | None) -> str:
    """The command that fetches a data set, or what is named of it."""
    return f"hf download --repo-type dataset {name}" + (f" --include '{inside}*'" if inside else "")
