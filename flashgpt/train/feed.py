"""The batches of the steps to come, read ahead by a thread and brought to the device.

Legend: B rows of a micro-batch, T positions.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
from typing import Self

import numpy as np
import torch
from torch import Tensor

from flashgpt.data.batches import IGNORE, Batches

AHEAD = 2  # steps


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """What one forward pass sees.

    Attributes:
        ids_BT, targets_BT: token ids, int64; targets of -100 do not count.
        first_row: of these rows, in the step's global batch; a number as a Feed gives it, or 0-d
            int64 on the device.
        weight: the share of the step's counted targets that stand here; a number as a Feed gives
            it, or 0-d on the device, of the loss's dtype.
    """

    ids_BT: Tensor
    targets_BT: Tensor
    first_row: int | Tensor
    weight: float | Tensor


class Feed:
    """Micro-batches by step; steps are best asked for in order.

    Args:
        batches: the tokens of each step.
        rows: sequences in one step, of all processes.
        micro: sequences in one micro-batch.
        device: where micro-batches go.
        own: the rows that this process does, a multiple of `micro`; all when left out.
    """

    def __init__(
        self,
        batches: Batches,
        rows: int,
        micro: int,
        device: torch.device,
        own: range | None = None,
    ) -> None:
        self._batches, self._micro, self._device = batches, micro, device
        self._all = range(rows)
        self._own = self._all if own is None else own
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "flashgpt-feed")
        self._ahead: collections.deque[tuple[int, concurrent.futures.Future[list[MicroBatch]]]] = (
            collections.deque()
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step that this process does, on the device.

        Waits until they are read. Memory on its way to a GPU is not waited for.
        """
        if not self._ahead or self._ahead[0][0] != step:
            for _, future in self._ahead:
                future.cancel()
            self._ahead.clear()
            self._order(step)
        _, future = self._ahead.popleft()
        while len(self._ahead) < AHEAD:
            self._order(self._ahead[-1][0] + 1 if self._ahead else step + 1)
        return self._on_device(future.result())

    def whole(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step that all processes do together, on this one's device."""
        return self._on_device(self._read(step, self._all))

    def _on_device(self, micros: list[MicroBatch]) -> list[MicroBatch]:
        return [
            dataclasses.replace(
                micro,
                ids_BT=micro.ids_BT.to(self._device, non_blocking=True),
                targets_BT=micro.targets_BT.to(self._device, non_blocking=True),
            )
            for micro in micros
        ]

    def _order(self, step: int) -> None:
        self._ahead.append((step, self._thread.submit(self._read, step, self._own)))

    def _read(self, step: int, rows: range) -> list[MicroBatch]:
        total = self._batches.counted(step)
        ids, targets = self._batches.batch(step, rows.start, len(rows))
        found = []
        for at in range(0, len(rows), self._micro):
            part = slice(at, at + self._micro)
            counted = np.count_nonzero(targets[part] != IGNORE)  # one at least in every row
            on_host = (self._on_host(ids[part]), self._on_host(targets[part]))
            found.append(MicroBatch(*on_host, rows[at], counted / total))
        return found

    def _on_host(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if self._device.type == "cuda" else tensor
