"""nanoGPT's model beside ours: what both comparisons share.

Owns loading nanoGPT's model.py from a folder that the user gives, making its model and optimizer,
and giving ours the same weights. Nothing of nanoGPT is kept here or fetched; get it from
https://github.com/karpathy/nanoGPT. What is measured is that of benchmarks.nanogpt_speed and
benchmarks.nanogpt_loss.

Both models compute the same function: our `activation` is "gelu" (the exact one, as in nanoGPT),
and nanoGPT has its biases.

Legend: B rows, T positions.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from flashgpt.config import GPTConfig
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import TrainConfig
from flashgpt.train import optimizer, runtime
from flashgpt.train.optimizer import Optimizer
from flashgpt.train.step import Forward, dropout_seed

PREFIX = "transformer."  # in front of all of nanoGPT's names but the head's
NAMES = ("GPT", "GPTConfig")


def add_folder(parser: argparse.ArgumentParser) -> None:
    """The option that names nanoGPT's folder."""
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="folder with its model.py")


def load(folder: Path | None) -> types.ModuleType:
    """nanoGPT's model.py as a module.

    Raises:
        ValueError: no folder is given, or it has no model.py of nanoGPT's kind.
    """
    if folder is None or not (folder / "model.py").is_file():
        got = "none" if folder is None else f"{folder}, which has none"
        raise ValueError(
            f"--nanogpt must name a folder with nanoGPT's model.py, got {got}; "
            "get https://github.com/karpathy/nanoGPT"
        )
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and the compiler look for it
    spec.loader.exec_module(module)
    if missing := [name for name in NAMES if not hasattr(module, name)]:
        raise ValueError(f"{folder / 'model.py'} must define {missing[0]}, as nanoGPT's does")
    return module


def digest(folder: Path) -> str:
    """sha256 of the model.py."""
    return hashlib.sha256((folder / "model.py").read_bytes()).hexdigest()


@contextlib.contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """nanoGPT prints when it makes things; our output stays a table."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def peer(module: types.ModuleType, cfg: GPTConfig, *, flash: bool = True) -> nn.Module:
    """nanoGPT's model of the shape of `cfg`, in training mode, on the CPU.

    Args:
        flash: else its own attention, with all weights in memory, as with a PyTorch that has no
            fused one.
    """
    with _printing_to_stderr():
        model: nn.Module = module.GPT(
            module.GPTConfig(
                block_size=cfg.context_length,
                vocab_size=cfg.vocab_size,
                n_layer=cfg.n_layers,
                n_head=cfg.n_heads,
                n_embd=cfg.emb_dim,
                dropout=cfg.drop_rate,
                bias=True,
            )
        )
    for part in model.modules():
        if not flash and hasattr(part, "flash"):
            part.flash = False  # type: ignore[assignment]  # a plain attribute
            ones = torch.ones(cfg.context_length, cfg.context_length)
            part.register_buffer("bias", ones.tril()[None, None])
    return model.train()


def peer_forward(model: nn.Module, *, compiled: bool) -> Forward:
    """(ids, targets) -> loss, as nanoGPT's train.py calls it."""
    call = torch.compile(model) if compiled else model

    def forward(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        loss: Tensor = call(ids_BT, targets_BT)[1]
        return loss

    return forward


def peer_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> Optimizer:
    """nanoGPT's own AdamW, fused on CUDA."""
    with _printing_to_stderr():
        adamw = model.configure_optimizers(  # type: ignore[operator]
            config.weight_decay, config.lr, (config.beta1, config.beta2), device.type
        )
    return Optimizer({p: name for name, p in model.named_parameters()}, [adamw], config.lr)


def own_call(model: GPTModel, *, compiled: bool) -> Forward:
    """(ids, targets) -> loss."""
    runtime.tag_kept_code()
    return torch.compile(model) if compiled else model


def own_masks(model: GPTModel, config: TrainConfig) -> Callable[[], None]:
    """Gives the next step dropout masks of its own, as our trainer does."""
    steps = iter(range(2**31))
    return lambda: model.set_dropout(dropout_seed(config.seed, next(steps)))


def own_forward(model: GPTModel, config: TrainConfig, *, compiled: bool) -> Forward:
    """(ids, targets) -> loss, with fresh dropout masks in every call."""
    call, masks = own_call(model, compiled=compiled), own_masks(model, config)

    def forward(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        masks()
        return call(ids_BT, targets_BT)

    return forward


def own_optimizer(model: GPTModel, config: TrainConfig) -> Optimizer:
    """The trainer's."""
    return optimizer.build(model, config)


def own_name(name: str) -> str:
    """Our name of a parameter of nanoGPT's."""
    return name.removeprefix(PREFIX)


def own_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of nanoGPT's model, or moments, under our names; matrices are [out, in] on both
    sides."""
    return {own_name(name): tensor for name, tensor in tensors.items()}


def decayed(made: Optimizer) -> dict[str, float]:
    """Weight decay of each parameter, under our names."""
    return {
        own_name(made.names[parameter]): group["weight_decay"]
        for part in made.parts
        for group in part.param_groups
        for parameter in group["params"]
    }


def check_decays(peer: Optimizer, own: Optimizer) -> None:
    """Refuses optimizers that do not decay the same parameters alike."""
    theirs, ours = decayed(peer), decayed(own)
    # The head's weight is the embedding's; each side names it as it meets it first.
    for decays in (theirs, ours):
        decays["wte.weight"] = decays.pop("lm_head.weight", decays.get("wte.weight", math.nan))
    if theirs != ours:
        odd = sorted(name for name, _ in set(theirs.items()) ^ set(ours.items()))[0]
        raise ValueError(f"both sides must decay {odd} alike, got another model.py")
