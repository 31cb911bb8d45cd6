"""The bare step: what no optimizer step can do without. Benchmarks time it, for any model.

Legend: B rows, T positions.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from flashgpt.train import runtime
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
    """

    forward: Forward
    model: nn.Module
    optimizer: Optimizer
    clip: float
    device: torch.device
    autocast: torch.dtype | None

    def __call__(self, ids_BT: Tensor, targets_BT: Tensor) -> None:
        with runtime.casting(self.device, self.autocast):
            loss = self.forward(ids_BT, targets_BT)
        loss.backward()
        with torch.profiler.record_function(UPDATE):
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
