"""What a run trains, and with what."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import TrainConfig
from flashgpt.tokenizer import Tokenizer
from flashgpt.train import optimizer, runtime
from flashgpt.train.guard import Guard
from flashgpt.train.optimizer import Optimizer
from flashgpt.train.parallel import ALONE, Parallel
from flashgpt.train.wrapping import wrap


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts that training changes, and how they compute.

    Attributes:
        module: what steps call: the model, or what wraps it for several processes.
        autocast: dtype of the products, None for fp32.
        rows: sequences in one optimizer step, of all processes.
        rows_at_once: sequences in one forward pass of this process.
    """

    model: GPTModel
    module: nn.Module
    parallel: Parallel
    tokenizer: Tokenizer
    optimizer: Optimizer
    guard: Guard
    config: TrainConfig
    device: torch.device
    autocast: torch.dtype | None
    rows: int
    rows_at_once: int

    @property
    def own_rows(self) -> range:
        """The rows of a step's batch that this process does."""
        share = self.rows // self.parallel.size
        return range(self.parallel.rank * share, (self.parallel.rank + 1) * share)


def build(
    model: GPTModel, tokenizer: Tokenizer, config: TrainConfig, parallel: Parallel = ALONE
) -> Parts:
    """Moves the model to the device of `config`, wraps it; makes its optimizer and its guard.

    Raises:
        ValueError: a device or precision that this machine does not have, a step that is no whole
            number of sequences for each process, or as `TrainConfig.check_processes`.
    """
    config.check_processes(parallel.size)
    device = runtime.device(config.device)
    autocast = runtime.autocast_dtype(config.precision, device)
    context = model.cfg.context_length
    at_once = config.rows_at_once(context, parallel.size)
    _configure(model.to(device), config)
    module = wrap(model, parallel, autocast)
    return Parts(
        model=model,
        module=module,
        parallel=parallel,
        tokenizer=tokenizer,
        optimizer=optimizer.build(model, config),
        guard=Guard(device, config.guard_zscore, scaled=config.precision == "fp16"),
        config=config,
        device=device,
        autocast=autocast,
        rows=config.rows(context),
        rows_at_once=at_once,
    )


def _configure(model: GPTModel, config: TrainConfig) -> None:
    model.set_attention(
        own_masks=config.dropout_masks == "kernel", deterministic=config.deterministic
    )
    model.set_checkpointing(config.activation_checkpointing)


def in_one_process(parts: Parts) -> Parts | None:
    """The parts as the first process has them without the others; None in the others.

    For a closer look at the model, not to train: of a sharded one it is a copy.
    """
    model = parts.model
    if parts.parallel.sharded:
        # A call of all processes, whoever keeps what comes of it.
        weights = {name: parts.parallel.whole(p) for name, p in model.named_parameters()}
        if parts.parallel.is_first:
            model = GPTModel.empty(model.cfg).to(parts.device)
            _configure(model, parts.config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(weights[name])
    if not parts.parallel.is_first:
        return None
    return dataclasses.replace(parts, model=model, module=model, parallel=ALONE)
