"""Multi-head attention: projections, heads, the switch. pytest tests/attention/test_heads.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgpt.attention import kernels
from flashgpt.attention.dropout import Dropout
from flashgpt.attention.heads import MultiHeadAttention


def make(use_flash: bool = True, **changes: Any) -> MultiHeadAttention:
    torch.manual_seed(0)
    sizes = dict(d_in=10, d_out=12, context_length=16, dropout=0.0, num_heads=3)
    return MultiHeadAttention(**{**sizes, **changes}, use_flash=use_flash).double()


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("use_flash", [False, True])
def test_forward_is_the_definition(
    use_flash: bool, qkv_bias: bool, oracle: Callable[..., Any]
) -> None:
    """Features of c_attn: queries, keys, values; in each, head after head."""
    module = make(use_flash, qkv_bias=qkv_bias)
    x = torch.randn(2, 9, 10, dtype=torch.float64)
    weight, bias = module.c_attn.weight, module.c_attn.bias
    assert weight.shape == (36, 10)
    assert (bias is not None) == qkv_bias
    parts: list[Tensor] = []
    for first in (0, 12, 24):
        heads = []
        for n in range(3):
            rows = slice(first + 4 * n, first + 4 * n + 4)
            head = x @ weight[rows].T
            heads.append(head if bias is None else head + bias[rows])
        parts.append(torch.stack(heads, dim=1))
    exact = torch.from_numpy(oracle(*parts, parts[0]).results["out"])
    together = torch.cat([exact[:, n] for n in range(3)], dim=-1)
    wanted = together @ module.c_proj.weight.T + module.c_proj.bias
    torch.testing.assert_close(module(x), wanted, rtol=0, atol=1e-14)


def test_the_mask_exists_for_standard_only_and_is_never_saved() -> None:
    flash, standard = make(True), make(False)
    assert dict(flash.named_buffers()) == {}
    assert list(dict(standard.named_buffers())) == ["mask"]
    assert torch.equal(standard.mask, torch.ones(16, 16).tril().bool())
    names = ["c_attn.weight", "c_proj.weight", "c_proj.bias"]
    assert list(flash.state_dict()) == list(standard.state_dict()) == names
    standard.load_state_dict(flash.state_dict())


def test_the_switch_moves_on_a_built_module() -> None:
    module = make(False)
    x = torch.randn(2, 16, 10, dtype=torch.float64)
    kernels.clear_receipt()
    before = module(x)
    module.set_attention(use_flash=True)
    assert dict(module.named_buffers()) == {}
    after = module(x)
    module.set_attention(kernel="blocked")
    assert module.use_flash
    module.set_attention(deterministic=True)
    assert module.kernel == "blocked"  # what is left out stays
    pinned = module(x)
    module.set_attention(kernel=None)
    assert module.kernel is None
    names = [line.split()[0] for line in kernels.receipt()]
    assert names == ["standard", "sdpa:cpu", "blocked"]
    for found in (after, pinned):
        torch.testing.assert_close(found, before, rtol=0, atol=1e-14)
    module.set_attention(use_flash=False, deterministic=True)
    assert module.mask.shape == (16, 16)
    module.set_attention()
    assert module.deterministic and not module.use_flash


def test_standard_uses_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(False)
    x = torch.randn(1, 9, 10, dtype=torch.float64)
    before = module(x)
    module.mask.fill_(True)
    assert not torch.allclose(module(x), before)


def test_a_pin_that_cannot_be_is_refused_at_once_and_changes_nothing() -> None:
    module = make()
    with pytest.raises(ValueError, match="kernel must be 'standard' with use_flash=False"):
        module.set_attention(use_flash=False, kernel="blocked")
    with pytest.raises(ValueError, match=r"kernel must be one of standard, .*, got 'fa5'"):
        module.set_attention(kernel="fa5", deterministic=True)
    assert module.use_flash and module.kernel is None and not module.deterministic


@pytest.mark.parametrize("use_flash", [True, False])
def test_own_masks_are_pytorchs_and_follow_its_generator(use_flash: bool) -> None:
    module = make(use_flash, dropout=0.5).train()
    module.set_attention(own_masks=True)
    x = torch.randn(2, 16, 10, dtype=torch.float64)
    seed = torch.zeros((), dtype=torch.int64)
    kernels.clear_receipt()

    def call(seed_of_torch: int) -> Tensor:
        torch.manual_seed(seed_of_torch)
        return module(x, Dropout(0.5, seed, seed))

    assert torch.equal(call(1), call(1))
    assert not torch.equal(call(1), call(2))
    (line,) = kernels.receipt()
    assert line.startswith("standard served") and "dropout, own masks" in line
    if use_flash:
        assert "not sdpa:cpu: has no dropout; not blocked: drops by the shared masks only" in line
    module.set_attention(own_masks=False)
    assert torch.equal(call(1), call(2))


class Growing:
    """The simplest cache: concatenates."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k = k if self.k is None else torch.cat((self.k, k), dim=2)
        self.v = v if self.v is None else torch.cat((self.v, v), dim=2)
        return self.k, self.v


@pytest.mark.parametrize("use_flash", [False, True])
def test_a_cache_gives_the_rows_of_the_whole_sequence(use_flash: bool) -> None:
    module = make(use_flash)
    x = torch.randn(2, 16, 10, dtype=torch.float64)
    cache = Growing()
    parts = [module(part, cache=cache) for part in x.split([5, 1, 7, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), module(x), rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="at most context_length 16 tokens, got 17"):
        module(x[:, :1], cache=cache)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"d_out must be divisible by num_heads.*12.*5"):
        make(num_heads=5)
    with pytest.raises(ValueError, match="num_heads must be at least 1, got 0"):
        make(num_heads=0)
    for dropout in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\)"):
            make(dropout=dropout)
    with pytest.raises(ValueError, match="at most context_length 16 tokens, got 17"):
        make()(torch.randn(1, 17, 10, dtype=torch.float64))


@pytest.mark.parametrize("use_flash", [True, False])
def test_an_empty_batch_stays_empty(use_flash: bool) -> None:
    x = torch.randn(0, 7, 10, dtype=torch.float64)
    assert make(use_flash, dropout=0.1)(x).shape == (0, 7, 12)


def test_repr_says_how_it_is_set() -> None:
    assert "num_heads=3, dropout=0.0, use_flash=False" in repr(make(False))
