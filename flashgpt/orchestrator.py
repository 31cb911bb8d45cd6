"""The composition root: from one documented cfg to a tokenizer, a model, a trainer, a generator.

python -m flashgpt.orchestrator      # builds CFG's model and shows what comes in and goes out
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flashgpt.attention import kernels
from flashgpt.attention.request import Request
from flashgpt.config import GPTConfig
from flashgpt.data.shards import TokenData
from flashgpt.fields import check_keys, documented_fields
from flashgpt.generation.decode import check_prompt
from flashgpt.generation.text import TextGenerator
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import RunConfig, SampleConfig, TrainConfig
from flashgpt.tokenizer import Tokenizer
from flashgpt.train import checkpoint, initial
from flashgpt.train.loop import Listener, Result
from flashgpt.train.parallel import ALONE, Parallel
from flashgpt.train.record import add_sample
from flashgpt.train.trainer import Trainer

CFG: dict[str, Any] = {
    "vocab_size": 50257,  # token ids the model knows (count); GPT-2's
    "context_length": 1024,  # longest sequence (tokens)
    "emb_dim": 768,  # width of the residual stream (features)
    "n_heads": 12,  # attention heads per layer (count); divides emb_dim
    "n_layers": 12,  # transformer blocks (count)
    "drop_rate": 0.1,  # dropout probability while training
    "qkv_bias": False,  # bias on the query, key and value projection; True in GPT-2's weights
    "use_flash": True,  # True: fused flash attention; False: standard attention, same numbers
    "tie_weights": True,  # the output head shares the token embedding's weights
    "activation": "gelu_new",  # tanh form of GELU, as GPT-2 was trained; "gelu" = erf form
    "tokenizer": "bytes",  # bytes (works anywhere), gpt2 (network or hub cache), or a path
    "train": {},  # keys of the [train] section, see `flashgpt train --print-config`
}


@dataclasses.dataclass(frozen=True)
class System:
    """Everything that `build` puts together."""

    tokenizer: Tokenizer
    model: GPTModel
    trainer: Trainer
    generator: TextGenerator


def build(cfg: Mapping[str, Any]) -> System:
    """Builds a system from a cfg like `CFG`.

    Weights are drawn from the seed `train.seed`.

    Raises:
        ValueError: an unknown or missing key, a wrong value, or a vocabulary smaller than the
            tokenizer's.
    """
    extra = {"tokenizer", "train"}
    model_cfg = GPTConfig.from_dict({k: v for k, v in cfg.items() if k not in extra})
    tokenizer = Tokenizer.load(cfg.get("tokenizer", CFG["tokenizer"]))
    if tokenizer.vocab_size > model_cfg.vocab_size:
        raise ValueError(
            f"vocab_size must be at least the tokenizer's {tokenizer.vocab_size}, "
            f"got {model_cfg.vocab_size}"
        )
    settings = cfg.get("train", {})
    check_keys(settings, documented_fields(TrainConfig), "train")
    return assemble(model_cfg, tokenizer, TrainConfig(**settings))


def assemble(
    cfg: GPTConfig, tokenizer: Tokenizer, train: TrainConfig, parallel: Parallel = ALONE
) -> System:
    """Builds a system around a tokenizer that is there already."""
    torch.manual_seed(train.seed)
    model = GPTModel(cfg)
    trainer = Trainer(model, tokenizer, train, parallel)
    return System(tokenizer, model, trainer, TextGenerator(model, tokenizer))


def train(
    run: RunConfig,
    data: TokenData,
    out: Path,
    *,
    resume: bool = False,
    listener: Listener | None = None,
    parallel: Parallel = ALONE,
) -> tuple[System, Result]:
    """Trains on prepared data; then draws a sample into the run's samples.txt.

    Every key of the model is written into the run's config. Several processes each call it; the
    first one writes.

    Raises:
        ValueError, OSError, TrainingError: as `Trainer.fit` says.
    """
    listener = listener or Listener()
    # A run that goes on has its weights, and the shape is written in its config.
    goes_on = parallel.lead(lambda: resume and bool(checkpoint.steps(out)))
    source = None if goes_on else run.model.init_from
    cfg = parallel.lead(lambda: _resolved(run, data, source, parallel.size))
    system = assemble(cfg, data.tokenizer, run.train, parallel)
    if source:
        listener.note(initial.load_into(system.model, source, parallel))
    run = dataclasses.replace(run, model=run.model.pinned(cfg))
    result = system.trainer.fit(data, out, run, resume=resume, listener=listener)
    if result.evaluation is not None:
        parallel.lead(lambda: _sample(system, result, out, run.sample, listener))
    return system, result


def _resolved(run: RunConfig, data: TokenData, source: str | None, processes: int) -> GPTConfig:
    """The model of a run; refuses now what would fail later."""
    base = initial.shape(source) if source else None
    cfg = run.model.resolve(data.tokenizer.vocab_size, base)
    check_prompt(data.tokenizer.encode(run.sample.prompt), cfg)
    run.train.rows_at_once(cfg.context_length, processes)
    return cfg


def _sample(
    system: System, result: Result, out: Path, how: SampleConfig, listener: Listener
) -> None:
    """Draws a text from the model; from its checkpoint, if no process has all of it."""
    generator, parts = system.generator, system.trainer.parts
    if parts.parallel.sharded:
        model, _ = checkpoint.load(result.checkpoint)
        generator = TextGenerator(model.to(parts.device), system.tokenizer)
    text = how.prompt
    listener.sample(text)
    for piece in generator.stream(text, how):
        listener.sample(piece)
        text += piece
    add_sample(out, result.step, text)


def verification() -> list[str]:
    """Builds the model of `CFG` and reports versions, the kernel, and the shapes in and out."""
    system = build({**CFG, "train": {"device": "cpu"}})
    ids_BT = torch.randint(CFG["vocab_size"], (2, 256))
    system.model.eval()
    with torch.inference_mode():
        logits_BTV = system.model(ids_BT)
    return [
        f"PyTorch version: {torch.__version__}",
        f"Flash attention available: {flash_available()}",
        f"Input shape: {list(ids_BT.shape)}",
        f"Logits shape: {list(logits_BTV.shape)}",
    ]


def flash_available() -> bool:
    """Whether one of PyTorch's fused kernels serves training without dropout here."""
    device, dtype = "cpu", torch.float32
    if torch.cuda.is_available():
        device, dtype = "cuda", torch.bfloat16
    request = Request(device, dtype, 64, 1024, "square", False, False, True, False)
    return kernels.choose(request).kernel.startswith("sdpa:")


if __name__ == "__main__":
    print("\n".join(verification()))
