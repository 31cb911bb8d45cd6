"""What is done of a preparation, kept while it lasts: so a killed one goes on where it was.

Owns the temporary folder beside the one that is made: a note that says which request it belongs
to, the tokenizer once it is trained, and the encoded tokens in parts. Each of these is written
aside, flushed and renamed, so that what is there is complete. Does not own what is in a part
(`flashgpt.data.encode`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from flashgpt.tokenizer import Tokenizer


class Journal:
    """The temporary folder of a request."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path, request: str) -> Iterator[Self]:
        """The journal of a request, as it was left; of another request's, nothing is kept.

        The folder is removed in the end, but not after an interrupt, as it is not after a kill.

        Args:
            folder: made if it is not there.
            request: a text that differs for each corpus, setting, and format of the parts.
        """
        journal = cls(folder)
        note = folder / "request"
        try:
            if not note.is_file() or note.read_text(encoding="ascii") != request:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                journal._keep("request", lambda path: path.write_text(request, encoding="ascii"))
            yield journal
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)

    @property
    def tokens(self) -> Path:
        """An empty folder for the token files."""
        path = self._folder / "tokens"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The trained tokenizer, if that is done."""
        path = self._folder / "tokenizer.json"
        return Tokenizer.load(path) if path.exists() else None

    def keep_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Keeps the trained tokenizer."""
        tokenizer.save(self._folder / "trained")
        self._keep("tokenizer.json", (self._folder / "trained" / "tokenizer.json").rename)

    @property
    def parts(self) -> list[Path]:
        """The parts done, in order."""
        return sorted(self._folder.glob("part-*.npz"))

    def keep_part(self, number: int, columns: Mapping[str, Any]) -> None:
        """Keeps the next part; np.load reads it."""

        def save(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, **columns)

        self._keep(f"part-{number:06d}.npz", save)

    def _keep(self, name: str, make: Callable[[Path], object]) -> None:
        temporary = self._folder / "unfinished"
        make(temporary)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(self._folder / name)
