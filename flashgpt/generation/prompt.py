"""The pass over one prompt on a GPU, as a CUDA graph from the second of about its length on.

The host needs longer for a pass's launches than a GPU for a thousand tokens. So that one graph
serves many lengths, prompts are padded at the end, where no token of the text sees it; before there
is a graph too, so that a prompt gives the same logits each time.

Legend: B texts (one), T tokens of the prompt, R room for a prompt, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashgpt import cudagraph
from flashgpt.generation.cache import KVCache
from flashgpt.generation.forward import Forward
from flashgpt.model.gpt2 import GPTModel

LEAST_ROOM, MOST_ROOM = 64, 2048  # beyond, launches no longer matter
MOST_BYTES = 2**28  # of keys and values that stay for the next prompt

_kept: weakref.WeakKeyDictionary[GPTModel, tuple[Any, dict[int, Pass]]] = (
    weakref.WeakKeyDictionary()
)


class Pass:
    """A pass over prompts of up to `room` tokens. Holds no model, but its weights."""

    def __init__(self, model: GPTModel, room: int) -> None:
        weight = model.wte.weight
        self._ids_BR = torch.zeros(1, room, dtype=torch.int64, device=weight.device)
        self._last_B = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self._cache = KVCache(model.cfg, 1, weight.device, weight.dtype, capacity=room)
        self._forward = Forward(model)
        self._calls = 0
        self._replay: Callable[[], None] | None = None
        self._logits_BV: Tensor | None = None

    def __call__(self, ids: Sequence[int], cache: KVCache) -> Tensor:
        """logits_BV after the prompt, which fills an empty cache."""
        count = len(ids)
        self._ids_BR[0, :count] = torch.tensor(ids)
        self._last_B.fill_(count - 1)
        self._calls += 1
        if self._calls == 2:
            self._replay, self._logits_BV = cudagraph.Stream().capture(self._padded)
        if self._replay is None:
            logits_BV = self._padded()
        else:
            self._replay()
            assert self._logits_BV is not None, "comes with the replay"
            logits_BV = self._logits_BV.clone()
        cache.k_LBNSH[:, :, :, :count] = self._cache.k_LBNSH[:, :, :, :count]
        cache.v_LBNSH[:, :, :, :count] = self._cache.v_LBNSH[:, :, :, :count]
        cache.advance(count)
        return logits_BV

    def _padded(self) -> Tensor:
        self._cache.length = 0
        return self._forward(self._ids_BR, self._cache, last_B=self._last_B)


def pass_for(model: GPTModel, weights: Sequence[Tensor], count: int) -> Pass | None:
    """The pass over a prompt of so many tokens, made or kept; None if it would not pay.

    Args:
        model: of plain layers, on a GPU that `device_step.serves`.
        weights: all that `forward.weights_of` it.
    """
    cfg, weight = model.cfg, model.wte.weight
    room = min(max(LEAST_ROOM, 1 << (count - 1).bit_length()), cfg.context_length)
    size = 2 * cfg.n_layers * cfg.emb_dim * room * weight.itemsize
    if room > MOST_ROOM or size > MOST_BYTES:
        return None
    key = weight.dtype, [p.data_ptr() for p in weights]
    if model not in _kept or _kept[model][0] != key:
        _kept[model] = key, {}
    passes = _kept[model][1]
    if room not in passes:
        passes[room] = Pass(model, room)
    return passes[room]
