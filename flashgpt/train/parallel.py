"""The processes that train one model together, by PyTorch's own engine: DDP or FSDP2.

Owns the process groups, what the model is wrapped in, and all that goes from process to process:
sums, decisions, whole tensors. Everything else asks it. Without torchrun there is one process: the
same calls, which then do nothing.

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
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from flashgpt.launch import Launch
from flashgpt.model.gpt2 import GPTModel

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

    def wrap(self, model: GPTModel, autocast: torch.dtype | None) -> nn.Module:
        """What steps call in place of the model; under FSDP2 the model itself, sharded in place.

        The optimizer is to be made afterwards. All processes have the same weights before.

        Args:
            autocast: dtype of the products, None for fp32.
        """
        if self.size == 1:
            return model
        if self.sharded:
            return _shard(model, autocast)
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        # The row of the batch that a process begins with is its own. As an argument it has another
        # name from torch 2.13 on.
        ddp.broadcast_buffers = False
        ddp.register_comm_hook(None, _add_up)
        return ddp

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

    @contextlib.contextmanager
    def evaluating(self, model: GPTModel) -> Iterator[None]:
        """While entered, a sharded model is good for forward passes without backward passes.

        They are not compiled, whatever `compile_module` did, and leave no whole weights behind.
        """
        if not self.sharded:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            try:
                yield
            finally:
                model.reshard()  # type: ignore[operator]  # an FSDPModule by now


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
    """Makes the process group of this start.

    A store that outlives a restart has the addresses of processes that are gone
    (https://github.com/pytorch/pytorch/issues/135712), so there each start has names of its own.
    """
    store, rank, size = next(rendezvous("env://"))
    if launch.keeps_store:
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


def unsynchronised(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """While entered, passes leave gradients in their process, for a later micro-batch to send.

    Only of DDP. FSDP2 adds them up in shards after each micro-batch: whole gradients would take the
    memory that it saves.
    """
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()


def compile_module(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The forward pass of a wrapped model, as torch.compile; see PyTorch's notes on DDP.

    Of an FSDP2 model each block, without the hooks that bring its weights, which the compiler
    cannot trace. What stands outside blocks stays as it is.
    """
    # Static, so that the code does not depend on the shapes that this process saw before.
    if not _is_sharded(module):
        forward: Callable[[Tensor, Tensor], Tensor] = torch.compile(module, dynamic=False)
        return forward
    for block in module.h:  # type: ignore[union-attr]
        block.forward = torch.compile(block.forward, dynamic=False)
    return module.__call__


def uncompile(module: nn.Module) -> None:
    """Takes back what `compile_module` has changed in a module."""
    if _is_sharded(module):
        for block in module.h:  # type: ignore[union-attr]
            vars(block).pop("forward", None)


def _is_sharded(module: nn.Module) -> bool:
    return hasattr(module, "reshard")


def _shard(model: GPTModel, autocast: torch.dtype | None) -> nn.Module:
    """FSDP2: each block a group, and the model for the rest, in which the tied weight is once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(model.wte.weight.device.type, (dist.get_world_size(),))
    # Activations stay as autocast makes them: in fp16 the residual stream would overflow. The sum
    # of the embeddings is fp32, as in one process, and the loss casts its weight itself.
    rest = MixedPrecisionPolicy(cast_forward_inputs=False)
    in_blocks = rest
    if autocast is not None:
        in_blocks = dataclasses.replace(rest, param_dtype=autocast, reduce_dtype=torch.float32)
    for module in (*model.h, model):
        fully_shard(module, mesh=mesh, mp_policy=rest if module is model else in_blocks)
        assert isinstance(module, FSDPModule), "fully_shard changes the class"
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums
    return model


# Without annotations, which DDP compares with the types themselves.
def _add_up(_, bucket):  # type: ignore[no-untyped-def]
    """DDP's communication without its division by the number of processes."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
