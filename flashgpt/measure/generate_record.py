"""What `bench generate` is asked for, what it found, and the content of generate.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from flashgpt.config import GPTConfig
from flashgpt.measure import peer
from flashgpt.measure.clock import MIN_ROUNDS
from flashgpt.measure.generate_ways import WAYS


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is measured.

    Attributes:
        cfg: the model; its weights are random.
        dtype: of weights, cache and products.
        ways: names of `generate_ways.WAYS`.
        batches: texts side by side.
        compiled_batches: those of them that the compiled way is measured at.
        prompt: tokens before a text that is timed by the step.
        new_tokens: of each text.
        rounds: of each way.
    """

    cfg: GPTConfig
    dtype: torch.dtype
    ways: tuple[str, ...]
    batches: tuple[int, ...]
    compiled_batches: tuple[int, ...]
    prompt: int
    new_tokens: int
    rounds: int
    device: torch.device

    def __post_init__(self) -> None:
        for name in ("ways", "batches"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one, got none")
        for name, value in (("prompt", self.prompt), *(("batches", b) for b in self.batches)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.new_tokens < 2:
            raise ValueError(f"new_tokens must be at least 2, got {self.new_tokens}")
        if self.prompt + self.new_tokens > self.cfg.context_length:
            raise ValueError(
                f"prompt and new_tokens must be at most context_length {self.cfg.context_length} "
                f"together, got {self.prompt} and {self.new_tokens}"
            )
        if self.rounds < MIN_ROUNDS:
            raise ValueError(f"rounds must be at least {MIN_ROUNDS}, got {self.rounds}")
        if self.dtype == torch.bfloat16 and self.device.type == "cpu":
            raise ValueError(
                "dtype must be fp32 on the CPU, got bf16, which ends the process on some processors"
            )


@dataclasses.dataclass(frozen=True)
class Row:
    """A way that was measured at a batch.

    Attributes:
        tokens_per_second: of all texts, at the median step.
        ms, ms_min, ms_max: of a step after the first token, median and range over the rounds.
        limit_tokens_per_second: at which the memory would be read without a pause.
        share: of that limit.
        first_call_seconds: of the first text, which compiles.
        differing: texts that are not, token for token, those of ours at the same batch; None where
            ours was not measured.
        differs_at: the first token (from 0) at which one of them is another.
    """

    way: str
    batch: int
    tokens_per_second: float
    ms: float
    ms_min: float
    ms_max: float
    rounds: int
    limit_tokens_per_second: float
    share: float
    first_call_seconds: float
    differing: int | None
    differs_at: int | None


@dataclasses.dataclass(frozen=True)
class First:
    """Time to the first token of one text, median and range over the rounds (milliseconds)."""

    way: str
    prompt: int
    ms: float
    ms_min: float
    ms_max: float
    rounds: int


@dataclasses.dataclass(frozen=True)
class Refused:
    """What was not measured, and why; `batch` is None for the time to the first token."""

    way: str
    batch: int | None
    reason: str

    def __str__(self) -> str:
        what = "first token" if self.batch is None else f"batch {self.batch}"
        return f"{WAYS[self.way]}, {what}"


@dataclasses.dataclass
class Result:
    """Everything that was measured.

    Attributes:
        bytes_per_second: of memory, the better of one measurement before and one after.
        weight_bytes: that every step reads.
        cache_bytes: of keys and values that every step reads for each text, on average.
    """

    parameters: int
    weight_bytes: int
    cache_bytes: float
    bytes_per_second: float = 0.0
    rows: list[Row] = dataclasses.field(default_factory=list)
    first: list[First] = dataclasses.field(default_factory=list)
    refused: list[Refused] = dataclasses.field(default_factory=list)


def record(setup: Setup, result: Result, environment: Mapping[str, Any]) -> dict[str, Any]:
    """The content of generate.json."""
    where = dict(environment)
    if peer.missing() is None:
        import transformers

        where["transformers"] = transformers.__version__
    dtype = str(setup.dtype).removeprefix("torch.")
    return {
        "environment": where,
        "setup": {**dataclasses.asdict(setup), "dtype": dtype, "device": setup.device.type},
        "ways": WAYS,
        **dataclasses.asdict(result),
    }
