"""The optimizer, its parameter groups, and its state under the names of the parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashgpt.config import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def build(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (fused): matrices and embeddings decay, biases and LayerNorm gains do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors, `<parameter name>.<moment>`."""
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def load_state_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """Restores what `state_tensors` gave, into memory of its own.

    Raises:
        ValueError: the tensors are not those of this model.
    """
    names = [name for name, _ in model.named_parameters()]
    expected = {f"{name}.{moment}" for name in names for moment in MOMENTS}
    if tensors and set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)[0]
        raise ValueError(f"optimizer state does not fit the model: {odd!r} is on one side only")
    for name, parameter in model.named_parameters():
        if not tensors:
            return
        # Memory-mapped tensors are 8-byte aligned and may take other code paths: copy them.
        optimizer.state[parameter] = {
            "exp_avg": torch.empty_like(parameter).copy_(tensors[f"{name}.exp_avg"]),
            "exp_avg_sq": torch.empty_like(parameter).copy_(tensors[f"{name}.exp_avg_sq"]),
            "step": tensors[f"{name}.step"].to(parameter.device, copy=True),
        }
