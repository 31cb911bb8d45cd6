"""Where flashgpt keeps what belongs to this user on this machine. Imports nothing slow."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path:
    """$FLASHGPT_CACHE, or flashgpt in $XDG_CACHE_HOME, or ~/.cache/flashgpt; may not exist.

    Raises:
        RuntimeError: none of them is set and the user has no home.
    """
    if named := os.environ.get("FLASHGPT_CACHE"):
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "flashgpt"
