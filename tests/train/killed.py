"""`flashgpt`, whose second process is killed in its thirteenth step, the first time.

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


def taking(self: Feed, step: int) -> object:
    if step == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return take(self, step)


if __name__ == "__main__":
    launch = Launch.here()
    if launch.rank == 1 and launch.restarts == 0:
        Feed.take = taking  # type: ignore[assignment]
    sys.exit(main())
