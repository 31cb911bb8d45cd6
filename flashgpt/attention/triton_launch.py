"""Launching a Triton kernel without Triton's look at every argument.

On the host that look takes several times as long as the launch, and on short texts longer than the
GPU needs. It finds what a kernel is compiled for: types, alignment, and whether an integer is 1 or
divisible by 16. A launch with the same integers, types and alignment needs the same kernel.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    device: Any,
    **options: Any,
) -> None:
    """kernel[programs](*arguments, *constants), as compiled where that was launched before.

    Args:
        arguments: tensors, descriptors (whose addresses are aligned), numbers and None.
        constants: of the kernel's tl.constexpr parameters, which come last.
        device: where the tensors are.
        options: num_warps and the like; fixed for equal constants.
    """
    grid = (programs, 1, 1)
    if INTERPRETED:
        kernel[grid](*arguments, *constants, **options)
        return
    key = (kernel, device, constants, *[_kind(x) for x in arguments])
    if (compiled := _compiled.get(key)) is None:
        _compiled[key] = kernel[grid](*arguments, *constants, **options)
    else:
        compiled[grid](*arguments, *constants)


def _kind(x: Any) -> Any:
    """What a kernel may be compiled for: more than Triton asks, so never too little."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    return (x.base.dtype, *x.block_shape) if hasattr(x, "block_shape") else x
