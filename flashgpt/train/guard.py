"""The guard: decides on the device whether a step may reach the weights, without waiting for it.

A step is judged by its loss and by the norm of its whole gradient. It is bad if one of them is not
finite, or if one stands out from the last WINDOW accepted steps by more than `train.guard_zscore`
standard deviations (the loss as it is, the norm by its logarithm; only upwards). A bad step changes
nothing, and holds back all steps that are under way behind it until `release`: so what follows is
the same however far the host runs ahead of the device.

With fp16 the loss is scaled. A step that overflows while the scale can still fall is no bad one: it
is left out, and the scale halves; after GROWTH_STEPS finite steps it doubles.

The memory is tensors that stay where they are: a step that was captured once finds them there.
"""

from __future__ import annotations

import enum
import math

import torch
from torch import Tensor

WINDOW = 128
# Least standard deviation: of the loss in nats, of the norm's logarithm. On a plateau the window
# has hardly any spread, and a ripple would look like a spike; small batches have long tails.
SPREAD = (0.05, 0.25)
FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000
LIMIT_IN_A_ROW = 3  # bad steps


class Verdict(enum.IntEnum):
    """What became of a step."""

    ACCEPTED = 0
    OVERFLOW = 1  # fp16: left out, the scale falls
    BAD = 2
    HELD = 3  # behind a bad one: to be done again


class Guard:
    """Judges steps, in order.

    Args:
        zscore: standard deviations above which a step is a spike; 0 judges finiteness only.
        scaled: whether the loss is scaled (fp16).

    Attributes:
        in_a_row: bad steps without an accepted one since; kept by the caller.
    """

    def __init__(self, device: torch.device, zscore: float, scaled: bool) -> None:
        self._zscore = zscore or math.inf
        self._scaled = scaled
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Forgets every step."""
        device, scaled = self._device, self._scaled
        self._history_2W = torch.zeros(2, WINDOW, dtype=torch.float64, device=device)
        self._accepted = torch.zeros((), dtype=torch.int64, device=device)
        self._scale = torch.full((), FIRST_SCALE if scaled else 1.0, device=device)
        self._finite_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._held = torch.zeros((), dtype=torch.bool, device=device)
        self._least_2 = torch.tensor(SPREAD, dtype=torch.float64, device=device)
        self.in_a_row = 0

    @property
    def loss_scale(self) -> Tensor | None:
        """What the loss is multiplied by before the backward pass, 0-d; None for 1."""
        return self._scale if self._scaled else None

    def forget(self) -> None:
        """Forgets what is usual: the next WINDOW steps are judged by their finiteness alone."""
        self._accepted.zero_()

    def set_scale(self, scale: float) -> None:
        """Another loss scale from here on; without effect where the loss is not scaled."""
        if self._scaled:
            self._scale.fill_(scale)

    def judge(self, loss: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Decides on one step, from its loss and its unscaled gradient norm (both 0-d).

        Returns:
            refused: 0-d fp32, 1 if the step must not reach the weights.
            report: float64 [5], to be read at leisure: the Verdict, the standard deviations of the
                loss and of the norm from their means (0 until the window is full), loss, norm.
        """
        finite = loss.isfinite() & norm.isfinite()
        value_2 = torch.stack([loss.double(), norm.double().clamp_min(1e-300).log()])
        spread_2 = self._history_2W.std(1, correction=0).maximum(self._least_2)
        full = self._accepted >= WINDOW
        z_2 = torch.where(full, (value_2 - self._history_2W.mean(1)) / spread_2, 0.0)
        overflow = ~finite & (self._scale > 1)
        bad = ~overflow & (~finite | (z_2 > self._zscore).any())
        refused = self._held | overflow | bad
        verdict = torch.where(bad, Verdict.BAD, overflow * int(Verdict.OVERFLOW))
        verdict = torch.where(self._held, Verdict.HELD, verdict)
        self._remember(value_2, ~refused)
        if self._scaled:
            self._rescale(finite & ~self._held, overflow & ~self._held)
        self._held.logical_or_(bad)
        report = torch.stack([verdict.double(), *z_2, loss.double(), norm.double()])
        return refused.float(), report

    def release(self) -> None:
        """Lets steps pass again after a bad one."""
        self._held.zero_()

    def _remember(self, value_2: Tensor, accepted: Tensor) -> None:
        slot_W = torch.arange(WINDOW, device=value_2.device) == self._accepted % WINDOW
        kept = torch.where(slot_W & accepted, value_2[:, None], self._history_2W)
        self._history_2W.copy_(kept)
        self._accepted.add_(accepted)

    def _rescale(self, finite: Tensor, overflow: Tensor) -> None:
        steps = torch.where(overflow, 0, self._finite_steps + finite)
        grow = steps >= GROWTH_STEPS
        factor = torch.where(overflow, 0.5, torch.where(grow, 2.0, 1.0))
        self._scale.mul_(factor)
        self._finite_steps.copy_(torch.where(grow, 0, steps))

    def state_tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs to decide alike; not while a bad step holds others back.

        The memory itself: it changes with the next step.
        """
        return {
            "history": self._history_2W,
            "accepted": self._accepted,
            "scale": self._scale,
            "finite_steps": self._finite_steps,
            "in_a_row": torch.tensor(self.in_a_row),
            "scaled": torch.tensor(self._scaled),
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state_tensors` gave; nothing of it leaves the guard as it is.

        A run that was stopped by its guard may try again, from another idea of what is usual. The
        scale is the first one if the run before had none.
        """
        if not tensors:
            return
        self._history_2W.copy_(tensors["history"])
        self._accepted.copy_(tensors["accepted"])
        if self._scaled and tensors["scaled"]:
            self._scale.copy_(tensors["scale"])
            self._finite_steps.copy_(tensors["finite_steps"])
        count = int(tensors["in_a_row"])
        self.in_a_row = count
        if count >= LIMIT_IN_A_ROW:
            self.in_a_row = 0
            self.forget()
