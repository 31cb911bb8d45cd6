"""What happens inside a model during one forward and backward pass: per layer, in fp32 numbers.

Runs eagerly, layer by layer, and waits for each: for a step that went wrong, not for training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from flashgpt.train import step
from flashgpt.train.feed import MicroBatch
from flashgpt.train.parts import Parts


@dataclasses.dataclass(frozen=True)
class Findings:
    """One step, looked at closely.

    Attributes:
        loss: nats per counted target.
        norm: of the whole gradient, before clipping.
        first_non_finite: where the first number that is not finite came up, in the order of the
            computation; None if all are finite.
        largest_output: by layer, the largest absolute value that it put out.
        gradient_norms: by layer, the norm of its parameters' gradient.
    """

    loss: float
    norm: float
    first_non_finite: str | None
    largest_output: dict[str, float]
    gradient_norms: dict[str, float]


def diagnose(parts: Parts, micros: list[MicroBatch], seed: int) -> Findings:
    """Does the forward and backward pass of a step; weights stay as they are, gradients are none.

    Args: those of `step.backward`.
    """
    model = parts.model
    model.zero_grad(set_to_none=True)
    watch = _Watch(model)
    try:
        loss = step.backward(parts, model, micros, seed)
    finally:
        watch.remove()
    loss_scale = parts.guard.loss_scale
    scale = 1.0 if loss_scale is None else float(loss_scale)
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            square = float(parameter.grad.double().square().sum()) / scale**2
            squares[_layer(name)] = squares.get(_layer(name), 0.0) + square
            watch.check(parameter.grad, f"the gradient of {name}")
    watch.check(loss, "the loss")
    model.zero_grad(set_to_none=True)
    norms = {name: square**0.5 for name, square in squares.items()}
    norm = sum(squares.values()) ** 0.5
    return Findings(loss.item(), norm, watch.first, watch.largest, norms)


def _layer(parameter: str) -> str:
    """`h.3.attn` of h.3.attn.c_proj.weight, `wte` of wte.weight."""
    parts = parameter.split(".")[:-1]
    return ".".join(parts[:3] if parts[0] == "h" else parts[:1])


class _Watch:
    """Hooks on every module: the largest output, and the first number that is not finite.

    Between two modules stands attention itself, so inputs are looked at as well.
    """

    def __init__(self, model: nn.Module) -> None:
        self.first: str | None = None
        self.largest: dict[str, float] = {}
        self._hooks: list[Any] = []
        for name, parameter in model.named_parameters():
            self.check(parameter, f"the weights {name}")
        for name, module in model.named_modules():
            if name and not list(module.children()):
                self._hooks.append(module.register_forward_pre_hook(self._input(name)))
                self._hooks.append(module.register_forward_hook(self._output(name)))

    def check(self, tensor: Tensor, what: str) -> None:
        """Notes `what` if it is the first that is not finite."""
        if self.first is None and not tensor.detach().isfinite().all():
            self.first = what

    def remove(self) -> None:
        """Takes the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _input(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            for value in inputs:
                if isinstance(value, Tensor) and value.is_floating_point():
                    self.check(value, f"what goes into {name}")

        return hook

    def _output(self, name: str) -> Callable[..., None]:
        layer = _layer(name + ".weight")

        def hook(_module: nn.Module, _inputs: object, output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            self.check(output, f"the output of {name}")
            largest = output.detach().abs().max().item()
            # max() would keep the older number beside a NaN
            if not largest <= self.largest.get(layer, float("-inf")):
                self.largest[layer] = largest
            if output.requires_grad:
                self._hooks.append(
                    output.register_hook(
                        lambda grad: self.check(grad, f"the gradient at the output of {name}")
                    )
                )

        return hook
