"""The ways of benchmarks.nanogpt_speed: the step of each, its start and its memory.

Legend: B rows, T positions.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
import types

import torch

from benchmarks import nanogpt
from flashgpt.attention import kernels
from flashgpt.measure.clock import Call
from flashgpt.measure.memory import peak_bytes
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import TrainConfig
from flashgpt.train import graph
from flashgpt.train.bare import BareStep

WAYS = (
    *("nanogpt", "nanogpt-standard", "nanogpt-eager"),
    *("ours", "ours-off", "ours-eager", "ours-off-eager", "ours-graph"),
)
PEERS, GRAPH = WAYS[:3], WAYS[-1]
TRAIN = TrainConfig(grad_clip=1.0)  # whose seed, clipping and AdamW all ways take


def build(way: str, wanted: argparse.Namespace, p: float, device: torch.device) -> BareStep:
    """The step of a way."""
    module: types.ModuleType = wanted.module
    compiled, plain = not way.endswith("-eager"), way.removesuffix("-eager").removesuffix("-graph")
    cfg = dataclasses.replace(wanted.cfg, drop_rate=p, use_flash=plain != "ours-off")
    autocast: torch.dtype | None = wanted.autocast
    torch.manual_seed(TRAIN.seed)
    if plain.startswith("nanogpt"):
        peer = nanogpt.peer(module, cfg, flash=plain == "nanogpt").to(device)
        forward = nanogpt.peer_forward(peer, compiled=compiled)
        made = nanogpt.peer_optimizer(peer, TRAIN, device)
        return BareStep(forward, peer, made, TRAIN.grad_clip, device, autocast)
    model = GPTModel(cfg).to(device).train()
    forward = nanogpt.own_call(model, compiled=compiled)
    made, masks = nanogpt.own_optimizer(model, TRAIN), nanogpt.own_masks(model, TRAIN)
    return BareStep(forward, model, made, TRAIN.grad_clip, device, autocast, masks)


@dataclasses.dataclass(frozen=True)
class Ready:
    """A way after its first step, or, where that is a CUDA graph, after its capture.

    Attributes:
        step: one step on its tokens.
        plain: the same, launched kernel by kernel where `step` is a CUDA graph.
        graphed: whether it is a CUDA graph.
        first_step_seconds: of the first step, which compiles.
        kernels: attention kernels that served; empty for nanoGPT.
    """

    bare: BareStep
    step: Call
    plain: Call
    graphed: bool
    first_step_seconds: float
    kernels: list[str]


def start(
    way: str, wanted: argparse.Namespace, p: float, batch: int, device: torch.device
) -> Ready:
    """Builds a way and does its first step.

    Raises:
        RuntimeError: a CUDA graph could not be captured; torch.OutOfMemoryError for want of memory.
    """
    kernels.clear_receipt()
    bare = build(way, wanted, p, device)
    generator = torch.Generator().manual_seed(TRAIN.seed)
    size = (batch, wanted.length + 1)
    tokens = torch.randint(wanted.vocab_size, size, generator=generator).to(device)
    ids_BT, targets_BT = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    notes: list[str] = []
    graphed = bare.graphed(notes.append) if way == GRAPH else None

    def step() -> None:
        (graphed or bare)(ids_BT, targets_BT)

    def plain() -> None:
        bare(ids_BT, targets_BT)

    began = time.perf_counter()
    step()
    wait(device)
    seconds = time.perf_counter() - began
    if graphed is not None:
        repeated(step, graph.WARM_UP)()
        wait(device)
        if not graphed.compute.captured:
            full = torch.OutOfMemoryError.__name__ in notes[-1]
            raise (torch.OutOfMemoryError if full else RuntimeError)(notes[-1])
    served = sorted({line.split(" served ")[0] for line in kernels.receipt()})
    return Ready(bare, step, plain, graphed is not None, seconds, served)


def repeated(step: Call, count: int) -> Call:
    """The step `count` times."""

    def steps() -> None:
        for _ in range(count):
            step()

    return steps


def peak(ready: Ready, device: torch.device) -> int:
    """The most bytes that torch holds during two steps; with a CUDA graph, what it reserves, for
    between replays the graph's memory belongs to no tensor."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        repeated(ready.step, 2)()
        wait(device)
        if ready.graphed:
            return torch.cuda.max_memory_reserved(device)
        return torch.cuda.max_memory_allocated(device)
    model, state = ready.bare.model, ready.bare.optimizer.state_tensors()
    held = [*model.parameters(), *model.buffers(), *state.values()]
    return sum(tensor.nbytes for tensor in held) + peak_bytes(ready.step, device)


def release(device: torch.device) -> None:
    """Gives back the memory of ways that are gone, and what was compiled for them."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
