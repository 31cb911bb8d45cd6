"""The optimizer: which rule updates which parameter, and its state under the parameters' names.

Learning rate and state are tensors that stay where they are once they are there: a step that was
captured once finds them there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flashgpt.runconfig import TrainConfig
from flashgpt.train.muon import Muon

Role = Literal["matrix", "embedding", "vector"]

# What a parameter is, by the kind of its module and its name there.
ROLES: dict[tuple[type[nn.Module], str], Role] = {
    (nn.Linear, "weight"): "matrix",
    (nn.Embedding, "weight"): "embedding",
    (nn.Linear, "bias"): "vector",
    (nn.LayerNorm, "weight"): "vector",
    (nn.LayerNorm, "bias"): "vector",
}
# A linear layer by its kind, but one row per token, as in the embedding it may be tied to.
HEAD = "lm_head"
DECAYS: dict[Role, bool] = {"matrix": True, "embedding": True, "vector": False}
QUERY_KEY_VALUE = "attn.c_attn.weight"  # three matrices, one above the other
MOMENTS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq", "step"),
    Muon: ("momentum_buffer",),
}


def roles(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Role]]:
    """Name, parameter and role of all that is trained; a shared weight once, under its first name.

    Raises:
        KeyError: a kind of module that ROLES does not list.
    """
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    for path, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own_name}"
            if names.get(parameter) == name:
                role = ROLES[type(module), own_name]
                yield name, parameter, "embedding" if path == HEAD else role


class Optimizer:
    """The rules of one model and their state. Made by `build`.

    Args:
        names: every parameter's name.
        parts: PyTorch's optimizers, which share the parameters out among them; those of `adamw`
            can be captured.
        rate: learning rate of the steps before the first `set_rate`.
    """

    def __init__(
        self, names: dict[nn.Parameter, str], parts: list[torch.optim.Optimizer], rate: float
    ) -> None:
        self.names = names
        self.parts = parts
        device = next(iter(names)).device
        # Fused AdamW reads fp32 on CUDA; on the CPU float64, with the bits of Python's number.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self._rate = torch.full((), rate, dtype=dtype, device=device)
        for part in parts:
            for group in part.param_groups:
                group["lr"] = self._rate

    def set_rate(self, rate: float) -> None:
        """Sets the learning rate of the steps to come; on CUDA it is rounded to fp32."""
        self._rate.fill_(rate)

    def step(self, refused: Tensor | None = None) -> None:
        """One update from the gradients; asks the device for nothing.

        Args:
            refused: 0-d float tensor on the device of the parameters. 1.0 leaves weights, moments
                and step counts bit for bit as they are, whatever the gradients hold; 0.0 changes
                nothing about the step.
        """
        for part in self.parts:
            part.found_inf = refused  # type: ignore[attr-defined]  # read by fused optimizers
            part.step()

    def zero_grad(self) -> None:
        """Lets go of the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """The state as flat tensors, `<parameter name>.<moment>`; empty before the first step."""
        return {
            f"{self.names[parameter]}.{moment}": part.state[parameter][moment]
            for part, parameter, moment in self._moments()
            if parameter in part.state
        }

    def load_state_tensors(
        self, tensors: dict[str, Tensor], copy_: Callable[[Tensor, Tensor], Any] = Tensor.copy_
    ) -> None:
        """Restores what `state_tensors` gave, into memory of its own.

        What is there is overwritten in place; by zeros, with which a state begins, when nothing is
        given.

        Args:
            copy_: overwrites the first tensor, which may be sharded, by the second.

        Raises:
            ValueError: the tensors are not those of this model and optimizer.
        """
        moments = list(self._moments())
        expected = {f"{self.names[parameter]}.{moment}" for _, parameter, moment in moments}
        if tensors and set(tensors) != expected:
            odd = sorted(set(tensors) ^ expected)[0]
            raise ValueError(f"optimizer state does not fit the model: {odd!r} is on one side only")
        for part, parameter, moment in moments:
            if not tensors:
                if parameter in part.state:
                    part.state[parameter][moment].zero_()
                continue
            # Memory-mapped tensors are 8-byte aligned and may take other code paths: copy them.
            own, tensor = part.state[parameter], tensors[f"{self.names[parameter]}.{moment}"]
            if moment not in own:
                like = parameter.detach() if tensor.shape == parameter.shape else tensor
                own[moment] = torch.empty_like(like, dtype=tensor.dtype, device=parameter.device)
            copy_(own[moment], tensor)

    def _moments(self) -> Iterator[tuple[torch.optim.Optimizer, nn.Parameter, str]]:
        """Every moment there is after a step: whose, of which parameter, its name."""
        for part in self.parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    for moment in MOMENTS[type(part)]:
                        yield part, parameter, moment


def adamw(
    groups: list[dict[str, Any]], rate: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """AdamW as PyTorch has it, fused; its step can be captured in a CUDA graph."""
    # Fused, it takes no notice of `capturable`, but PyTorch asks for it before a capture.
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True, capturable=True)


def build(model: nn.Module, config: TrainConfig) -> Optimizer:
    """AdamW (fused) for every parameter; with `config.optimizer` "muon", Muon for the matrices.

    The query, key and value matrices, which one parameter holds, are three to Muon.
    """
    found = list(roles(model))
    names = {parameter: name for name, parameter, _ in found}
    by_role = {role: [p for _, p, its_role in found if its_role == role] for role in DECAYS}
    parts: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        split: dict[int, list[nn.Parameter]] = {1: [], 3: []}
        for parameter in by_role.pop("matrix"):
            split[3 if names[parameter].endswith(QUERY_KEY_VALUE) else 1].append(parameter)
        matrices = [{"params": params, "split": count} for count, params in split.items()]
        parts.append(Muon(matrices, lr=config.lr, weight_decay=config.weight_decay))
    groups = [
        {"params": params, "weight_decay": config.weight_decay if DECAYS[role] else 0.0}
        for role, params in by_role.items()
    ]
    parts.append(adamw(groups, config.lr, (config.beta1, config.beta2)))
    return Optimizer(names, parts, config.lr)
