"""A model in training, of nanoGPT or ours, as benchmarks.nanogpt_loss runs it.

Legend: B rows, T positions.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import nanogpt
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import TrainConfig
from flashgpt.train import runtime
from flashgpt.train.optimizer import Optimizer
from flashgpt.train.schedule import learning_rate
from flashgpt.train.step import Forward


@dataclasses.dataclass(frozen=True)
class Side:
    """A model, and how it runs: compiled once, for all seeds."""

    model: nn.Module
    forward: Forward


class Trainee:
    """A side from given weights on.

    Args:
        side: whose model holds the weights.
        made: new.
        batch: ids_BT and targets_BT of a step.
        autocast: dtype of products, or None for the weights'.
    """

    def __init__(
        self,
        side: Side,
        made: Optimizer,
        batch: Callable[[int], tuple[Tensor, Tensor]],
        config: TrainConfig,
        autocast: torch.dtype | None,
    ) -> None:
        self.side, self._made, self._batch = side, made, batch
        self._config, self._autocast = config, autocast
        self._device = next(side.model.parameters()).device
        self._losses = torch.zeros(config.steps, device=self._device)
        self.seconds = 0.0  # that the host took to launch steps, and for the last ones' end

    def train(self, first: int, last: int) -> None:
        """Steps `first` to `last`; losses stay on the device meanwhile."""
        began = time.perf_counter()
        for step in range(first, last):
            with runtime.casting(self._device, self._autocast):
                loss = self.side.forward(*self._batch(step))
            loss.backward()
            self._losses[step] = loss.detach()
            nn.utils.clip_grad_norm_(self.side.model.parameters(), self._config.grad_clip)
            self._made.set_rate(learning_rate(step, self._config))
            self._made.step()
            self._made.zero_grad()
        self.seconds += time.perf_counter() - began

    def become(self, other: Trainee) -> None:
        """Takes the other's weights and moments; the other is nanoGPT's model."""
        weights, moments = other.side.model.state_dict(), other._made.state_tensors()
        if isinstance(self.side.model, GPTModel):
            weights, moments = map(nanogpt.own_names, (weights, moments))
        self.side.model.load_state_dict(weights)
        self._made.load_state_tensors(moments)

    def losses(self) -> list[float]:
        """Of all steps, nats per token."""
        began = time.perf_counter()
        found: list[float] = self._losses.tolist()
        self.seconds += time.perf_counter() - began
        return found
