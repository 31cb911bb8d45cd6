"""One process at a time on a folder.

A lock of the operating system: it goes with the process that holds it, however that ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


class BusyError(ValueError):
    """Another process holds the folder."""


@contextlib.contextmanager
def alone(folder: Path, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds the lock of an existing folder while entered.

    On Windows, and on network file systems without locks, nothing is held.

    Args:
        wait: called before waiting for another process that holds it; left out, BusyError is
            raised instead.

    Raises:
        BusyError: another process holds it and `wait` is left out.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                raise BusyError(f"{folder} is in use by another process") from None
            wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            logging.getLogger(__name__).info("no lock on %s: %s", folder, error)
        yield
    finally:
        os.close(handle)
