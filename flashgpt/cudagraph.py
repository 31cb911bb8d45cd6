"""Capturing what a stream does as a CUDA graph.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Out = TypeVar("Out")


class Stream:
    """A stream of its own, on which calls run before they are captured there.

    PyTorch's backward pass knows on which stream a weight was used before; in a capture that must
    be the one that is captured.
    """

    def __init__(self) -> None:
        self._side = torch.cuda.Stream()

    def run(self, call: Callable[[], Out]) -> Out:
        """A plain call, between what was launched before and what will be launched later."""
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            out = call()
        current.wait_stream(self._side)
        return out

    def capture(self, call: Callable[[], Out]) -> tuple[Callable[[], None], Out]:
        """Captures a call, which does not run; a replay of it, and where that leaves its result."""
        graph = torch.cuda.CUDAGraph()
        # Not `with torch.cuda.graph`, which also lets go of the host's pinned memory: checkpoints
        # have reserved some.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the plain calls had; the graph gets memory of its own
        with torch.cuda.stream(self._side):
            # Other threads may pin memory meanwhile: those that read batches and write checkpoints.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                try:
                    out = call()
                finally:
                    graph.capture_end()
            except Exception:
                # Left as it is, the generator would wait for the capture that broke off.
                generator = torch.cuda.default_generators[self._side.device.index]
                generator.graphsafe_set_state(generator.clone_state())
                raise
        return graph.replay, out
