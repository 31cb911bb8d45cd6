"""The models that `bench train` times: ours with the switch on and off, and Hugging Face's GPT-2.

Legend: B rows, T positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from flashgpt.config import GPTConfig
from flashgpt.measure import peer
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import TrainConfig
from flashgpt.train import optimizer, runtime
from flashgpt.train.bare import BareStep
from flashgpt.train.optimizer import Optimizer
from flashgpt.train.step import Forward, dropout_seed

ON, OFF, HUGGING_FACE = "use_flash on", "use_flash off", "Hugging Face"
TRAIN = TrainConfig()  # whose seed, clipping and optimizer all of them take


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model and how it runs; `model` is ON, OFF or HUGGING_FACE."""

    model: str
    compiled: bool
    dropout: float

    def __str__(self) -> str:
        how = "compiled" if self.compiled else "eager"
        return f"{self.model}, {how}, dropout {self.dropout:g}"


def build(
    variant: Variant, cfg: GPTConfig, device: torch.device, autocast: torch.dtype | None
) -> BareStep:
    """The step of a variant.

    Args:
        cfg: the shape; `use_flash` and `drop_rate` are the variant's.
    """
    ours = variant.model != HUGGING_FACE
    model = (_own_model if ours else _peer)(cfg, variant).to(device).train()
    made = optimizer.build(model, TRAIN) if ours else _optimizer_of_peer(model)
    forward = _forward(model, variant, device)
    prepare = _new_masks(model) if isinstance(model, GPTModel) else lambda: None
    return BareStep(forward, model, made, TRAIN.grad_clip, device, autocast, prepare)


def _own_model(cfg: GPTConfig, variant: Variant) -> nn.Module:
    return GPTModel(
        dataclasses.replace(cfg, use_flash=variant.model == ON, drop_rate=variant.dropout)
    )


def _peer(cfg: GPTConfig, variant: Variant) -> nn.Module:
    model: Any = peer.hugging_face(cfg, variant.dropout)
    model.loss_type = "ForCausalLM"  # what it takes anyway, but then with a warning
    return cast(nn.Module, model)


def _optimizer_of_peer(model: nn.Module) -> Optimizer:
    """That of `optimizer.build`, by the shape of the parameters, for a model of other classes."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        {"params": [p for p in names if p.dim() > 1], "weight_decay": TRAIN.weight_decay},
        {"params": [p for p in names if p.dim() <= 1], "weight_decay": 0.0},
    ]
    betas = (TRAIN.beta1, TRAIN.beta2)
    return Optimizer(names, [optimizer.adamw(groups, TRAIN.lr, betas)], TRAIN.lr)


def _forward(model: nn.Module, variant: Variant, device: torch.device) -> Forward:
    """(ids, targets) -> loss, as the variant's users write it."""
    call: Callable[..., Any] = model
    if variant.compiled:
        # Else the profiler sees one block in place of the kernels that are compiled for the CPU.
        on_cpu: dict[str, Any] = {"cpp.enable_kernel_profile": True}
        runtime.tag_kept_code()
        call = torch.compile(model, options=on_cpu if device.type == "cpu" else None)
    if not isinstance(model, GPTModel):
        return lambda ids_BT, _: call(input_ids=ids_BT, labels=ids_BT).loss
    return call


def _new_masks(model: GPTModel) -> Callable[[], None]:
    """Gives each step dropout masks of its own, as the trainer does."""
    steps = iter(range(2**31))
    return lambda: model.set_dropout(dropout_seed(TRAIN.seed, next(steps)), 0)
