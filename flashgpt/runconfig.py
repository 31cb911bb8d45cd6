"""The config of a run: the sections of `config.toml`, each key with its unit, default and range.

A value comes from the preset, then the TOML file, then the command line. toml.py reads and writes
them. Imports neither torch nor any command-line library.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal

from typing_extensions import Doc

from flashgpt.config import GPT2_VOCAB_SIZE, PRESETS, Activation, GPTConfig, preset
from flashgpt.fields import check_types

WEIGHTS_ALLOW = ("use_flash", "drop_rate", "context_length")  # to differ from init_from's


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The `[model]` section: a preset or weights to start from, and the keys that differ."""

    preset: Annotated[str, Doc(f"shape to start from: {', '.join(PRESETS)}")] = "tiny"
    init_from: Annotated[
        str | None, Doc("weights to start from: a run, a checkpoint, a Hugging Face GPT-2 folder")
    ] = None
    vocab_size: Annotated[int | None, Doc("token ids (count); the tokenizer's when left out")] = (
        None
    )
    context_length: Annotated[int | None, Doc("longest sequence (tokens)")] = None
    emb_dim: Annotated[int | None, Doc("width of the residual stream (features)")] = None
    n_heads: Annotated[int | None, Doc("attention heads per layer (count)")] = None
    n_layers: Annotated[int | None, Doc("transformer blocks (count)")] = None
    drop_rate: Annotated[float | None, Doc("dropout probability while training, in [0, 1)")] = None
    qkv_bias: Annotated[bool | None, Doc("bias on the query, key and value projection")] = None
    use_flash: Annotated[
        bool | None, Doc("True: fused flash attention; False: standard attention")
    ] = None
    tie_weights: Annotated[bool | None, Doc("output head shares the embedding's weights")] = None
    activation: Annotated[
        Activation | None, Doc("gelu_new = tanh form (GPT-2); gelu = erf form")
    ] = None

    def __post_init__(self) -> None:
        check_types(self, "model")
        preset(self.preset)
        if self.init_from is not None and self.preset != ModelConfig.preset:
            raise ValueError(
                f"model.preset must be left out with model.init_from, got {self.preset!r}"
            )

    def resolve(self, vocab_size: int, base: GPTConfig | None = None) -> GPTConfig:
        """The complete model for a tokenizer of `vocab_size` ids.

        Args:
            base: the model of `init_from`, in place of the preset.

        Raises:
            ValueError: `vocab_size` is set here and is smaller than the tokenizer's; a key that
                the weights of `base` do not allow.
        """
        changes = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        for key in ("preset", "init_from"):
            changes.pop(key, None)
        if base is not None:
            return self._on(base, vocab_size, changes)
        wanted = changes.pop("vocab_size", vocab_size)
        if wanted < vocab_size:
            raise ValueError(
                f"model.vocab_size must be at least the tokenizer's {vocab_size}, got {wanted}; "
                "leave it out"
            )
        return preset(self.preset, vocab_size=wanted, **changes)

    def _on(self, base: GPTConfig, vocab_size: int, changes: dict[str, Any]) -> GPTConfig:
        """`base` with the keys changed that its weights allow."""
        if vocab_size > base.vocab_size:
            raise ValueError(
                f"data.tokenizer must have at most the {base.vocab_size} ids of {self.init_from}, "
                f"got {vocab_size}"
            )
        there = base.to_dict()
        for key, value in changes.items():
            if key == "context_length" and value > base.context_length:
                raise ValueError(
                    f"model.context_length must be at most {base.context_length} as in "
                    f"{self.init_from}, got {value}: positions are learnt, and no later one has "
                    "weights"
                )
            if key not in WEIGHTS_ALLOW and value != there[key]:
                raise ValueError(
                    f"model.{key} must be {there[key]} as in {self.init_from}, got {value}; leave "
                    "it out"
                )
        return GPTConfig.from_dict({**there, **changes})

    def pinned(self, cfg: GPTConfig) -> ModelConfig:
        """This section with every key of `cfg` written out, so that a run can be repeated."""
        return dataclasses.replace(self, **cfg.to_dict())


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The `[data]` section: which text, and which tokenizer."""

    source: Annotated[
        tuple[str, ...],
        Doc("text, .jsonl, .parquet or .bin files; folders, globs; hf://OWNER/NAME; stdlib"),
    ] = ("stdlib",)
    tokenizer: Annotated[
        str,
        Doc("bpe (trained on the source), bytes, gpt2, or the path of a tokenizer"),
    ] = "bpe"
    vocab_size: Annotated[int, Doc("size of a tokenizer that is trained (token ids)")] = 8192
    cache: Annotated[str, Doc("folder that keeps prepared tokens for the next run")] = "data"
    field: Annotated[
        str,
        Doc("field of .jsonl and .parquet records that is the text; else prompt and completion"),
    ] = "text"

    def __post_init__(self) -> None:
        check_types(self, "data")
        if not self.source:
            raise ValueError("data.source must name at least one file, folder or glob, got none")
        if self.vocab_size < 257:
            raise ValueError(
                f"data.vocab_size must be at least 257 (256 bytes and <|endoftext|>), "
                f"got {self.vocab_size}"
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The `[train]` section: how long, how large, how fast."""

    steps: Annotated[int, Doc("length of the learning-rate schedule (optimizer steps)")] = 1000
    stop_at: Annotated[int | None, Doc("stop earlier, at this step, schedule unchanged")] = None
    tokens_per_step: Annotated[int, Doc("tokens in one optimizer step, all devices together")] = (
        4096
    )
    micro_batch: Annotated[
        int | None,
        Doc("sequences in one forward pass of one process; its whole share when left out"),
    ] = None
    lr: Annotated[float, Doc("peak learning rate")] = 1e-3
    schedule: Annotated[
        Literal["cosine", "wsd", "constant"],
        Doc("after warmup: cosine to min_lr; wsd: lr, at the end linear to min_lr; constant: lr"),
    ] = "cosine"
    min_lr: Annotated[
        float, Doc("learning rate at the last step, as a fraction of lr; not with constant")
    ] = 0.1
    warmup_steps: Annotated[int | None, Doc("linear warmup (steps); 1/20 of steps if left out")] = (
        None
    )
    decay_steps: Annotated[
        int | None, Doc("wsd only: linear decay at the end (steps); 1/5 of steps if left out")
    ] = None
    optimizer: Annotated[
        Literal["adamw", "muon"], Doc("muon: Muon for the blocks' matrices, AdamW for the rest")
    ] = "adamw"
    weight_decay: Annotated[
        float, Doc("decay of matrices and embeddings; biases and norms have none")
    ] = 0.1
    beta1: Annotated[float, Doc("AdamW's first-moment decay, in [0, 1)")] = 0.9
    beta2: Annotated[float, Doc("AdamW's second-moment decay, in [0, 1)")] = 0.95
    grad_clip: Annotated[float, Doc("largest global gradient norm; 0 = no clipping")] = 1.0
    eval_every: Annotated[int, Doc("steps between evaluations; 0 = only at the end")] = 200
    eval_tokens: Annotated[int, Doc("validation tokens per evaluation on the way")] = 65536
    final_eval_tokens: Annotated[
        int | None, Doc("validation tokens of the evaluation at the end; all when left out")
    ] = None
    checkpoint_every: Annotated[int, Doc("steps between checkpoints; 0 = only at the end")] = 200
    keep_checkpoints: Annotated[
        int, Doc("newest checkpoints that stay, besides the best one; 0 = all")
    ] = 3
    log_every: Annotated[int, Doc("steps between log lines")] = 1
    guard: Annotated[
        Literal["stop", "rollback"],
        Doc("after 3 bad steps in a row: stop, or go back to a checkpoint and pass their batches"),
    ] = "stop"
    guard_zscore: Annotated[
        float,
        Doc("so many standard deviations above the last 128 steps is bad; 0: finiteness only"),
    ] = 8.0
    seed: Annotated[int, Doc("seed of weights, data order and dropout")] = 1337
    parallel: Annotated[
        Literal["ddp", "fsdp"],
        Doc("with torchrun: ddp = each process has all weights; fsdp = a part of each (FSDP2)"),
    ] = "ddp"
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        Doc(
            "auto: bf16 autocast on CUDA, fp32 on the CPU (bf16 there: with AMX); fp16 scales loss"
        ),
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], Doc("auto: CUDA if there is any")] = "auto"
    deterministic: Annotated[
        bool, Doc("CUDA: only algorithms that repeat bit for bit (the CPU's always do)")
    ] = False
    activation_checkpointing: Annotated[
        bool, Doc("recompute each block in backward: less memory, about a third more time")
    ] = False
    dropout_masks: Annotated[
        Literal["shared", "kernel"],
        Doc("attention dropout: the same masks on every kernel, or each kernel's own"),
    ] = "shared"
    compile: Annotated[
        Literal["auto", "on", "off"],
        Doc("torch.compile; auto: where it works here and the planned run repays it"),
    ] = "auto"

    def __post_init__(self) -> None:
        check_types(self, "train")
        at_least = dict(steps=1, tokens_per_step=1, log_every=1, eval_tokens=1)
        at_least |= dict(eval_every=0, checkpoint_every=0, keep_checkpoints=0, seed=0)
        at_least |= dict(
            stop_at=1, micro_batch=1, warmup_steps=0, decay_steps=1, final_eval_tokens=1
        )
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"train.{name} must be at least {least}, got {value}")
        for name in ("weight_decay", "grad_clip", "min_lr", "guard_zscore"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} must not be negative, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be in [0, 1), got {getattr(self, name)}")
        if self.lr <= 0:
            raise ValueError(f"train.lr must be positive, got {self.lr}")
        if self.min_lr > 1:
            raise ValueError(f"train.min_lr is a fraction of lr, at most 1, got {self.min_lr}")
        if (self.warmup_steps or 0) > self.steps:
            raise ValueError(
                f"train.warmup_steps must be at most steps ({self.steps}), got {self.warmup_steps}"
            )
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(
                f"train.decay_steps must be left out with train.schedule {self.schedule!r}, got "
                f"{self.decay_steps}; it is for 'wsd'"
            )
        if (self.warmup_steps or 0) + (self.decay_steps or 0) > self.steps:
            raise ValueError(
                f"train.decay_steps must be at most the {self.steps - (self.warmup_steps or 0)} "
                f"steps after warmup, got {self.decay_steps}"
            )
        if (self.stop_at or 0) > self.steps:
            raise ValueError(
                f"train.stop_at must be at most steps ({self.steps}), got {self.stop_at}"
            )
        if self.seed >= 2**63:
            raise ValueError(f"train.seed must be in [0, 2^63), got {self.seed}")

    def rows(self, context_length: int) -> int:
        """Sequences in one optimizer step.

        Raises:
            ValueError: `tokens_per_step` is no multiple of `context_length`, or `micro_batch` does
                not divide the sequences of a step.
        """
        rows, rest = divmod(self.tokens_per_step, context_length)
        if rest or not rows:
            raise ValueError(
                f"train.tokens_per_step must be a multiple of model.context_length "
                f"({context_length}), got {self.tokens_per_step}"
            )
        if self.micro_batch and rows % self.micro_batch:
            raise ValueError(
                f"train.micro_batch must divide the {rows} sequences of a step, "
                f"got {self.micro_batch}"
            )
        return rows

    def check_processes(self, processes: int) -> None:
        """Refuses what so many processes cannot do together.

        Raises:
            ValueError: Muon needs whole matrices, and `parallel` leaves none.
        """
        if processes > 1 and self.optimizer == "muon" and self.parallel == "fsdp":
            raise ValueError(
                "train.optimizer must be adamw with train.parallel fsdp, got muon, which needs "
                "whole matrices; use train.parallel ddp"
            )

    def rows_at_once(self, context_length: int, processes: int = 1) -> int:
        """Sequences in one forward pass of one of `processes`, which share a step evenly.

        `micro_batch` may be more than its share.

        Raises:
            ValueError: as `rows`; the share is no whole number of sequences, or `micro_batch` does
                not divide it.
        """
        rows = self.rows(context_length)
        share, rest = divmod(rows, processes)
        if rest:
            raise ValueError(
                f"train.tokens_per_step must be a multiple of {processes * context_length} for "
                f"{processes} processes (model.context_length {context_length} each), got "
                f"{self.tokens_per_step}"
            )
        at_once = min(self.micro_batch or share, share)
        if share % at_once:
            raise ValueError(
                f"train.micro_batch must divide the {share} sequences that each of {processes} "
                f"processes has of a step, got {self.micro_batch}"
            )
        return at_once


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The `[sample]` section: how text is drawn."""

    prompt: Annotated[str, Doc("text to continue")] = "\n"
    max_new_tokens: Annotated[int, Doc("longest continuation (tokens)")] = 200
    temperature: Annotated[float, Doc("0 = greedy; 1 = the model's own distribution")] = 0.8
    # Not None for off: TOML has no such value, and a run's config.toml says all there is to say.
    top_k: Annotated[int, Doc("draw from the k likeliest tokens only; 0 = from all")] = 50
    top_p: Annotated[float | None, Doc("draw from the smallest set of this probability")] = None
    min_p: Annotated[float | None, Doc("drop tokens below this fraction of the likeliest")] = None
    seed: Annotated[int, Doc("seed of the drawing")] = 0
    past_context: Annotated[
        Literal["stop", "slide"], Doc("past context_length: stop, or drop the older half")
    ] = "slide"
    stop: Annotated[tuple[str, ...], Doc("texts that end the continuation; not part of it")] = ()
    stop_ids: Annotated[tuple[int, ...], Doc("token ids that do the same")] = ()

    def __post_init__(self) -> None:
        check_types(self, "sample")
        if self.max_new_tokens < 1:
            raise ValueError(f"sample.max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"sample.temperature must not be negative, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"sample.top_k must not be negative, got {self.top_k}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"sample.{name} must be in (0, 1], got {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"sample.seed must be in [0, 2^63), got {self.seed}")
        if "" in self.stop:
            raise ValueError("sample.stop must hold texts that are not empty, got ''")
        if min(self.stop_ids, default=0) < 0:
            raise ValueError(f"sample.stop_ids must not be negative, got {min(self.stop_ids)}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that makes a run what it is; `config.toml` holds it."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)

    def check(self, processes: int = 1) -> None:
        """Refuses values that contradict each other, so that no work is done for nothing.

        Args:
            processes: how many train together.

        Raises:
            ValueError: they make no model, a step that is no whole number of sequences for each
                process, or as `TrainConfig.check_processes`.
        """
        self.train.check_processes(processes)
        if self.model.init_from is not None:
            return  # the shape stands there, and is looked at when the weights are
        wanted = self.model.vocab_size
        cfg = self.model.resolve(GPT2_VOCAB_SIZE if wanted is None else wanted)
        self.train.rows_at_once(cfg.context_length, processes)
