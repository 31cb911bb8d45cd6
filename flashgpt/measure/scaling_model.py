"""What training would take on GPUs that are not here: memory, communication, speed. Predictions.

Owns the model of data parallelism in docs/planning.md: DDP, which keeps everything on every GPU and
adds up gradients, and FSDP2 (`fully_shard`), which keeps a share and gathers weights where they are
needed. Arithmetic alone; imports no torch.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from typing_extensions import Doc

from flashgpt.config import GPT2_VOCAB_SIZE, GPTConfig, preset
from flashgpt.measure.memory_model import (
    BF16,
    FP32,
    MOMENTS,
    Memory,
    block_parameters,
    flop_per_token,
    parameters,
    predict,
    root_parameters,
)

Engine = Literal["DDP", "FSDP2"]
ENGINES: tuple[Engine, ...] = ("DDP", "FSDP2")
SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPUS = (1, 2, 8, 64, 1024)
MOST_ROWS = 64  # sequences in a micro-batch: past that a GPU gets no faster
BACKWARD_SHARE = 2 / 3  # of a step's arithmetic
GATHERED_BLOCKS = 2  # of FSDP2: the one at work and the next
BLOCKWISE = 1.025  # step of a model compiled block by block, as FSDP2 has it, to one compiled whole
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The GPUs that are assumed, and what joins them: H100s.

    Memory, peak and network are of data sheets. The utilization is what GPT-2 124M reaches on one,
    the bandwidth in a machine what NCCL reached between two (docs/scaling.md).
    """

    memory_gib: Annotated[float, Doc("memory of a GPU (GiB)")] = 79.0
    tflops: Annotated[float, Doc("peak of a GPU in bf16 (TFLOP/s)")] = 989.4
    utilization: Annotated[float, Doc("share of that peak which training reaches, (0, 1]")] = 0.5
    node_gpus: Annotated[int, Doc("GPUs in one machine")] = 8
    node_bandwidth: Annotated[
        float, Doc("from one GPU to others of its machine, each way (GB/s)")
    ] = 200.0
    network_bandwidth: Annotated[float, Doc("from one GPU to other machines, each way (GB/s)")] = (
        50.0
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(
                    f"cluster.{field.name} must be positive, got {getattr(self, field.name):g}"
                )
        if self.utilization > 1:
            raise ValueError(f"cluster.utilization must be at most 1, got {self.utilization:g}")

    def one_machine(self, gpus: int) -> bool:
        """Whether so many GPUs are in one: there DDP sends when the backward pass has ended, and
        FSDP2 gathers blocks in fp32, not in bf16."""
        return gpus <= self.node_gpus

    def bandwidth(self, gpus: int) -> float:
        """Bytes per second that each of so many GPUs sends; that of the slowest link."""
        slowest = self.node_bandwidth if self.one_machine(gpus) else self.network_bandwidth
        return slowest * 1e9


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One step of one model on so many GPUs, each with one micro-batch.

    Attributes:
        rows: sequences on each GPU; the largest power of two that fits. 0: not even one does.
        memory: of one GPU.
        sent_bytes: that each GPU sends in a step.
        hideable_bytes: those of them that can go while the GPU computes.
        compute_seconds, communication_seconds: of a step, each by itself.
        exposed_seconds: of communication that computing does not hide.
    """

    model: str
    engine: Engine
    gpus: int
    rows: int
    memory: Memory
    sent_bytes: float
    hideable_bytes: float
    compute_seconds: float
    communication_seconds: float
    exposed_seconds: float
    tokens_per_second: float

    @property
    def efficiency(self) -> float:
        """Speed over that of so many GPUs which need not talk; 0 where nothing fits."""
        if not self.rows:
            return 0.0
        return self.compute_seconds / (self.compute_seconds + self.exposed_seconds)


def table(cluster: Cluster, margin: float) -> list[Prediction]:
    """Every size by engine and number of GPUs; one GPU needs no engine.

    Args:
        margin: share of a GPU's memory that stays free.
    """
    made = []
    for name in SIZES:
        cfg = preset(name, vocab_size=GPT2_VOCAB_SIZE)
        for gpus in GPUS:
            for engine in ENGINES if gpus > 1 else ENGINES[:1]:
                made.append(step(name, cfg, engine, gpus, cluster, margin))
    return made


def step(
    name: str, cfg: GPTConfig, engine: Engine, gpus: int, cluster: Cluster, margin: float
) -> Prediction:
    """One step: forward, backward, gradients joined, update."""
    usable = (1 - margin) * cluster.memory_gib * GIB
    rows = MOST_ROWS
    while rows and memory(cfg, engine, gpus, rows, cluster).total > usable:
        rows //= 2
    tokens = rows * cfg.context_length
    compute = tokens * flop_per_token(cfg) / (cluster.tflops * 1e12 * cluster.utilization)
    if engine == "FSDP2":
        compute *= BLOCKWISE
    sent, hideable = traffic(cfg, engine, gpus, cluster)
    speed = cluster.bandwidth(gpus)
    room = compute * (BACKWARD_SHARE if engine == "DDP" else 1)
    exposed = (sent - hideable) / speed + max(0.0, hideable / speed - room)
    return Prediction(
        *(name, engine, gpus, rows, memory(cfg, engine, gpus, rows, cluster)),
        *(sent, hideable, compute, sent / speed, exposed),
        gpus * tokens / (compute + exposed) if rows else 0.0,
    )


def memory(cfg: GPTConfig, engine: Engine, gpus: int, rows: int, cluster: Cluster) -> Memory:
    """Of one GPU. DDP's buckets are the gradients themselves (`gradient_as_bucket_view`)."""
    alone = predict(cfg, rows, recompute=False, accumulates=gpus > 1)
    if engine == "DDP" or gpus == 1:
        return alone
    root, blocks = root_parameters(cfg), GATHERED_BLOCKS * block_parameters(cfg)
    share = FP32 * parameters(cfg) / gpus
    gathered = FP32 * (root + (blocks if cluster.one_machine(gpus) else 0))
    return dataclasses.replace(
        alone,
        weights=share,
        gradients=share + FP32 * (root + blocks),
        moments=MOMENTS * share,
        copies=gathered + BF16 * (root + blocks),
    )


def traffic(cfg: GPTConfig, engine: Engine, gpus: int, cluster: Cluster) -> tuple[float, float]:
    """Bytes that each GPU sends in a step of one micro-batch, and those that can be hidden.

    By rings (Patarasuk and Yuan 2009): of n GPUs each sends (n - 1) / n of a tensor that is
    gathered or scattered, twice that of one which is added up everywhere.
    """
    part, near = (gpus - 1) / gpus, cluster.one_machine(gpus)
    root, blocks = root_parameters(cfg), cfg.n_layers * block_parameters(cfg)
    if engine == "DDP":
        # In one machine gradients are sent when all are there. With tied weights the embedding's
        # is complete when backward has ended.
        return 2 * part * FP32 * (root + blocks), 0.0 if near else 2 * part * FP32 * blocks
    # Gathered for forward, for backward; scattered. The root stays gathered.
    in_blocks = part * (2 * (FP32 if near else BF16) + FP32) * blocks
    return in_blocks + part * 2 * FP32 * root, in_blocks
