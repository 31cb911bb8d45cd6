"""What a model is wrapped in to train in several processes: PyTorch's DDP or FSDP2.

Owns the wrapping, how a wrapped model is compiled, and what a pass without synchronisation or
without a backward pass asks of it. Everything else that processes tell each other is parallel.py's.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flashgpt.launch import Launch
from flashgpt.model.gpt2 import GPTModel
from flashgpt.train.parallel import Parallel


def wrap(model: GPTModel, parallel: Parallel, autocast: torch.dtype | None) -> nn.Module:
    """What steps call in place of the model; under FSDP2 the model itself, sharded in place.

    The optimizer is to be made afterwards. All processes have the same weights before.

    Args:
        autocast: dtype of the products, None for fp32.
    """
    if parallel.size == 1:
        return model
    if parallel.sharded:
        return _shard(model, autocast)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    # The row of the batch that a process begins with is its own. As an argument it has another
    # name from torch 2.13 on.
    ddp.broadcast_buffers = False
    ddp.register_comm_hook(None, _add_up)
    return ddp


def unsynchronised(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """While entered, passes leave gradients in their process, for a later micro-batch to send.

    Only of DDP. FSDP2 adds them up in shards after each micro-batch: whole gradients would take the
    memory that it saves.
    """
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def evaluating(model: GPTModel) -> Iterator[None]:
    """While entered, a sharded model is good for forward passes without backward passes.

    They are not compiled, whatever `compile_module` did, and leave no whole weights behind.
    """
    if not _is_sharded(model):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        try:
            yield
        finally:
            model.reshard()  # type: ignore[operator]


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
    # Activations stay as autocast makes them: in fp16 the residual stream would overflow. Weights
    # are gathered in fp32 and rounded where they are used, as in one process; between machines,
    # whose network is slower, those of blocks are rounded before.
    rest = MixedPrecisionPolicy(cast_forward_inputs=False)
    in_blocks = rest
    if autocast is not None and Launch.here().machines > 1:
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
