"""`flashgpt`, whose second process is killed in its thirteenth step, and in the twenty-first of the
next start stops torchrun.

torchrun --nproc-per-node 2 --max-restarts 1 tests/train/killed.py train ...
"""

from __future__ import annotations

import os
import signal
import sys

from flashgpt.cli import main
from flashgpt.launch import Launch
from flashgpt.train.feed import Feed

take = Feed.take


def killed(self: Feed, step: int) -> object:
    if step == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return take(self, step)


def stopping(self: Feed, step: int) -> object:
    """Sends SIGTERM to torchrun, and waits until it has come back."""
    if step == 20:
        came, wakes = os.pipe()
        os.set_blocking(wakes, False)
        signal.set_wakeup_fd(wakes)
        os.kill(os.getppid(), signal.SIGTERM)
        os.read(came, 1)
        signal.set_wakeup_fd(-1)
    return take(self, step)


if __name__ == "__main__":
    launch = Launch.here()
    if launch.rank == 1:
        Feed.take = stopping if launch.restarts else killed  # type: ignore[assignment]
    sys.exit(main())
