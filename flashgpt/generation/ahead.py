"""Decoding on a GPU, several tokens ahead of the host: model, draw and cache as one CUDA graph.

The texts of a batch go on together as long as they are the same ones; a text that has ended goes on
unseen until half of them have. Each replay draws a token for every text on the device, so nothing
waits for the host, which reads the tokens as they come and may find that some need not have been
drawn.

Legend: B texts, S positions of the cache, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashgpt import cudagraph
from flashgpt.generation import device_step
from flashgpt.generation.cache import KVCache
from flashgpt.generation.rows import Logits, Row
from flashgpt.generation.sampling import sample
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import SampleConfig

if TYPE_CHECKING:
    from flashgpt.generation.triton_step import State

STEPS = 4  # that may be under way behind the one whose token the host reads
LEAST_TOKENS = 16  # that make up for a capture
MOST_KEPT = 2**29  # bytes of the cache of a graph that stays for the next call

_kept: weakref.WeakKeyDictionary[GPTModel, tuple[Any, Graph]] = weakref.WeakKeyDictionary()


class Graph:
    """A captured step with the memory it works on. Holds no model, but needs its weights."""

    def __init__(
        self, model: GPTModel, config: SampleConfig, texts: int, room: int, vocab_size: int
    ) -> None:
        from flashgpt.generation.triton_step import State

        weight = model.wte.weight

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=weight.device)

        state = State(
            id_B=zeros(texts, dtype=torch.int64),
            place_B=zeros(texts),
            pad_B=zeros(texts),
            drawn_B=zeros(texts),
            tokens_LB=zeros(room, texts, dtype=torch.int64),
        )
        self.state = state
        self.uniform_BL = zeros(texts, room, dtype=torch.float64)
        self.cache = KVCache(model.cfg, texts, weight.device, weight.dtype, capacity=room)
        self.on_host_LB = torch.empty(room, texts, dtype=torch.int64, pin_memory=weight.is_cuda)
        step = _step(model, config, self.cache, state, self.uniform_BL, vocab_size)
        stream = cudagraph.Stream()
        stream.run(step)  # compiles, and makes what libraries cannot make during a capture
        self.replay, _ = stream.capture(step)

    def begin(
        self, cache: KVCache, next_ids: Sequence[int], random: Sequence[Sequence[float]]
    ) -> None:
        """Goes on with the texts of a cache.

        Args:
            next_ids: the token that follows what the cache holds of each text.
            random: numbers for the draws of each; empty if they need none.
        """
        state, end = self.state, cache.length
        for own, other in (
            (self.cache.k_LBNSH, cache.k_LBNSH),
            (self.cache.v_LBNSH, cache.v_LBNSH),
        ):
            own[:, :, :, :end] = other[:, :, :, :end]
        self.cache.length, self.cache.pads = end, cache.pads
        state.id_B.copy_(torch.tensor(next_ids))
        state.place_B.fill_(end)
        state.pad_B.copy_(torch.tensor(cache.pads))
        state.drawn_B.zero_()
        for uniform_L, numbers in zip(self.uniform_BL, random, strict=True):
            count = min(len(numbers), len(uniform_L))
            uniform_L[:count] = torch.tensor(numbers[:count], dtype=torch.float64)


def _step(
    model: GPTModel,
    config: SampleConfig,
    cache: KVCache,
    state: State,
    uniform_BL: Tensor,
    vocab_size: int,
) -> Callable[[], None]:
    from flashgpt.generation import triton_sample, triton_step

    room = cache.k_LBNSH.shape[3]

    def step() -> None:
        logits_BV, best_BP2 = device_step.step(model, cache, state, vocab_size)
        if config.temperature == 0 and best_BP2 is not None:
            triton_step.advance(state, best_BP2, room - 1)
            return
        if best_BP2 is not None and triton_sample.serves(config):
            triton_sample.draw(logits_BV, best_BP2, state, uniform_BL, config)
        else:
            uniform_B = uniform_BL.gather(1, state.drawn_B.long()[:, None])[:, 0]
            state.id_B.copy_(sample(logits_BV, config, uniform_B))
        triton_step.advance(state, None, room - 1)

    return step


class Ahead:
    """Tokens for rows that the cache of `logits` holds.

    Args:
        logits: where rows come from when they begin, and go when the batch changes.
        random: numbers for the draws of each row.
    """

    def __init__(
        self,
        model: GPTModel,
        logits: Logits,
        config: SampleConfig,
        random: Mapping[Row, Sequence[float]],
        vocab_size: int,
    ) -> None:
        self._model, self._logits, self._config = model, logits, config
        self._random, self._vocab_size = random, vocab_size
        self._own: tuple[Any, Graph] | None = None
        self._graph: Graph | None = None
        self._places: dict[Row, int] = {}
        self._events: list[torch.cuda.Event] = []
        self._read = self._most = 0

    @torch.inference_mode()
    def tokens(self, rows: Sequence[Row]) -> list[int] | None:
        """The next token of each row; None if this step is for `logits`, whose cache is ready."""
        if not self._goes_on(rows):
            self._end()
            if not self._begins(rows):
                return None
        assert self._graph is not None, "has begun"
        while len(self._events) < min(self._read + 1 + STEPS, self._most):
            self._launch(self._graph)
        self._events[self._read].synchronize()
        found = self._graph.on_host_LB[self._read].tolist()
        self._read += 1
        self._graph.cache.length += 1
        for row in rows:
            row.held = len(row.window)
        return [found[self._places[row]] for row in rows]

    def _launch(self, graph: Graph) -> None:
        graph.replay()
        step, event = len(self._events), torch.cuda.Event()
        graph.on_host_LB[step].copy_(graph.state.tokens_LB[step], non_blocking=True)
        event.record()
        self._events.append(event)

    def _goes_on(self, rows: Sequence[Row]) -> bool:
        few = len(self._places) > 1 and 2 * len(rows) <= len(self._places)
        known = all(row.held and row in self._places for row in rows)
        return self._graph is not None and known and not few and self._read < self._most

    def _begins(self, rows: Sequence[Row]) -> bool:
        cache = self._logits.cache_of(rows)
        if not self._logits.is_on_gpu or cache is None:
            return False
        left = max(row.limit - len(row.ids) for row in rows)
        room = self._model.cfg.context_length
        self._most = min(left, room - cache.length)
        if self._most < LEAST_TOKENS:
            return False
        self._own = self._graph_of(len(rows), room)
        self._graph = self._own[1]
        random = [self._random[row][len(row.ids) :] for row in rows]
        self._graph.begin(cache, [row.window[-1] for row in rows], random)
        self._places = {row: place for place, row in enumerate(rows)}
        self._events, self._read = [], 0
        return True

    def _end(self) -> None:
        """Gives the texts back as far as they were read; their cache is the graph's still."""
        if self._graph is None:
            return
        if self._events:
            self._events[-1].synchronize()
        self._logits.adopt(list(self._places), self._graph.cache)
        self._graph, self._places = None, {}

    def close(self) -> None:
        """Ends for good: others may have the graph."""
        self._end()
        if self._own is not None and 2 * self._own[1].cache.k_LBNSH.nbytes <= MOST_KEPT:
            _kept[self._model] = self._own
        self._own = None

    def _graph_of(self, texts: int, room: int) -> tuple[Any, Graph]:
        """A key and the graph under it: this one's own, or one that is kept, or a new one."""
        config, model = self._config, self._model
        drawing = (config.temperature, config.top_k, config.top_p, config.min_p)
        addresses = [p.data_ptr() for p in self._logits.weights or ()]
        key = (texts, room, self._vocab_size, drawing, model.wte.weight.dtype, addresses)
        found, self._own = self._own or _kept.pop(model, None), None
        if found is not None and found[0] == key:
            return found
        del found  # there may be no room for both
        return key, Graph(model, config, texts, room, self._vocab_size)
