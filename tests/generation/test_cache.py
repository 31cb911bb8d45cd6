"""The cache holds what was written, as views of one allocation.

pytest tests/generation/test_cache.py
"""

from __future__ import annotations

import torch

from flashgpt.config import GPTConfig
from flashgpt.generation.cache import KVCache, Source, gather
from flashgpt.model.gpt2 import GPTModel

CFG = GPTConfig(11, 6, 8, 2, 3, 0.0)


def _new(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 2, count, 4), torch.randn(1, 2, count, 4)


def test_positions_come_back_in_order_and_by_layer() -> None:
    cache = KVCache(CFG, 1, torch.device("cpu"), torch.float32)
    memory = cache.k_LBNSH.data_ptr()
    parts = []
    for count in (3, 1, 2):
        new = [_new(count) for _ in range(CFG.n_layers)]
        parts.append(new)
        for layer in range(CFG.n_layers):
            k, v = cache.layer(layer).extend(*new[layer])
            assert torch.equal(k, torch.cat([part[layer][0] for part in parts], 2))
            assert torch.equal(v, torch.cat([part[layer][1] for part in parts], 2))
            assert k.untyped_storage().data_ptr() == memory  # a view, no copy
        cache.advance(count)
    assert cache.length == CFG.context_length and cache.k_LBNSH.data_ptr() == memory


def test_it_has_the_models_size_and_dtype() -> None:
    cache = KVCache(CFG, 2, torch.device("cpu"), torch.float64)
    assert cache.k_LBNSH.shape == cache.v_LBNSH.shape == (3, 2, 2, 6, 4)
    assert cache.k_LBNSH.dtype == cache.v_LBNSH.dtype == torch.float64


def test_logits_over_the_cache_are_those_without_it_in_any_chunks() -> None:
    """In float64, to 1e-12; unit-scale logits."""
    torch.manual_seed(0)
    model = GPTModel(CFG).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
        ids = torch.randint(11, (2, 6))
        whole = model(ids)
        for chunks in ((6,), (1,) * 6, (2, 3, 1), (4, 2)):
            cache = KVCache(CFG, 2, torch.device("cpu"), torch.float64)
            parts = [model(part, cache=cache) for part in ids.split(list(chunks), 1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=1e-12)
    assert whole.abs().max() > 0.5


def test_gathered_rows_end_together_and_hold_their_own_positions() -> None:
    caches = []
    for count, pads in ((4, (0, 2)), (2, (0,))):
        cache = KVCache(CFG, len(pads), torch.device("cpu"), torch.float32, pads=pads)
        for layer in range(CFG.n_layers):
            k, v = torch.randn(2, len(pads), 2, count, 4)
            cache.layer(layer).extend(k, v)
        cache.advance(count)
        caches.append(cache)
    first, second = caches
    sources = [Source(second, 0), Source(first, 1), Source(second, 0)]
    shorter = gather(sources, 5)
    assert (shorter.length, shorter.pads) == (2, (0, 0, 0))  # no longer than its longest text
    mixed = gather([*sources, Source(first, 0)], 5)
    assert (mixed.length, mixed.pads, mixed.k_LBNSH.shape[3]) == (4, (2, 2, 2, 0), 5)
    for name in ("k_LBNSH", "v_LBNSH"):
        new, one, two = (getattr(cache, name) for cache in (mixed, first, second))
        assert torch.equal(new[:, 0, :, 2:4], two[:, 0, :, :2])
        assert torch.equal(new[:, 1, :, 2:4], one[:, 1, :, 2:4])
        assert torch.equal(new[:, 3, :, :4], one[:, 0, :, :4])
        assert not new[:, :3, :, :2].any()  # no NaN of fresh memory, which a mask cannot silence
