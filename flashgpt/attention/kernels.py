"""Which kernel serves an attention call, and why: the table, the choice, the receipt.

`choose` is a pure function of a `Request`. It walks the kernels from the fastest to the slowest, as
measured on this device (measured.py) or else as built in, and takes the first that does not refuse.
Nothing falls back in silence: the receipt holds one line per kind of call, with the reason why each
faster kernel was refused.

To add a kernel: a file with `supports` and `attention` (a custom operator, if it is no composition
of PyTorch's), its import and row in KERNELS, its place in FASTEST. The audit (verify.py) then
judges it, and `flashgpt bench attention` times it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from flashgpt.attention import blocked, fa4, measured, sdpa, standard, triton_op
from flashgpt.attention.request import T_BUCKETS, Request, Shape


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A row of the table.

    Attributes:
        supports: request -> None, or the reason why this kernel cannot serve it.
        attention: (q, k, v, *, dropout, documents_BS) -> (out_BNTH, lse_BNT), out in q's dtype,
            lse detached and fp32 at least, padding included. Standard attention also returns its
            weights.
        packed: also takes one packed qkv_BT3NH, and gives its gradient packed.
    """

    name: str
    supports: Callable[[Request], str | None]
    attention: Callable[..., tuple[Any, ...]]
    packed: bool = False


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel("standard", standard.supports, standard.attention),
        Kernel("blocked", blocked.supports, blocked.attention),
        Kernel("sdpa:cpu", sdpa.supports_cpu, sdpa.attention_cpu),
        Kernel("sdpa:cudnn", sdpa.supports_cudnn, sdpa.attention_cudnn),
        Kernel("sdpa:flash", sdpa.supports_flash, sdpa.attention_flash),
        Kernel("sdpa:efficient", sdpa.supports_efficient, sdpa.attention_efficient),
        Kernel("triton", triton_op.supports, triton_op.attention, packed=True),
        Kernel("fa4", fa4.supports, fa4.attention, packed=True),
    )
}

# Fastest first. CUDA: H 64 in bf16 on an H100 (benchmarks/attention-h100).
FASTEST: dict[str, tuple[str, ...]] = {
    "cpu": ("sdpa:cpu", "blocked"),
    "cuda": ("fa4", "sdpa:cudnn", "triton", "sdpa:flash", "sdpa:efficient", "blocked"),
    "cuda, single": ("sdpa:flash", "sdpa:efficient", "triton", "blocked"),
}


def fastest(request: Request) -> tuple[str, ...]:
    """The built-in order for a call."""
    kind = f"{request.device}, {request.shape}"
    return FASTEST.get(kind) or FASTEST.get(request.device, ("blocked",))


def _tiny_half(request: Request) -> bool:
    return request.gradient and request.dtype.itemsize == 2 and request.t_bucket <= T_BUCKETS[1]


Bad = tuple[Callable[[Request], bool], str]
# Cases that a kernel takes but gets wrong; looked at after its own `supports`. Measured on an H100
# with torch 2.11, cuDNN 9.19 and flash-attn-4 4.0.0b36 (benchmarks/attention-h100; fp32 not kept).
KNOWN_BAD: dict[str, tuple[Bad, ...]] = {
    "sdpa:cpu": (
        (
            lambda request: request.dtype.itemsize == 2,
            "errs up to 1.2 times the budget of verify in fp16, 1.9 in bf16 (torch 2.13)",
        ),
    ),
    "sdpa:efficient": (
        (
            lambda request: request.dtype == torch.float32,
            "errs up to 1.5 times the budget of verify in fp32",
        ),
        (_tiny_half, "serves T over 64: errs up to 1.12 times the budget of verify at T 2 and 3"),
    ),
    "sdpa:flash": (
        (_tiny_half, "serves T over 64: errs up to 1.01 times the budget of verify at T 2"),
    ),
    "sdpa:cudnn": (
        (
            lambda request: request.gradient,
            "its gradients are not audited yet, and some versions give NaN "
            "(github.com/pytorch/pytorch/issues/196678)",
        ),
    ),
    "fa4": (
        (
            lambda request: request.head_dim != 64,
            "is proven for H 64 alone; at H 16 dq errs up to 650 times the budget of verify",
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The kernel that serves a request, what the faster ones answered, and who says "faster"."""

    kernel: str
    refused: tuple[tuple[str, str], ...]
    order: str = ""


@functools.lru_cache(maxsize=4096)
def choose(request: Request) -> Choice:
    """The fastest kernel that serves `request`, with the refusals on the way."""
    names, order = fastest(request), ""
    if (found := measured.order(request)) is not None:
        known = tuple(name for name in found.kernels if name in names)
        names = (*known, *(name for name in names if name not in known))
        order = f"order measured on {found.date}"
    if request.own_masks:  # as PyTorch falls back to its math path, quadratic like this
        names = (*names, standard.NAME)
    refused: list[tuple[str, str]] = []
    for name in names:
        reason = refusal(name, request)
        if reason is None:
            return Choice(name, tuple(refused), order)
        refused.append((name, reason))
    raise AssertionError(f"blocked serves everything, yet {request} found no kernel")


def refusal(name: str, request: Request) -> str | None:
    """Why `choose` passes a kernel over, or None."""
    reason = KERNELS[name].supports(request)
    known = (why for bad, why in KNOWN_BAD.get(name, ()) if bad(request))
    return reason or next(known, None)


_served: dict[tuple[Any, ...], tuple[Request, Choice]] = {}


def resolve(
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    t_bucket: int,
    shape: Shape,
    dropout: bool,
    documents: bool,
    gradient: bool,
    deterministic: bool,
    own_masks: bool,
    kernel: str | None,
) -> str:
    """Name of the kernel that serves a call, noted in the receipt.

    While a model is being compiled this runs once, at trace time, and its answer is baked in. Calls
    of a kind that was served before cost one look-up.

    Raises:
        ValueError: `kernel` names no kernel, or one that cannot serve the call (with the reason).
    """
    key = (
        *(device, dtype, head_dim, t_bucket, shape),
        *(dropout, documents, gradient, deterministic, own_masks),
        kernel,
    )
    if (served := _served.get(key)) is not None:
        return served[1].kernel
    request = Request(*key[:-1])
    if kernel is None:
        choice = choose(request)
    else:
        check_name(kernel)
        if reason := KERNELS[kernel].supports(request):
            raise ValueError(f"kernel {kernel!r} cannot serve this call ({request}): {reason}")
        choice = Choice(kernel, (("others", f"{kernel} was asked for"),))
    _served[key] = request, choice
    return choice.kernel


# What torch.compiler.assume_constant_result does, without its import of the compiler (1.3 s).
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_name(kernel: str | None) -> None:
    """Refuses what names no kernel; None lets `choose` decide.

    Raises:
        ValueError: lists the names.
    """
    if kernel is not None and kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")


def receipt() -> list[str]:
    """One line per kind of call that was served: the kernel, and why faster ones were refused."""
    lines = []
    for request, choice in _served.values():
        notes = [choice.order] if choice.order else []
        reasons = "; ".join(notes + [f"not {kernel}: {why}" for kernel, why in choice.refused])
        lines.append(f"{choice.kernel} served {request}" + (f" ({reasons})" if reasons else ""))
    return lines


def clear_receipt() -> None:
    """Forgets what was served so far."""
    _served.clear()
