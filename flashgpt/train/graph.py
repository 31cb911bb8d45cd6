"""Runs a function of tensors as one CUDA graph, which the host launches at a stroke.

A fast GPU ends the kernels of a small step sooner than the host can launch them one by one. Owns
the warm-up, the places of the inputs, capture, replay, and the way back where a capture fails; not
what the function computes.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from flashgpt.cudagraph import Stream

# Plain calls before the capture. Compilers, libraries and the optimizer make in the first one what
# cannot be made while a stream is captured; the others are PyTorch's advice.
WARM_UP = 3
# Of one forward pass: tokens, and tokens times parameters (of GPT-2's smallest shape, rounded
# up). With more, an H100 is slower than the host, and a graph would hold gigabytes of activations
# for nothing.
MOST_TOKENS = 16384
MOST_WORK = MOST_TOKENS * 125e6

Out = TypeVar("Out")


def pays(device: torch.device, tokens: int, parameters: int) -> bool:
    """Whether forward passes of so many tokens there leave the host behind."""
    small = tokens <= MOST_TOKENS and tokens * parameters <= MOST_WORK
    return small and device.type == "cuda"


class Graphed(Generic[Out]):
    """`function(*tensors)`, from the call behind WARM_UP others on as a CUDA graph.

    A replay launches the kernels of the capture, in their order, on the same memory. So all that
    differs between calls must come in by the inputs, or stand in tensors that are changed in place;
    what the function does on the host is done in the capture for the last time. Calls whose inputs
    are of another shape or dtype than the first call's are plain.

    Args:
        function: returns a tensor, or None. The tensor is overwritten by the next call.
        abandon: takes back what a capture that fails has left on the host, such as gradients; what
            is on the device is as it was, for nothing runs during a capture.
        note: hears once what came of the capture.
    """

    def __init__(
        self,
        function: Callable[..., Out],
        abandon: Callable[[], None],
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._function, self._abandon, self._note = function, abandon, note
        self._stream = Stream()
        self._places: list[Tensor] = []
        self._calls = 0
        self._graph: tuple[Callable[[], None], Out] | None = None

    @property
    def captured(self) -> bool:
        """Whether calls are replays by now."""
        return self._graph is not None

    def __call__(self, *inputs: Tensor) -> Out:
        """The function's result."""
        if not self._places:
            self._places = [torch.empty_like(tensor) for tensor in inputs]
        if _kinds(inputs) != _kinds(self._places):
            return self._stream.run(lambda: self._function(*inputs))
        for place, tensor in zip(self._places, inputs, strict=True):
            place.copy_(tensor, non_blocking=True)
        if self._calls == WARM_UP:
            self._capture()
        self._calls += 1
        if self._graph is None:
            return self._stream.run(self._on_places)
        replay, out = self._graph
        replay()
        return out

    def _on_places(self) -> Out:
        return self._function(*self._places)

    def _capture(self) -> None:
        try:
            self._graph = self._stream.capture(self._on_places)
        except Exception as error:  # whatever it is, calls can stay as they are
            self._abandon()
            cause = error.__context__ or error  # leaving a capture that broke off fails as well
            line = (str(cause).splitlines() or [""])[0]
            self._note(f"no CUDA graph of a step: {type(cause).__name__}: {line}")
        else:
            self._note("each step is one CUDA graph from here on")


def _kinds(tensors: tuple[Tensor, ...] | list[Tensor]) -> list[Any]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors]
