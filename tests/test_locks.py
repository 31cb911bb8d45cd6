"""One process at a time on a folder. pytest tests/test_locks.py"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashgpt.locks import BusyError, alone

HOLD = """
import sys
from pathlib import Path
from flashgpt.locks import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")


def test_another_process_is_kept_out_until_it_ends_even_by_a_kill(
    tmp_path: Path, cli: Callable[..., Any], options: list[str]
) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match="in use by another process"), alone(tmp_path):
            raise AssertionError("two at once")
        refused = cli("train", *options, "--out", tmp_path).error(1)
        assert f"{tmp_path} is being trained by another process" in refused
        assert list(tmp_path.iterdir()) == []
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    with alone(tmp_path), pytest.raises(BusyError), alone(tmp_path):
        raise AssertionError("two at once")


def test_who_waits_is_told_so(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        told = []

        def wait() -> None:
            told.append("waits")
            process.stdin.write("\n")
            process.stdin.flush()

        with alone(tmp_path, wait):
            assert told == ["waits"]
