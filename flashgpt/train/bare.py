"""The bare step: what no optimizer step can do without. Benchmarks time it, for any model.

Plain, or like the trainer's small steps as a CUDA graph.

Legend: B rows, T positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flashgpt.train import runtime
from flashgpt.train.graph import Graphed
from flashgpt.train.optimizer import Optimizer
from flashgpt.train.step import Forward

UPDATE = "flashgpt.update"  # clipping, optimizer and the end of the gradients, in a profile


@dataclasses.dataclass(frozen=True)
class BareStep:
    """Forward, loss, backward, clipping, update; reads nothing back.

    Attributes:
        forward: the model or the compiled model, (ids, targets) -> loss.
        model: whose gradients are clipped.
        clip: largest global gradient norm.
        autocast: dtype of the products, None for fp32.
        prepare: called before each step, for what the host decides: a seed, say. What it leaves on
            the device stays in place.
    """

    forward: Forward
    model: nn.Module
    optimizer: Optimizer
    clip: float
    device: torch.device
    autocast: torch.dtype | None
    prepare: Callable[[], None] = lambda: None

    def __call__(self, ids_BT: Tensor, targets_BT: Tensor) -> None:
        self.prepare()
        self._compute(ids_BT, targets_BT)

    def graphed(self, note: Callable[[str], None] = lambda _: None) -> GraphedBareStep:
        """The same step as a CUDA graph; `note` hears what came of it."""
        return GraphedBareStep(self.prepare, Graphed(self._compute, self.optimizer.zero_grad, note))

    def _compute(self, ids_BT: Tensor, targets_BT: Tensor) -> None:
        with runtime.casting(self.device, self.autocast):
            loss = self.forward(ids_BT, targets_BT)
        loss.backward()
        with torch.profiler.record_function(UPDATE):
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()


@dataclasses.dataclass(frozen=True)
class GraphedBareStep:
    """A bare step as a CUDA graph. Made by `BareStep.graphed`."""

    prepare: Callable[[], None]
    compute: Graphed[None]

    def __call__(self, ids_BT: Tensor, targets_BT: Tensor) -> None:
        self.prepare()
        self.compute(ids_BT, targets_BT)
