"""What a run trains, and with what."""

from __future__ import annotations

import dataclasses

import torch

from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import TrainConfig
from flashgpt.tokenizer import Tokenizer
from flashgpt.train import optimizer, runtime
from flashgpt.train.guard import Guard
from flashgpt.train.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts that training changes, and how they compute.

    Attributes:
        autocast: dtype of the products, None for fp32.
        rows: sequences in one optimizer step.
    """

    model: GPTModel
    tokenizer: Tokenizer
    optimizer: Optimizer
    guard: Guard
    config: TrainConfig
    device: torch.device
    autocast: torch.dtype | None
    rows: int


def build(model: GPTModel, tokenizer: Tokenizer, config: TrainConfig) -> Parts:
    """Moves the model to the device of `config`; makes its optimizer and its guard.

    Raises:
        ValueError: a device or precision that this machine does not have, or a step that is no
            whole number of sequences.
    """
    device = runtime.device(config.device)
    autocast = runtime.autocast_dtype(config.precision, device)
    model.to(device).set_attention(
        own_masks=config.dropout_masks == "kernel", deterministic=config.deterministic
    )
    model.set_checkpointing(config.activation_checkpointing)
    rows = config.rows(model.cfg.context_length)
    guard = Guard(device, config.guard_zscore, scaled=config.precision == "fp16")
    made = optimizer.build(model, config)
    return Parts(model, tokenizer, made, guard, config, device, autocast, rows)
