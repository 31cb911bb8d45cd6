"""Data sets of the Hugging Face hub as a source: `hf://OWNER/NAME` or `hf://OWNER/NAME/FOLDER`.

They are taken from the hub's cache; nothing is asked of the network. `hf download --repo-type
dataset OWNER/NAME` puts one there. `hf://datasets/OWNER/NAME`, as the hub's own tools write it, is
the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

PREFIX = "hf://"
FORM = re.compile(r"hf://(?:datasets/)?([\w.-]+/[\w.-]+)(?:/(.+?))?/?")
KINDS = (".parquet", ".jsonl", ".txt")  # the first that a data set has


def is_hub(source: str) -> bool:
    """Whether a source is one of the hub."""
    return source.startswith(PREFIX)


def find(source: str) -> tuple[str, Path, list[Path]]:
    """Name of a data set, its folder, and its training files there, sorted.

    Those are its files of the first kind that it has. Where names tell train, validation and test
    apart, those of train.

    Raises:
        ValueError: no name of a data set, none of that name in the cache, no files of text in it,
            or files in several folders, which are different data sets as a rule.
    """
    match = FORM.fullmatch(source)
    if not match:
        raise ValueError(f"data.source must be hf://OWNER/NAME, or a folder of it, got {source!r}")
    name, inside = match.groups()
    root = _cached(name)
    below = root / (inside or ".")
    every = [below] if below.is_file() else sorted(below.rglob("*"))
    files = [path for path in every if path.is_file()]
    kind = next((kind for kind in KINDS if any(path.suffix == kind for path in files)), None)
    if kind is None:
        raise ValueError(
            f"data.source must hold {', '.join(KINDS)} files, got {source!r}, which has none in "
            f"the cache; hf download --repo-type dataset {name}"
        )
    chosen = _training([path for path in files if path.suffix == kind])
    folders = sorted({path.parent.relative_to(root).as_posix() for path in chosen})
    if len(folders) > 1:
        raise ValueError(
            f"data.source must name one folder of hf://{name}, got {', '.join(folders[:8])}; write "
            f"hf://{name}/{folders[0]}"
        )
    return name, root, chosen


def _training(files: Sequence[Path]) -> list[Path]:
    train = [path for path in files if re.match(r"train(?![a-z])", path.name)]
    return train or list(files)


def _cached(name: str) -> Path:
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(name, repo_type="dataset", local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data set {name} is not in the Hugging Face cache; put it there: hf download "
            f"--repo-type dataset {name}"
        ) from error
    return Path(found)
