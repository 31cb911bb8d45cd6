"""How long work takes, told while it lasts."""

from __future__ import annotations

from collections.abc import Callable

# Hears what is done, what there is in all (bytes), and the name of the phase.
Progress = Callable[[int, int, str], None]


def counter(tell: Progress, total: int, phase: str) -> Callable[[int], None]:
    """Adds up what is done of a phase, and tells it."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done = min(done + more, total)
        tell(done, total, phase)

    return count
