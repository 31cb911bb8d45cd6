"""Dropout masks: the law bit for bit, its statistics, and that kernels apply it and nothing else.

pytest tests/attention/test_dropout.py
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flashgpt.attention import dropout as dropout_module
from flashgpt.attention.attend import attend
from flashgpt.attention.dropout import (
    ATTENTION_OUTPUT,
    EMBEDDING,
    MLP_OUTPUT,
    Dropout,
    attention_keep,
    drop_elements,
    element_keep,
    fresh,
    philox,
)
from flashgpt.attention.heads import MultiHeadAttention

SITES = (EMBEDDING, ATTENTION_OUTPUT, MLP_OUTPUT)


def make(p: float = 0.1, seed: int = 1, first_row: int = 0, layer: int = 0) -> Dropout:
    return Dropout(p, torch.tensor(seed), torch.tensor(first_row), layer)


# counter, key, words: random123's kat_vectors (github.com/DEShawResearch/random123).
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
ONES = (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2
ZEROS = (0,) * 4, (0,) * 2
VECTORS = [
    (10, *ZEROS, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, *ONES, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, *PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    (7, *ZEROS, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, *ONES, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, *PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
]


def philox_int(counter: tuple[int, ...], key: tuple[int, ...], rounds: int) -> tuple[int, ...]:
    """Philox4x32 in Python's unbounded integers."""
    x, (k0, k1) = list(counter), key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        low = 0xFFFFFFFF
        x = [(p1 >> 32) ^ x[1] ^ k0, p1 & low, (p0 >> 32) ^ x[3] ^ k1, p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return tuple(x)


def signed(key: tuple[int, ...]) -> int:
    """Two key words as the signed 64-bit seed."""
    seed = key[1] << 32 | key[0]
    return seed - 2**64 if seed >= 2**63 else seed


@pytest.mark.parametrize(("rounds", "counter", "key", "words"), VECTORS)
def test_philox_known_answers(
    rounds: int,
    counter: tuple[int, ...],
    key: tuple[int, ...],
    words: tuple[int, ...],
    philox_numpy: Callable[..., Any],
) -> None:
    assert philox_int(counter, key, rounds) == words
    seed = signed(key)
    assert tuple(int(w) for w in philox_numpy(counter, seed, rounds)) == words
    if rounds == 7:
        found = philox(*(torch.tensor(c) for c in counter), torch.tensor(seed))
        assert tuple(int(w) for w in found) == words


words32 = st.integers(0, 2**32 - 1)
seeds = st.integers(-(2**63), 2**63 - 1)


@given(counter=st.tuples(*[words32] * 4), seed=seeds)
@settings(max_examples=100, deadline=None)
def test_philox_in_int64_is_philox_in_unbounded_integers(
    counter: tuple[int, ...], seed: int
) -> None:
    key = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    found = philox(*(torch.tensor(c) for c in counter), torch.tensor(seed))
    assert tuple(int(w) for w in found) == philox_int(counter, key, 7)


probabilities = st.one_of(
    st.sampled_from([0.0, 2.0**-32, 0.1, 0.5, 1 - 2.0**-32, 1 - 2.0**-53]),
    st.floats(0, 1, exclude_max=True),
)


@given(
    p=probabilities,
    seed=seeds,
    first_row=st.integers(0, 2**30),
    layer=st.integers(0, 100),
    sizes=st.tuples(*[st.integers(1, 4)] * 2, *[st.integers(1, 20)] * 2),
)
@settings(max_examples=100, deadline=None)
def test_masks_are_the_law_bit_for_bit(
    p: float,
    seed: int,
    first_row: int,
    layer: int,
    sizes: tuple[int, int, int, int],
    law: Callable[..., Any],
) -> None:
    batch, heads, queries, more = sizes
    exact, dropout = law(p, seed, first_row, layer), make(p, seed, first_row, layer)
    keep = attention_keep(dropout, batch, heads, queries, queries + more - 1)
    assert keep.dtype == torch.bool
    expected = exact.attention(batch, heads, queries, queries + more - 1)
    np.testing.assert_array_equal(keep.numpy(), expected)
    for site in SITES:
        found = element_keep(dropout, site, batch, more, queries, dim=17)
        np.testing.assert_array_equal(
            found.numpy(), exact.element(site, batch, more, queries, dim=17)
        )


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 0x5EED << 32])
def test_large_masks_are_the_law(seed: int, law: Callable[..., Any]) -> None:
    exact, dropout = law(0.1, seed, 1000, 11), make(0.1, seed, 1000, 11)
    expected = exact.attention(2, 3, 100, 300)
    np.testing.assert_array_equal(attention_keep(dropout, 2, 3, 100, 300).numpy(), expected)


def test_a_draw_equal_to_the_threshold_is_kept(philox_numpy: Callable[..., Any]) -> None:
    row, column = (philox_numpy((0, 0, 0, kind), 1) for kind in (0, 1))
    draw = ((int(row[0]) | 1) * int(column[0]) + int(row[1])) % 2**32
    for threshold in (draw, draw + 1):
        dropout = make(threshold / 2**32)
        assert dropout.threshold == threshold
        assert attention_keep(dropout, 1, 1, 1, 1).item() == (threshold == draw)


def test_masks_do_not_depend_on_how_the_work_is_cut() -> None:
    dropout = make(0.3, seed=5, first_row=6, layer=2)
    whole = attention_keep(dropout, 4, 3, 40, 40)
    assert torch.equal(attention_keep(dropout, 4, 3, 17, 17), whole[:, :, :17, :17])  # prefix
    assert torch.equal(attention_keep(dropout, 4, 3, 9, 40), whole[:, :, 31:])  # chunk
    later = make(0.3, seed=5, first_row=8, layer=2)  # rows 2, 3 as a batch of their own
    assert torch.equal(attention_keep(later, 2, 3, 40, 40), whole[2:])
    for site in SITES:
        whole = element_keep(dropout, site, 4, 0, 40, 16)
        assert torch.equal(element_keep(dropout, site, 4, 0, 17, 16), whole[:, :17])
        assert torch.equal(element_keep(dropout, site, 4, 31, 9, 16), whole[:, 31:])
        assert torch.equal(element_keep(dropout, site, 4, 0, 40, 5), whole[..., :5])
        assert torch.equal(element_keep(later, site, 2, 0, 40, 16), whole[2:])


def test_seed_layer_row_head_and_site_each_give_another_mask() -> None:
    base = dict(p=0.5, seed=5, first_row=6, layer=2)
    masks = [attention_keep(make(**base), 2, 2, 16, 16).flatten(0, 1)]
    masks += [
        attention_keep(make(**{**base, key: value}), 2, 2, 16, 16).flatten(0, 1)
        for key, value in (("seed", 6), ("seed", 5 + 2**32), ("layer", 3), ("first_row", 8))
    ]
    masks += [element_keep(make(**base), site, 4, 0, 16, 16) for site in SITES]
    every = torch.cat(masks).flatten(1)
    agreement = (every[:, None] == every[None]).double().mean(-1).fill_diagonal_(0.5)
    assert (agreement - 0.5).abs().max() < 5 * 0.5 / 16  # five sigma of 256 fair coins


# ---- statistics


def z_scores(dropout: Dropout, length: int = 512, heads: int = 4) -> dict[str, float]:
    """Deviations of a mask from independent coins, in standard deviations (kernels.md 4.2)."""
    keep = attention_keep(dropout, 1, heads, length, length)[0].double()
    p = dropout.threshold / 2**32
    variance = p * (1 - p)
    d = (1 - keep - p) / variance**0.5  # unit variance if kept by independent coins
    rows, columns = d[0] @ d[0].T / length**0.5, d[0].T @ d[0] / length**0.5
    above = torch.triu_indices(length, length, 1).unbind()

    def z(product: Tensor) -> float:
        return float(product.sum().abs() / product.numel() ** 0.5)

    found = {
        "rate": z(d),
        "heads": z(d[0] * d[1]),
        "triples": z(d[0, :, :-2] * d[0, :, 1:-1] * d[0, :, 2:]),
    }
    generator = torch.Generator().manual_seed(0)
    a, b, i, j, k = torch.randint(length, (5, 500_000), generator=generator)
    apart = (a != b) & (i != j) & (j != k) & (i != k)
    a, b, i, j, k = (x[apart] for x in (a, b, i, j, k))
    found["any three of a row"] = z(d[0, a, i] * d[0, a, j] * d[0, a, k])
    found["any three of a column"] = z(d[0, i, a] * d[0, j, a] * d[0, k, a])
    found["four corners"] = z(d[0, a, i] * d[0, a, j] * d[0, b, i] * d[0, b, j])
    for lag in (1, 2, 4, 8, 16, 32, 64, 128):
        found[f"lag {lag} along a row"] = z(d[0, :, :-lag] * d[0, :, lag:])
        found[f"lag {lag} along a column"] = z(d[0, :-lag] * d[0, lag:])
    for name, pairs in (("row", rows[above]), ("column", columns[above])):
        # The spread of n pair correlations is 1 within about 1 / sqrt(2 n); ten of that.
        found[f"{name} pairs"] = float((pairs.std() - 1).abs()) * (2 * len(pairs)) ** 0.5 / 2
        found[f"largest {name} pair"] = float(pairs.abs().max()) - 2  # of 130,000: about 4.6
    for name, dim in (("row", 2), ("column", 1)):
        sums = d.sum(dim).flatten() / length**0.5
        found[f"{name} sums"] = float((sums.var() - 1).abs()) * (len(sums) / 2) ** 0.5
    return found


@pytest.mark.parametrize("p", [0.0625, 0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 1, -12345])
def test_masks_look_like_independent_coins(p: float, seed: int) -> None:
    scores = z_scores(make(p, seed))
    assert max(scores.values()) < 5, scores


@pytest.mark.parametrize("weak", ["raw columns", "no product"])
def test_the_statistics_tell_weak_masks_apart(weak: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """a j + b, and b + c, the cheaper forms that kernels.md 4.2 rejects."""
    keys = dropout_module.attention_keys

    def raw_columns(*call: Any) -> dropout_module.Keys:
        found = keys(*call)
        return found._replace(c_S=torch.arange(len(found.c_S), dtype=torch.int32))

    if weak == "raw columns":
        monkeypatch.setattr(dropout_module, "attention_keys", raw_columns)
    else:
        monkeypatch.setattr(
            dropout_module, "keep_bits", lambda a, b, c, threshold: b + c >= threshold - 2**31
        )
    assert max(z_scores(make(0.1, 0)).values()) > 20


# ---- scale, and elementwise dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 1 / 3, 0.9])
def test_scale_is_one_over_the_exact_kept_probability(p: float) -> None:
    dropout = make(p)
    kept = 1 - Fraction(int(p * 2**32), 2**32)
    assert dropout.scale == float(1 / kept)
    assert abs(1 - dropout.threshold / 2**32 - (1 - p)) < 2**-32


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_p_outside_zero_to_one_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"dropout p must be in \[0, 1\), got"):
        make(p)


def test_elements_are_zeroed_or_scaled(law: Callable[..., Any]) -> None:
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    dropout = make(0.4, seed=3, first_row=2, layer=1)
    keep = torch.from_numpy(law(0.4, 3, 2, 1).element(MLP_OUTPUT, 2, 5, 7, 12))
    out = drop_elements(x, dropout, MLP_OUTPUT, start=5)
    assert torch.equal(out, torch.where(keep, x * dropout.scale, 0.0))
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(dx, keep.double() * dropout.scale)
    assert drop_elements(x, None, EMBEDDING) is x
    assert drop_elements(x, make(0.0), EMBEDDING) is x


# ---- what the kernels apply


@pytest.mark.parametrize("kernel", ["standard", "blocked"])
@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (7, 40), (1, 40), (200, 200)])
def test_kernels_apply_the_law_forward_and_backward(
    kernel: str, queries: int, keys: int, law: Callable[..., Any]
) -> None:
    """q = k = 0 weighs the s + 1 visible keys alike, so that each weight shows in the output."""
    batch, heads = 2, 2
    exact, dropout = law(0.3, -9, 4, 3), make(0.3, -9, 4, 3)
    visible = np.tri(queries, keys, keys - queries, dtype=bool)
    keep = exact.attention(batch, heads, queries, keys) & visible
    expected = torch.from_numpy(keep * dropout.scale / visible.sum(-1, keepdims=True))
    q = torch.zeros(batch, heads, queries, keys, dtype=torch.float64)
    k = torch.zeros(batch, heads, keys, keys, dtype=torch.float64)
    v = torch.eye(keys, dtype=torch.float64).expand_as(k)
    out = attend(q, k, v, use_flash=kernel != "standard", kernel=kernel, dropout=dropout)
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=0)
    assert torch.equal(out > 0, torch.from_numpy(keep))

    q, k = q[..., :queries], k[..., :queries]
    v = torch.zeros(batch, heads, keys, queries, dtype=torch.float64, requires_grad=True)
    out = attend(q, k, v, use_flash=kernel != "standard", kernel=kernel, dropout=dropout)
    dout = torch.eye(queries, dtype=torch.float64).expand_as(out)
    (dv,) = torch.autograd.grad(out, v, dout)
    torch.testing.assert_close(dv.mT, expected, rtol=1e-14, atol=0)
    assert torch.equal(dv.mT > 0, torch.from_numpy(keep))


def heads_of(use_flash: bool, dropout: float = 0.3) -> MultiHeadAttention:
    torch.manual_seed(0)
    module = MultiHeadAttention(12, 12, 32, dropout, 3, use_flash=use_flash)
    return module.double()


def test_equal_manual_seed_gives_equal_masks_with_the_switch_on_and_off() -> None:
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    flash, standard = heads_of(True), heads_of(False)
    outputs = []
    for module, seed in ((flash, 1), (standard, 1), (flash, 1), (flash, 2)):
        torch.manual_seed(seed)
        outputs.append(module(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-13)
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[3])
    assert not torch.allclose(flash(x), flash(x))  # each call draws anew


def test_eval_and_p_zero_draw_nothing() -> None:
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    for module in (heads_of(True).eval(), heads_of(False).eval(), heads_of(True, dropout=0.0)):
        before = torch.get_rng_state()
        first, second = module(x), module(x)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first, second)
    module = heads_of(True)
    before = torch.get_rng_state()
    module(x)
    assert not torch.equal(torch.get_rng_state(), before)


def test_fresh_draws_64_bit_seeds_from_the_default_generator() -> None:
    like = torch.zeros(1)
    torch.manual_seed(3)
    drawn = [fresh(0.1, like) for _ in range(200)]
    torch.manual_seed(3)
    assert int(fresh(0.1, like).seed) == int(drawn[0].seed)
    found = [int(d.seed) for d in drawn]
    assert len(set(found)) == 200
    assert min(found) < -(2**62) and max(found) > 2**62
    assert {int(d.first_row) for d in drawn} == {0}
    assert {d.seed.dtype for d in drawn} == {torch.int64}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("use_flash", [True, False])
def test_fresh_under_checkpoint_repeats_its_mask(use_flash: bool, reentrant: bool) -> None:
    module = heads_of(use_flash)
    x = torch.randn(2, 20, 12, dtype=torch.float64)

    def gradient(checkpointed: bool, preserve: bool = True) -> Tensor:
        torch.manual_seed(4)
        leaf = x.clone().requires_grad_()
        if checkpointed:
            out = checkpoint(module, leaf, use_reentrant=reentrant, preserve_rng_state=preserve)
        else:
            out = module(leaf)
        out.square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    assert torch.equal(gradient(True), gradient(False))
    assert not torch.equal(gradient(True, preserve=False), gradient(False))


def test_eager_and_compiled_draw_the_same() -> None:
    """Given seeds and fresh ones, in one graph without breaks.

    Many seeds and odd sizes: C++ leaves integer overflow undefined, and a compiled Philox that
    overflows was wrong for four seeds of ten, in scalar code only.
    """

    def masks(seed: Tensor, first_row: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        given = Dropout(0.1, seed, first_row, 3)
        masked = drop_elements(x, given, MLP_OUTPUT, 4)
        return attention_keep(given, 2, 2, 20, 33), masked, fresh(0.1, x).seed

    x = torch.randn(2, 20, 19)
    drawn = torch.randint(-(2**63), 2**63 - 1, (40,), generator=torch.Generator().manual_seed(0))
    with torch._inductor.config.patch(compile_threads=1):
        compiled = torch.compile(masks, fullgraph=True)
        for seed in [0, -1, -(2**63), 2**63 - 1, *drawn.tolist()]:
            arguments = torch.tensor(seed), torch.tensor(2**20), x
            torch.manual_seed(8)
            eager = masks(*arguments)
            torch.manual_seed(8)
            for got, wanted in zip(compiled(*arguments), eager, strict=True):
                assert torch.equal(got, wanted), seed
