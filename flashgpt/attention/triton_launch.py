"""Launching a Triton kernel without Triton's look at every argument.

On the host that look takes several times as long as the launch, and on short texts longer than the
GPU needs. It finds what a kernel is compiled for: types, alignment, and whether an integer is 1 or
divisible by 16. A launch with the same integers, types and alignment needs the same kernel.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
_compiled: dict[tuple[Any, ...], Any] = {}
_thread = threading.local()


def launch(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    device: torch.device,
    **options: Any,
) -> None:
    """kernel[programs](*arguments, *constants) on `device`, as compiled where it was before.

    Args:
        arguments: tensors, descriptors (whose addresses are aligned), numbers and None.
        constants: of the kernel's tl.constexpr parameters, which come last.
        device: where the tensors are; Triton launches on the current one.
        options: num_warps and the like.
    """
    grid = (programs, 1, 1)
    if INTERPRETED:
        kernel[grid](*arguments, *constants, **options)
        return
    key = (kernel, device, constants, *options.values(), *[_kind(x) for x in arguments])
    elsewhere = device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        _ensure_context(device)
        if (compiled := _compiled.get(key)) is None:
            _compiled[key] = kernel[grid](*arguments, *constants, **options)
        else:
            compiled[grid](*arguments, *constants)


def _ensure_context(device: torch.device) -> None:
    """Gives the thread a CUDA context, which descriptors are made in.

    CUDA does so at a thread's first launch, and Triton when it loads a kernel. A thread of autograd
    may begin with neither: with a descriptor, for a kernel that is loaded.
    """
    ready: set[torch.device] = _thread.__dict__.setdefault("ready", set())
    if device not in ready:
        _launch_any(device)
        ready.add(device)


def _launch_any(device: torch.device) -> None:
    torch.zeros((), device=device)


def _kind(x: Any) -> Any:
    """What of an argument a kernel is compiled for."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, int):
        return x == 1, x % 16 == 0, -(2**31) <= x < 2**31
    if isinstance(x, float) or x is None:
        return type(x)
    return (x.base.dtype, *x.block_shape)
