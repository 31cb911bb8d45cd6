"""The processes that train one model together, by PyTorch's own engine: DDP or FSDP2.

Owns the process groups and all that goes from process to process apart from a model's own passes:
sums, decisions, whole tensors. Everything else asks it; what wraps the model is in wrapping.py.
Without torchrun there is one process: the same calls, which then do nothing.

Gradients are added up over the processes, not averaged: each process weighs its loss by its share
of the step's counted targets.

    torchrun --nproc-per-node 2 -m flashgpt train run.toml
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.utils import get_total_norm

from flashgpt.launch import Launch

# The first process may prepare a large text, or write a checkpoint, while the others wait. One that
# dies closes its connections, and is noticed at once.
WAIT = datetime.timedelta(days=7)
# How PyTorch tells that a process at the other end is gone.
GONE = ("Connection closed", "Connection reset", "Broken pipe", "remote process exiting")

T = TypeVar("T")


class LostError(RuntimeError):
    """Another process of the run is gone."""


@dataclasses.dataclass(frozen=True)
class Parallel:
    """The processes of a run, as one of them sees them. Every call is made by all of them, alike.

    Attributes:
        rank: number of this process; the first, 0, prints and writes.
        size: processes.
        sharded: each holds a part of every weight (FSDP2) instead of all of them (DDP).
        host: the group that decides on the CPU; None in a single process.
    """

    rank: int = 0
    size: int = 1
    sharded: bool = False
    host: dist.ProcessGroup | None = None

    def __str__(self) -> str:
        if self.size == 1:
            return "one process"
        return f"{self.size} processes ({'fsdp' if self.sharded else 'ddp'})"

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes, in the place of `x`."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    @property
    def foreach(self) -> bool | None:
        """PyTorch's setting for many gradients at a time, which it would not choose for shards."""
        return True if self.sharded else None

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of the whole gradient, 0-d."""
        norm: Tensor = get_total_norm(gradients, foreach=self.foreach)
        return self.whole(norm)

    def totals(self, nats: float, *counts: int) -> tuple[Any, ...]:
        """The sums of a float64 and of whole numbers (below 2^53) over all processes."""
        if self.size == 1:
            return nats, *counts
        sums = torch.tensor([nats, *counts], dtype=torch.float64)
        dist.all_reduce(sums, group=self.host)
        total, *whole = sums.tolist()
        return total, *map(int, whole)

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes bring, on the host."""
        if self.size == 1:
            return number
        votes = torch.tensor(number)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.host)
        return int(votes)

    def lead(self, job: Callable[[], T]) -> T:
        """What `job` returns in the first process, which alone runs it; it must pickle.

        Raises:
            SystemExit: in the other processes, when it fails; the first one raises the error.
        """
        if self.size == 1:
            return job()
        answer: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_first:
            try:
                answer = [True, job()]
            except Exception as error:
                failure, answer = error, [False, None]
        dist.broadcast_object_list(answer, src=0, group=self.host)
        if failure is not None:
            raise failure
        if not answer[0]:
            raise SystemExit(1)
        result: T = answer[1]
        return result

    def read(self, read: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors that the first process reads, for `copy_`.

        The others have names, shapes and dtypes only. Raises what `lead` raises.
        """
        if self.size == 1:
            return read()
        own: dict[str, Tensor] = {}

        def kinds() -> dict[str, tuple[torch.Size, torch.dtype]]:
            own.update(read())
            return {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}

        found = self.lead(kinds)
        if self.is_first:
            return own
        return {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (shape, dtype) in found.items()
        }

    @torch.no_grad()
    def copy_(self, own: Tensor, source: Tensor) -> None:
        """Overwrites `own`, whole or sharded, by the whole tensor that the first process has."""
        if self.size == 1:
            own.copy_(source)
            return
        if self.is_first:
            whole = source.to(own.device, own.dtype).contiguous()
        else:
            whole = torch.empty(own.shape, dtype=own.dtype, device=own.device)
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(own, DTensor):
            own.copy_(distribute_tensor(whole, own.device_mesh, own.placements))
        else:
            dist.broadcast(whole, src=0)
            own.copy_(whole)

    @torch.no_grad()
    def whole(self, tensor: Tensor) -> Tensor:
        """The whole of a tensor that may be sharded, in every process."""
        return tensor.full_tensor() if self.sharded and hasattr(tensor, "full_tensor") else tensor


ALONE = Parallel()


@contextlib.contextmanager
def started(how: Literal["ddp", "fsdp"], device: torch.device) -> Iterator[Parallel]:
    """Joins the processes that torchrun has started; yields ALONE without it.

    Args:
        how: `train.parallel`.
        device: the kind of device that all train on; of CUDA each takes the one of its number.

    Raises:
        ValueError: fewer GPUs than processes on this machine.
        LostError: another process is gone, while entered.
    """
    launch = Launch.here()
    if launch.size == 1:
        yield ALONE
        return
    if device.type == "cuda":
        _take_gpu(launch.local_rank)
    try:
        _join(launch, "nccl" if device.type == "cuda" else "gloo")
        host = dist.new_group(backend="gloo", timeout=WAIT)
        yield Parallel(launch.rank, launch.size, how == "fsdp", host)
    except RuntimeError as error:
        # Nothing is taken down: that would wait for the process that is gone.
        if any(sign in str(error) for sign in GONE):
            raise LostError(
                "another process of this run has ended, its own message or torchrun's says why; "
                "what was saved is good: the same command with --resume goes on"
            ) from error
        raise
    dist.destroy_process_group()


def _join(launch: Launch, backend: str) -> None:
    """Makes the process group of this start."""
    store, rank, size = next(rendezvous("env://"))
    if launch.keeps_store:  # so that names of an earlier start are others
        store = PrefixStore(f"start {launch.restarts}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def _take_gpu(number: int) -> None:
    count = torch.cuda.device_count()
    if number >= count:
        raise ValueError(
            f"--nproc-per-node must be at most the {count} GPUs of this machine, got process "
            f"{number + 1}; start fewer, or train with --train.device cpu"
        )
    torch.cuda.set_device(number)
