"""Logits after each of several texts that are written side by side, over one KV cache.

Owns how texts of different lengths share a batch: they end together, the shorter ones are padded in
front, positions are counted from each text's own beginning, and padding is another document, which
no token of the text sees. Equal lengths need neither, and are served by the fused kernels. Does not
own which token is drawn, or when a text ends.

Legend: B batch, T new positions, S positions so far, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from flashgpt.generation import device_step, prompt
from flashgpt.generation.cache import KVCache, Source, gather
from flashgpt.generation.forward import (
    Forward,
    OneDNNProduct,
    PackedProduct,
    Product,
    fastest,
    weights_of,
)
from flashgpt.model.gpt2 import GPTModel

Reason = Literal["eos", "stop", "length", "context"]


@dataclasses.dataclass(eq=False)
class Row:
    """A text that is being written.

    Attributes:
        window: the ids the next one is drawn after, at most context_length.
        limit: most tokens to draw.
        sample: which of its prompt's samples this is; picks its random numbers.
        ids: tokens drawn so far.
        held: how many ids of the window the cache holds.
        reason: why the text has ended; None while it goes on.
    """

    window: list[int]
    limit: int
    sample: int = 0
    ids: list[int] = dataclasses.field(default_factory=list)
    held: int = 0
    reason: Reason | None = None

    def push(self, token: int, context: int, past_context: Literal["stop", "slide"]) -> None:
        """Adds a token, and ends the text where nothing may follow it."""
        self.ids.append(token)
        if len(self.window) == context:
            if past_context == "stop":
                self.reason = "context"
            else:
                self.window, self.held = self.window[context - context // 2 :], 0
        self.window.append(token)
        if len(self.ids) == self.limit:
            self.reason = "length"


class Logits:
    """Logits after the windows of rows, of which each step may leave some out.

    Args:
        model: is used in eval mode; between calls it is in the mode it was in.
        use_cache: False computes every window whole, for comparison.

    Attributes:
        weights: the model's, if they are all that there is to it.
        is_on_gpu: whether that is so, on a GPU that can have its steps as CUDA graphs.
    """

    def __init__(self, model: GPTModel, *, use_cache: bool = True) -> None:
        self._model, self._use_cache = model, use_cache
        self.weights = weights_of(model) if use_cache else None
        self.is_on_gpu = self.weights is not None and device_step.serves(model.wte.weight)
        self._made: dict[type[Product], Forward] = {}
        self._rows: list[Row] = []
        self._cache: KVCache | None = None

    def cache_of(self, rows: Sequence[Row]) -> KVCache | None:
        """The cache, if it holds these rows in this order; what `adopt` takes back."""
        held = list(rows) == self._rows and all(row.held for row in rows)
        return self._cache if held else None

    def adopt(self, rows: list[Row], cache: KVCache) -> None:
        """Goes on from a cache that was extended elsewhere."""
        self._rows, self._cache = rows, cache

    @torch.inference_mode()
    def after(self, rows: Sequence[Row]) -> Tensor:
        """logits_BV in the order of `rows`, after the last token of each window."""
        was_training = self._model.training
        if was_training:
            self._model.eval()
        try:
            if not self._use_cache:
                ids, pads = _padded([row.window for row in rows])
                return self._forward(ids, pads, None, None)
            return self._over_cache(list(rows))
        finally:
            if was_training:
                self._model.train()

    def _over_cache(self, rows: list[Row]) -> Tensor:
        if (cache := self.cache_of(rows)) is not None:
            found_BV = self._step(rows, cache)
        else:
            found_BV = self._rearranged(rows)
        for row in rows:
            row.held = len(row.window)
        return found_BV

    def _rearranged(self, rows: list[Row]) -> Tensor:
        """One step of the rows that go on, the prefill of those that begin anew, in a new cache."""
        cfg, weight = self._model.cfg, self._model.wte.weight
        # The last token drawn is never written, and a window that is full begins anew.
        longest = max(len(row.window) + row.limit - len(row.ids) for row in rows)
        capacity = min(cfg.context_length, longest)
        logits: dict[Row, Tensor] = {}
        places: dict[Row, Source] = {}
        if going_on := [row for row in rows if row.held]:
            assert self._cache is not None, "rows that are held have a cache"
            old = {row: Source(self._cache, place) for place, row in enumerate(self._rows)}
            kept = gather([old[row] for row in going_on], capacity)
            for place, row in enumerate(going_on):
                places[row] = Source(kept, place)
            logits |= zip(going_on, self._step(going_on, kept), strict=True)
        self._cache = None
        if anew := [row for row in rows if not row.held]:
            # Samples of one prompt share its prefill.
            windows = list(dict.fromkeys(tuple(row.window) for row in anew))
            ids, pads = _padded(windows)
            size = (cfg, len(ids), weight.device, weight.dtype)
            made = KVCache(*size, pads=pads, capacity=capacity)
            logits_BV = self._prefill(ids, pads, made)
            for row in anew:
                place = windows.index(tuple(row.window))
                logits[row], places[row] = logits_BV[place], Source(made, place)
        first = places[rows[0]].cache
        as_they_are = [Source(first, place) for place in range(len(first.pads))]
        sources = [places[row] for row in rows]
        self._cache = first if sources == as_they_are else gather(sources, capacity)
        self._rows = rows
        return torch.stack([logits[row] for row in rows])

    def _prefill(self, ids: list[list[int]], pads: Sequence[int], cache: KVCache) -> Tensor:
        if self.is_on_gpu and len(ids) == 1 and self.weights is not None:
            one = prompt.pass_for(self._model, self.weights, len(ids[0]))
            if one is not None:
                return one(ids[0], cache)
        return self._forward(ids, pads, cache, self._faster(len(ids) * len(ids[0]), 1))

    def _step(self, rows: Sequence[Row], cache: KVCache) -> Tensor:
        left = max(row.limit - len(row.ids) for row in rows)
        fast = self._faster(len(rows), left)
        return self._forward([[row.window[-1]] for row in rows], cache.pads, cache, fast)

    def _faster(self, rows: int, steps: int) -> Forward | None:
        """The fast forward pass for so many steps of so many rows."""
        if self.weights is None:
            return None
        product = fastest(self._model, rows, steps)
        if product is OneDNNProduct and PackedProduct in self._made:
            product = PackedProduct
        if product not in self._made:
            self._made[product] = Forward(self._model, product)
        return self._made[product]

    def _forward(
        self,
        ids: list[list[int]],
        pads: Sequence[int],
        cache: KVCache | None,
        fast: Forward | None,
    ) -> Tensor:
        start, device = 0 if cache is None else cache.length, self._model.wte.weight.device
        ids_BT = torch.tensor(ids, device=device)
        documents_BS = positions_BT = None
        if any(pads):
            pad_B1 = torch.tensor(pads, device=device)[:, None]
            place_S = torch.arange(start + ids_BT.shape[1], device=device)
            documents_BS = (place_S >= pad_B1).to(torch.int32)
            positions_BT = (place_S[start:] - pad_B1).clamp(min=0)
        if fast is not None and cache is not None:
            return fast(ids_BT, cache, documents_BS, positions_BT)
        logits_B1V: Tensor = self._model(
            ids_BT,
            documents_BT=documents_BS,
            positions_BT=positions_BT,
            cache=cache,
            last_only=True,
        )
        return logits_B1V[:, -1]


def _padded(windows: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
    """Windows of one length, with id 0 in front of the shorter ones, and how many ids that is."""
    longest = max(map(len, windows))
    pads = [longest - len(window) for window in windows]
    ids = [[0] * pad + list(window) for pad, window in zip(pads, windows, strict=True)]
    return ids, pads
