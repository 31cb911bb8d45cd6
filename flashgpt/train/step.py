"""One optimizer step after another: forward, backward, norm, verdict, update.

What step t does is a function of the config, the seed, t, and the state before it. The host runs
up to AHEAD steps in front of a GPU and reads what became of a step when it is done, so that no step
waits for the host. On the CPU it reads at once. Both give the same weights, whatever the guard
refuses.

A small step on a GPU is captured once as a CUDA graph and replayed: the same kernels in the same
order, so the same bits.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from flashgpt.attention.dropout import philox
from flashgpt.train import graph, runtime
from flashgpt.train.feed import Feed, MicroBatch
from flashgpt.train.graph import Graphed
from flashgpt.train.guard import Verdict
from flashgpt.train.parts import Parts
from flashgpt.train.schedule import learning_rate
from flashgpt.train.wrapping import unsynchronised

DROPOUT_STREAM = 0xD0
# Steps that the host may launch before it reads the one in front of them.
AHEAD = {"cpu": 0, "cuda": 2}

Forward = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Done:
    """A step that has been done.

    Attributes:
        step: its number, from 0.
        loss: nats per counted target.
        norm: of the whole gradient, before clipping.
        z_loss, z_norm: standard deviations from the means of the steps before; 0 early on.
        rate: learning rate.
        seconds: duration; on CUDA by the device's clock.
        data_seconds: what the host waited for the batch.
    """

    step: int
    verdict: Verdict
    loss: float
    norm: float
    z_loss: float
    z_norm: float
    rate: float
    seconds: float
    data_seconds: float


class Stepper:
    """Does steps on the parts.

    Args:
        forward: the model, or the compiled model.
        graphed: whether steps become a CUDA graph; `pays_as_graph` tells.
        note: hears what came of that.
    """

    def __init__(
        self,
        parts: Parts,
        forward: Forward,
        graphed: bool = False,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._parts, self._forward = parts, forward
        self._graphed: Graphed[Tensor] | None = None
        if graphed:
            function = functools.partial(_update_from_tensors, parts, forward)
            self._graphed = Graphed(function, parts.optimizer.zero_grad, note)
        self.next = 0  # the step to do next; to be set while no step is under way

    def completed(
        self, feed: Feed, last: int, pause: Callable[[int], bool], stop: Callable[[], bool]
    ) -> Iterator[Done]:
        """Does the steps `next` to `last`, and yields each when it is done, in order.

        While a bad step is looked at no other is under way, and the weights are those before it.

        Args:
            pause: whether the state after so many steps will be looked at; nothing runs past it
                before it has been.
            stop: no step is begun once this is true.
        """
        ahead = AHEAD[self._parts.device.type]
        under_way: collections.deque[_UnderWay] = collections.deque()
        while True:
            while (
                self.next < last
                and len(under_way) <= ahead
                and not (under_way and pause(self.next))
                and not stop()
            ):
                under_way.append(self._launch(self.next, feed))
                self.next += 1
            if not under_way:
                return
            done = under_way.popleft().read()
            if done.verdict == Verdict.BAD:
                under_way.clear()  # held back by the guard: to be done again
                self.next = done.step + 1
            yield done
            if done.verdict == Verdict.BAD:
                self._parts.guard.release()

    def _launch(self, step: int, feed: Feed) -> _UnderWay:
        clock = _Clock(self._parts.device)
        waiting = time.perf_counter()
        micros = feed.take(step)
        data_seconds = time.perf_counter() - waiting
        rate = learning_rate(step, self._parts.config)
        self._parts.optimizer.set_rate(rate)
        seed = dropout_seed(self._parts.config.seed, step)
        if self._graphed is None:
            report = update(self._parts, self._forward, micros, seed)
        else:
            report = self._graphed(*_as_tensors(self._parts, micros, seed))
        report = _to_host(report)
        clock.stop()  # behind the report, which is there once this time has come
        return _UnderWay(step, report, rate, clock, data_seconds)


def pays_as_graph(parts: Parts) -> bool:
    """Whether steps are small enough for a CUDA graph, and the config lets one be made.

    A kernel's own masks come from PyTorch's generator, which a step sets anew by a number.
    """
    config = parts.config
    tokens = parts.rows_at_once * parts.model.cfg.context_length
    allowed = config.compile != "off" and config.dropout_masks == "shared"
    # What goes between processes has not been captured yet.
    allowed = allowed and parts.parallel.size == 1
    return allowed and graph.pays(parts.device, tokens, parts.model.n_parameters)


def update(
    parts: Parts, forward: Forward, micros: Iterable[MicroBatch], seed: int | Tensor
) -> Tensor:
    """One optimizer step, unless the guard refuses it; returns the guard's report.

    Args: those of `backward`.
    """
    guard = parts.guard
    loss = parts.parallel.total(backward(parts, forward, micros, seed))
    grads = [p.grad for p in parts.model.parameters() if p.grad is not None]
    if guard.loss_scale is not None:
        torch._foreach_mul_(grads, 1 / guard.loss_scale)
    norm = parts.parallel.norm(grads)
    limit = parts.config.grad_clip or math.inf
    clip_grads_with_norm_(parts.model.parameters(), limit, norm, parts.parallel.foreach)
    refused, report = guard.judge(loss, norm)
    parts.optimizer.step(refused)
    parts.optimizer.zero_grad()
    return report


def _as_tensors(parts: Parts, micros: list[MicroBatch], seed: int) -> list[Tensor]:
    """What differs between steps, on the device, without a wait for it."""

    def on_device(numbers: list[Any], dtype: torch.dtype) -> Tensor:
        on_host = torch.tensor(numbers, dtype=dtype, pin_memory=parts.device.type == "cuda")
        return on_host.to(parts.device, non_blocking=True)

    loss_dtype = torch.promote_types(parts.model.wte.weight.dtype, torch.float32)
    return [
        on_device([seed, *(micro.first_row for micro in micros)], torch.int64),
        on_device([micro.weight for micro in micros], loss_dtype),
        *(tensor for micro in micros for tensor in (micro.ids_BT, micro.targets_BT)),
    ]


def _update_from_tensors(
    parts: Parts, forward: Forward, seed_and_rows: Tensor, weights: Tensor, *tokens: Tensor
) -> Tensor:
    """`update` from what `_as_tensors` made."""
    seed, *rows = seed_and_rows.unbind()
    micros = map(MicroBatch, tokens[::2], tokens[1::2], rows, weights.unbind())
    return update(parts, forward, micros, seed)


def backward(
    parts: Parts, forward: Forward, micros: Iterable[MicroBatch], seed: int | Tensor
) -> Tensor:
    """The loss of one step, 0-d; its gradients, times the guard's loss scale, in the parameters.

    Of the loss it is the part of this process's micro-batches, of the gradients the whole.

    Args:
        seed: of the step's dropout masks, 64 bits, signed; a number, or 0-d on the device.
    """
    model, scale = parts.model, parts.guard.loss_scale
    model.train()
    total = torch.zeros((), device=parts.device)
    micros = list(micros)
    for micro in micros:
        model.set_dropout(seed, micro.first_row)
        if parts.config.dropout_masks == "kernel":
            # Masks depend on nothing before the step.
            torch.manual_seed(int(seed + micro.first_row))
        is_last = micro is micros[-1]
        with contextlib.nullcontext() if is_last else unsynchronised(parts.module):
            with runtime.casting(parts.device, parts.autocast):
                loss = forward(micro.ids_BT, micro.targets_BT)
            loss = loss * micro.weight
            (loss if scale is None else loss * scale).backward()
        total += loss.detach()
    return total


def dropout_seed(seed: int, step: int) -> int:
    """The 64-bit dropout seed of an optimizer step, signed: Philox of the run's seed."""
    low, high, _, _ = philox(step, step >> 32, 0, DROPOUT_STREAM, torch.tensor(seed))
    word = int(high) << 32 | int(low)
    return word - 2**64 if word >= 2**63 else word


@dataclasses.dataclass(frozen=True)
class _UnderWay:
    """A step that was launched; its report, on the host, is there when the clock has stopped."""

    step: int
    report: Tensor
    rate: float
    clock: _Clock
    data_seconds: float

    def read(self) -> Done:
        """Waits until the step is done."""
        seconds = self.clock.seconds()
        code, z_loss, z_norm, loss, norm = self.report.tolist()
        verdict = Verdict(int(code))
        return Done(
            self.step, verdict, loss, norm, z_loss, z_norm, self.rate, seconds, self.data_seconds
        )


class _Clock:
    """Times one step; on CUDA by events, which nobody waits for until the time is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self._start = time.perf_counter()

    def stop(self) -> None:
        """Marks the end of what was launched."""
        if self._cuda:
            self._events[1].record()
        self._end = time.perf_counter()

    def seconds(self) -> float:
        """Waits for the end."""
        if not self._cuda:
            return self._end - self._start
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / 1e3


def _to_host(report: Tensor) -> Tensor:
    """A copy, for the next step may write its report in the same place."""
    copy = torch.empty_like(report, device="cpu", pin_memory=report.is_cuda)
    return copy.copy_(report, non_blocking=True)
