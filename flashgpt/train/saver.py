"""Writes checkpoints in the background, from a copy, while training goes on."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
from collections.abc import Callable, Iterable
from typing import Self

import torch
from torch import Tensor

Parts = dict[str, dict[str, Tensor]]  # tensors by part of the state and name


class Saver:
    """Runs jobs one after another in a thread of its own.

    What a job raises comes up in the main thread, in `check` or in `wait`.
    """

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "flashgpt-saver")
        self._jobs: collections.deque[concurrent.futures.Future[None]] = collections.deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """What was submitted is finished: half a checkpoint is of no use."""
        self._thread.shutdown()

    def submit(self, job: Callable[[], None]) -> None:
        """Starts a job, once those before are done."""
        self._jobs.append(self._thread.submit(job))

    def check(self) -> None:
        """Raises what a finished job raised; does not wait."""
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft().result()

    def wait(self) -> None:
        """Waits for all jobs, and raises what one raised."""
        while self._jobs:
            self._jobs.popleft().result()


class HostCopies:
    """Copies of tensors in host memory; from a GPU without waiting for them.

    The memory is kept for the next copy of a tensor of the same name, so there is one at a time.

    Args:
        whole: makes a tensor whole of which this process has a part, one after another.
    """

    def __init__(self, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._whole = whole

    @staticmethod
    def reserve(tensors: Iterable[Tensor], times: int) -> None:
        """Lets PyTorch pin memory for so many copies of each tensor on a GPU, and keep it.

        Pinning a gigabyte takes about a second; in another thread nobody waits for it.
        """
        with contextlib.suppress(RuntimeError):  # what cannot be had now is asked for again later
            kept = [
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                for tensor in tensors
                for _ in range(times if tensor.is_cuda else 0)
            ]
            del kept

    def take(self, parts: Parts) -> tuple[Parts, Callable[[], None]]:
        """The copies, and a call that waits until they are complete.

        The copying stands in the device's queue before all that is launched later, so the tensors
        may change as soon as this returns.
        """
        copies = {
            part: {
                name: self._copy(part, name, self._whole(tensor.detach()))
                for name, tensor in group.items()
            }
            for part, group in parts.items()
        }
        if not any(tensor.is_cuda for group in parts.values() for tensor in group.values()):
            return copies, lambda: None
        event = torch.cuda.Event()
        event.record()
        return copies, event.synchronize

    def _copy(self, part: str, name: str, tensor: Tensor) -> Tensor:
        kept = self._kept.get((part, name))
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._kept[part, name] = kept
        return kept.copy_(tensor, non_blocking=True)
