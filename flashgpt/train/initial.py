"""Weights to start from that are not random: a run's, a checkpoint's, a Hugging Face GPT-2's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor

from flashgpt.config import GPTConfig
from flashgpt.interop.huggingface import read_config
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import DataConfig, RunConfig
from flashgpt.tokenizer import Tokenizer
from flashgpt.train import checkpoint
from flashgpt.train.parallel import ALONE, Parallel


def pinned(run: RunConfig, out: Path) -> RunConfig:
    """The config of a run that starts from weights, so that it can be repeated and gone on with.

    `model.init_from` becomes the very checkpoint that is the newest good one now, and the tokenizer
    that it knows a copy in the run's folder `out`, which needs nothing of another run then.

    Raises:
        ValueError: the weights come with no tokenizer and none is named, or another one is named.
    """
    if run.model.init_from is None:
        return run
    folder = checkpoint.model_folder(Path(run.model.init_from))
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, init_from=str(folder)))
    named = run.data.tokenizer != DataConfig.tokenizer
    if not checkpoint.has_tokenizer(folder):
        if named:
            return run
        raise ValueError(
            f"{folder} has no tokenizer; name the one it was trained with: data.tokenizer (gpt2 "
            "for OpenAI's weights)"
        )
    if named and Tokenizer.load(run.data.tokenizer).digest != Tokenizer.load(folder).digest:
        raise ValueError(
            f"data.tokenizer must be that of {folder}, got {run.data.tokenizer}; leave it out"
        )
    copy = out / "tokenizer"
    Tokenizer.load(folder).save(copy)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer=str(copy)))


def shape(init_from: str) -> GPTConfig:
    """The model that lies there.

    Raises:
        ValueError: no run and no GPT-2 folder, or a damaged one.
    """
    return read_config(checkpoint.model_folder(Path(init_from)))


def load_into(model: GPTModel, init_from: str, parallel: Parallel = ALONE) -> str:
    """Copies the weights, the first positions of them where `model` has fewer; says what was done.

    Raises:
        ValueError: as `checkpoint.load`.
    """
    weights = parallel.read(lambda: _weights(init_from))
    for name, parameter in model.named_parameters():
        # A longer one has more positions; all else has the same shape.
        parallel.copy_(parameter.detach(), weights[name][: len(parameter)])
    here, there = model.cfg.context_length, len(weights["wpe.weight"])
    cropped = f", the first {here} of its {there} positions" if here < there else ""
    return f"starts from the weights of {init_from}{cropped}"


def _weights(init_from: str) -> dict[str, Tensor]:
    model, _ = checkpoint.load(init_from)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
