"""What benchmarks.scaling measures, in each of the processes of a way."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from typing import Any, Literal
from unittest import mock

import torch

from benchmarks.overlap import overlap
from flashgpt.attention import kernels
from flashgpt.config import GPTConfig, preset
from flashgpt.measure.trace import trace
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import TrainConfig
from flashgpt.train import parts, runtime, wrapping
from flashgpt.train.feed import MicroBatch
from flashgpt.train.parallel import Parallel
from flashgpt.train.parts import Parts
from flashgpt.train.step import Forward, update

SINGLE, BLOCKS = "single", "blocks"  # of one process
WARM_UP, PROFILED = 5, 3  # steps

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Size:
    """What is trained, and how long it is measured.

    Attributes:
        rows: sequences in the step of a device.
        losses: steps whose losses are compared.
        steps: in a round.
        compile: `train.compile`.
    """

    cfg: GPTConfig
    rows: int
    losses: int
    steps: int
    rounds: int
    compile: Literal["on", "off"]


def size(tiny: bool) -> Size:
    """GPT-2 124M, or a model that a CPU trains in a moment."""
    if tiny:
        cfg = preset("tiny", n_layers=2, n_heads=2, emb_dim=32, context_length=32, vocab_size=257)
        return Size(dataclasses.replace(cfg, drop_rate=0.0), 2, 5, 2, 3, "off")
    return Size(preset("gpt2", drop_rate=0.0), 64, 10, 10, 5, "on")


class Worker:
    """Measures one way, in each of its processes.

    Args:
        devices: whose rows the global batch has, in one process too.
    """

    def __init__(
        self,
        way: str,
        size: Size,
        device: Literal["auto", "cpu", "cuda"],
        devices: int,
        parallel: Parallel,
    ) -> None:
        self.way, self.parallel, self.size = way, parallel, size
        config = TrainConfig(
            tokens_per_step=size.rows * devices * size.cfg.context_length,
            micro_batch=size.rows,
            lr=3e-4,
            device=device,
            compile=size.compile,
        )
        torch.manual_seed(config.seed)
        model = GPTModel(self.size.cfg)
        self.start = {name: p.detach().clone() for name, p in model.named_parameters()}
        tokenizer: Any = None  # is not asked for anything
        self.parts: Parts = parts.build(model, tokenizer, config, parallel)

    def measure(self) -> Row:
        """What there is to say of the way; the same work in every process."""
        kernels.clear_receipt()
        self.tell("compiles, where it does")
        begin = time.perf_counter()
        made = self.parts
        with compiling_blocks() if self.way == BLOCKS else contextlib.nullcontext():
            forward = runtime.compiled(
                made.model, made.config, self.tell, made.module, self.parallel
            )
        batch = self.batch()
        row: Row = {"way": self.way, "processes": self.parallel.size}
        row["losses"] = self.losses(forward, batch)
        row["first_steps_seconds"] = time.perf_counter() - begin
        if self.way in (SINGLE, BLOCKS):
            self.reset()
            row["control"] = self.losses(forward, [micro_reversed(m) for m in reversed(batch)])
        self.tell(f"losses {row['losses'][0]:.4f} .. {row['losses'][-1]:.4f}; measures time")
        step = batch[:1]  # one device's
        for _ in range(WARM_UP):
            self.step(forward, step)
        row["ms"] = [self.round(forward, step) for _ in range(self.size.rounds)]
        rows = self.size.rows * self.parallel.size
        speed = rows * self.size.cfg.context_length / statistics.median(row["ms"]) * 1e3
        row["tokens_per_second"] = speed
        row["peak_bytes"] = runtime.peak_memory_bytes(self.parts.device)
        self.tell(f"{speed:,.0f} tokens/s, {row['peak_bytes'] / 2**30:.2f} GiB; looks inside")
        row["kernels"] = sorted({line.split(" served ")[0] for line in kernels.receipt()})
        row["communication"] = self.communication(forward, step)
        return row

    def batch(self) -> list[MicroBatch]:
        """The micro-batches of the process, of a global batch that is the same in all ways."""
        cfg, rows, own = self.size.cfg, self.parts.rows, self.parts.own_rows
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(cfg.vocab_size, (rows, cfg.context_length + 1), generator=generator)
        ids, at_once = ids.to(self.parts.device), self.parts.rows_at_once
        pieces = (ids[row : row + at_once] for row in own[::at_once])
        return [
            MicroBatch(
                piece[:, :-1].contiguous(), piece[:, 1:].contiguous(), own[0], at_once / rows
            )
            for piece in pieces
        ]

    def losses(self, forward: Forward, batch: list[MicroBatch]) -> list[float]:
        return [float(self.step(forward, batch)[3]) for _ in range(self.size.losses)]

    def step(self, forward: Forward, batch: list[MicroBatch]) -> torch.Tensor:
        """The guard's report."""
        return update(self.parts, forward, batch, 0)

    def reset(self) -> None:
        """Back to the first step."""
        with torch.no_grad():
            for name, parameter in self.parts.model.named_parameters():
                parameter.copy_(self.start[name])
        self.parts.optimizer.load_state_tensors({})
        self.parts.guard.reset()

    def round(self, forward: Forward, batch: list[MicroBatch]) -> float:
        """Milliseconds of a step, of several in a row; as many in all processes."""
        self.wait()
        begin = time.perf_counter()
        for _ in range(self.size.steps):
            self.step(forward, batch)
        self.wait()
        return (time.perf_counter() - begin) / self.size.steps * 1e3

    def communication(self, forward: Forward, batch: list[MicroBatch]) -> Row | None:
        """Milliseconds of a step in the first process; None without several GPUs."""

        def steps() -> None:
            for _ in range(PROFILED):
                self.step(forward, batch)

        if self.parts.device.type != "cuda" or self.parallel.size == 1:
            return None
        if not self.parallel.is_first:
            steps()
            return None
        return overlap(trace(steps, self.parts.device), PROFILED)

    def wait(self) -> None:
        if self.parts.device.type == "cuda":
            torch.cuda.synchronize()

    def tell(self, what: str) -> None:
        if self.parallel.is_first:
            print(f"{self.way}: {what}", flush=True)


def compiling_blocks() -> contextlib.AbstractContextManager[object]:
    """While entered, a whole model is compiled as a sharded one is: block by block."""
    return mock.patch.object(wrapping, "_is_sharded", return_value=True)


def micro_reversed(micro: MicroBatch) -> MicroBatch:
    return dataclasses.replace(
        micro, ids_BT=micro.ids_BT.flip(0), targets_BT=micro.targets_BT.flip(0)
    )
