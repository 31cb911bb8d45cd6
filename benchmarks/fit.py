"""The largest batch that fits a memory, found by trying.

Owns which batch to try next; what a try is, and how it fails, is the caller's. Batches are
multiples of 8, and powers of two below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

FIRST, MULTIPLE, ATTEMPTS = 8, 8, 9
USABLE = 0.96  # of the room: the allocator's blocks do not fill it


def fit(attempt: Callable[[int], float | None], room: float, fixed: float = 0.0) -> dict[str, Any]:
    """The largest batch that fits, and every attempt on the way.

    Args:
        attempt: batch -> peak (bytes), None where it does not fit.
        room: bytes there are; a wrong number costs attempts only.
        fixed: bytes that are held whatever the batch; likewise.

    Returns:
        `batch`, None where not even one row fits; `largest`, False where the attempts ended before
        it was known to be; `attempts`.
    """
    fits: list[tuple[int, float]] = []
    refused: list[int] = []
    attempts: list[dict[str, Any]] = []
    wanted = next_batch(fits, refused, room, fixed)
    while wanted is not None and len(attempts) < ATTEMPTS:
        found = attempt(wanted)
        attempts.append({"batch": wanted, "peak_bytes": found})
        if found is None:
            refused.append(wanted)
        else:
            fits.append((wanted, found))
        wanted = next_batch(fits, refused, room, fixed)
    batch = max((batch for batch, _ in fits), default=None)
    return {"batch": batch, "largest": wanted is None, "attempts": attempts}


def next_batch(
    fits: Sequence[tuple[int, float]], refused: Sequence[int], room: float, fixed: float
) -> int | None:
    """The batch to try next; None when the largest that fits is known.

    It is guessed from the two largest that fitted, or from one and `fixed`, as if memory grew in
    proportion, which it does not quite; where that leads to one that was refused, the interval is
    halved.

    Args:
        fits: batches that fitted, each with its peak (bytes).
        refused: batches that did not fit.
    """
    above = min(refused, default=0)
    below = max((batch for batch, _ in fits), default=0)
    if not below:
        return (above // 2 if above else FIRST) or None
    if above and (above <= MULTIPLE or above - below <= MULTIPLE):
        return None
    (few, low), (many, high) = sorted([(0, fixed), *fits])[-2:]
    guess = many + int((USABLE * room - high) / max((high - low) / (many - few), 1.0))
    if above and guess >= above:
        guess = (below + above) // 2
    return max(guess // MULTIPLE * MULTIPLE, below + MULTIPLE)
