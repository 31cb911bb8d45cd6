"""Where the time of a training step goes: from the profiler's trace to the parts of a step.

Every operator (on the CPU, its own time) or kernel (on CUDA) has a path: the modules and operators
around it from the outside in, behind them, in the backward pass, the path of the forward operator
whose gradient it computes, and last a kernel's own name. RULES reads paths.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from flashgpt.measure.trace import trace
from flashgpt.train.bare import UPDATE

PARTS = ("products", "attention", "loss", "norms", "activation", "optimizer", "other")
MEANING = {
    "products": "linear layers and output head, with biases, and GELU where it is inside",
    "attention": "scores, softmax, weighted sum; not its linear layers",
    "loss": "cross-entropy, without the product of the output head",
    "norms": "LayerNorm, residual sums, dropout on them",
    "activation": "GELU where it is apart",
    "optimizer": "clipping and AdamW",
    "other": "embeddings, casts, and what is left of the step: copies, Python, idle time",
}
# The first that is found in a path decides. Names of compiled kernels tell what was fused into them
# (triton_per_fused_add_native_layer_norm_3); those of cuBLAS begin with nvjet on Hopper.
RULES: tuple[tuple[str, str], ...] = (
    ("optimizer", re.escape(UPDATE)),
    ("products", r"\bflashgpt::(linear_gelu|linear_of_gelu|matmul_dgelu)"),
    ("attention", r"\bflashgpt::(?!linear_cross_entropy|draw_seed|dropout_keys)"),
    ("attention", r"scaled_dot_product|sdpa|fmha|flash_(fwd|bwd|attn|attention)|FlashAttention"),
    ("attention", r"aten::baddbmm|aten::bmm|fused(?!\w*log_softmax)\w*_softmax"),
    ("products", r"aten::(addmm|mm)_?/(?!.*aten::_to_copy)|\b(Addmm|Mm)Backward"),
    ("products", r"nvjet|gemm|cutlass|cublas|triton_tem_fused"),
    ("loss", r"cross_entropy|log_softmax|nll_loss"),
    ("other", r"aten::_to_copy/"),
    ("norms", r"layer_norm|LayerNorm"),
    ("activation", r"gelu|GELU|tanh"),
    ("attention", r"MultiHeadAttention|GPT2Attention"),
    ("norms", r"TransformerBlock|GPT2Block|fused(_\w+)?_add_"),
)
_RULES = [(part, re.compile(pattern)) for part, pattern in RULES]
HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def part(path: str) -> str:
    """The part of a step that a path belongs to; names in a path end with a slash."""
    return next((name for name, pattern in _RULES if pattern.search(path)), "other")


@dataclasses.dataclass(frozen=True)
class Profile:
    """Where the milliseconds of one step go.

    Attributes:
        parts: by part, which add up to the step.
        kernels: on CUDA by kernel or copy, the longest first: `kernel`, `ms` in all, `launches`.
    """

    parts: dict[str, float]
    kernels: list[dict[str, Any]]


def profile(
    call: Callable[[], object], steps: int, device: torch.device, measured: float
) -> Profile:
    """Profiles a call of some steps.

    The profiler slows the host down, so on the CPU all parts are scaled. On CUDA the times of
    kernels are true, and what they leave of the step is idle: `other`.

    Args:
        measured: milliseconds of a step without the profiler.
    """

    def whole() -> None:
        with torch.profiler.record_function("steps"):
            call()

    events = trace(whole, device)
    found = by_part(events, device)
    total = sum(found.values()) / steps
    slower = total / measured
    if device.type == "cuda":
        slower = max(slower, 1.0)
    parts = {name: ms / steps / slower for name, ms in found.items()}
    parts["other"] += measured - sum(parts.values())
    return Profile(parts, by_kernel(events, steps))


def by_kernel(events: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Milliseconds and launches a step of each kernel or copy, the longest first."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for event in events:
        if event.get("cat") in DEVICE:
            found[event["name"]].append(event["dur"] / 1e3)
    rows = [
        {"kernel": name, "ms": sum(ms) / steps, "launches": len(ms) / steps}
        for name, ms in found.items()
    ]
    return sorted(rows, key=lambda row: -float(row["ms"]))


def by_part(events: list[dict[str, Any]], device: torch.device) -> dict[str, float]:
    """Milliseconds of kernels and copies on CUDA, else of operators, without what they call."""
    found = dict.fromkeys(PARTS, 0.0)
    host = list(_nested(e for e in events if e.get("ph") == "X" and e.get("cat") in HOST))
    if device.type != "cuda":
        for span, path in host:
            # Between the operators of a module Python runs, whatever the module is for.
            found[part(path) if span.operator else "other"] += span.own / 1e3
        return found
    launched = {span.launch: path for span, path in host if span.launch is not None}
    for event in events:
        if event.get("cat") in DEVICE:
            path = launched.get(event["args"].get("correlation"), "") + event["name"] + "/"
            found[part(path)] += event["dur"] / 1e3
    return found


def _nested(events: Iterable[dict[str, Any]]) -> Iterator[tuple[_Span, str]]:
    """Events of the host with their paths."""
    threads = collections.defaultdict(list)
    for event in events:
        threads[event["tid"]].append(event)
    forward: dict[int | None, str] = {}
    spans = []
    for thread in threads.values():
        stack: list[_Span] = []
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while stack and event["ts"] >= stack[-1].end:
                stack.pop()
            span = _Span(event, stack[-1] if stack else None)
            stack.append(span)
            spans.append(span)
            if span.number is not None and span.node is None:
                forward[span.number] = span.path
    for span in spans:
        behind = "" if span.node is None else forward.get(span.node.number, "")
        yield span, span.path + behind


class _Span:
    """One event of the host among those that enclose it.

    Attributes:
        own: its duration without that of its children (microseconds).
        launch: what links it to a kernel.
        number: forward operators and the backward nodes that belong to them have the same.
        node: the backward node that it is, or is in.
    """

    def __init__(self, event: dict[str, Any], parent: _Span | None) -> None:
        args = event.get("args", {})
        self.end = event["ts"] + event["dur"]
        self.own = float(event["dur"])
        self.path: str = (parent.path if parent else "") + event["name"] + "/"
        self.operator: bool = event["cat"] == "cpu_op"
        self.launch: int | None = args.get("correlation")
        self.number: int | None = args.get("Sequence number")
        self.node: _Span | None = parent.node if parent else None
        if args.get("Fwd thread id"):
            self.node = self
        if parent:
            parent.own -= self.own


@contextlib.contextmanager
def modules_in_trace() -> Iterator[None]:
    """While entered, the class of each module that runs stands in the trace; not for compiled ones,
    which would be compiled again."""
    entered: list[torch.profiler.record_function] = []

    def enter(module: nn.Module, _: Any) -> None:
        entered.append(torch.profiler.record_function(type(module).__name__))
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
