"""The user's cache. pytest tests/test_usercache.py"""

from __future__ import annotations

from pathlib import Path

import pytest

from flashgpt import usercache


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGPT_CACHE", "/mine")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert usercache.folder() == Path("/mine")
    monkeypatch.delenv("FLASHGPT_CACHE")
    assert usercache.folder() == Path("/somewhere/flashgpt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert usercache.folder() == Path("/home/me/.cache/flashgpt")
