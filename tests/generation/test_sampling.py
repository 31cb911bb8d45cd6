"""The drawn distribution against its definition in NumPy.

pytest tests/generation/test_sampling.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flashgpt.attention.dropout import philox
from flashgpt.generation import sampling
from flashgpt.generation.sampling import logprobs, sample, uniforms
from flashgpt.runconfig import SampleConfig

LOGITS = np.array([1.0, -2.0, 3.0, 0.5, 2.5, -1.0, 2.9, 0.0, 1.5, -30.0])
DRAWS = 2000


def reference(
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float | None = None,
    min_p: float | None = None,
) -> NDArray[np.float64]:
    """Probability of each token, by the definition, in float64."""
    scaled = LOGITS / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    alive = set(range(len(p)))
    likeliest = sorted(alive, key=lambda token: -p[token])
    if top_k:
        alive &= set(likeliest[:top_k])
    if top_p is not None:
        kept, total = set(), sum(p[token] for token in alive)
        mass = 0.0
        for token in [token for token in likeliest if token in alive]:
            kept.add(token)
            mass += p[token] / total
            if mass >= top_p:
                break
        alive = kept
    if min_p is not None:
        alive = {token for token in alive if p[token] >= min_p * p.max()}
    p[[token for token in range(len(p)) if token not in alive]] = 0
    return p / p.sum()


def _draws(change: dict[str, Any], logits: NDArray[np.float64] = LOGITS) -> list[int]:
    config = SampleConfig(**{"temperature": 1.0, "top_k": 0, **change})
    number = torch.tensor(uniforms(1, 0, DRAWS), dtype=torch.float64)
    found: list[int] = sample(torch.tensor(logits).expand(DRAWS, -1), config, number).tolist()
    return found


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 1000},
    {"top_p": 0.3},
    {"top_p": 0.75},
    {"top_p": 1e-9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 2.0, "top_k": 6, "top_p": 0.9},
]


@pytest.mark.parametrize("change", CASES, ids=str)
def test_draws_follow_the_definition(change: dict[str, Any]) -> None:
    """Never outside the support; inside, chi-square within 4 standard deviations of its mean."""
    expected = reference(**change) * DRAWS
    counts = np.bincount(_draws(change), minlength=len(LOGITS))
    assert not counts[expected == 0].any()
    often = expected >= 5
    assert counts[often].all()
    freedom = often.sum() - 1
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert chi2 <= freedom + 4 * np.sqrt(2 * max(freedom, 1))


@pytest.mark.parametrize("change", CASES[1:], ids=str)
def test_that_comparison_tells_the_rules_apart(change: dict[str, Any]) -> None:
    """Draws without the rule fail it, except where the rule leaves everything as it is."""
    if change == {"top_k": 1000}:
        assert np.array_equal(reference(**change), reference())
        return
    expected = reference(**change) * DRAWS
    counts = np.bincount(_draws({}), minlength=len(LOGITS))
    often = expected >= 5
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum()
    outside = counts[expected == 0].any()
    assert outside or chi2 > often.sum() + 4 * np.sqrt(2 * often.sum())


@pytest.mark.parametrize("change", CASES, ids=str)
def test_a_row_is_drawn_as_it_would_be_alone(change: dict[str, Any]) -> None:
    config = SampleConfig(**{"temperature": 1.0, "top_k": 0, **change})
    torch.manual_seed(0)
    logits_BV = torch.randn(7, 300) * 3
    number = torch.tensor(uniforms(3, 1, 7), dtype=torch.float64)
    together = sample(logits_BV, config, number)
    alone = [sample(logits_BV[i : i + 1], config, number[i : i + 1]) for i in range(7)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("change", [{}, {"top_k": 4}, {"top_p": 0.9}], ids=str)
def test_tokens_lie_side_by_side_in_the_order_of_their_ids(change: dict[str, Any]) -> None:
    """The place of u in the cumulated probabilities, at and around every border."""
    config = SampleConfig(**{"temperature": 1.0, "top_k": 0, **change})
    ends = reference(**change).cumsum()
    for token in np.flatnonzero(np.diff(ends, prepend=0) > 1e-5):
        low, high = (ends[token - 1] if token else 0.0), ends[token]
        for u in (low + 1e-6, (low + high) / 2, high - 1e-6):
            one = torch.tensor([u], dtype=torch.float64)
            assert sample(torch.tensor(LOGITS)[None], config, one).tolist() == [token]


@pytest.mark.parametrize("change", CASES, ids=str)
def test_the_ends_of_the_interval_draw_a_token_that_is_left(change: dict[str, Any]) -> None:
    left = np.flatnonzero(reference(**change))
    config = SampleConfig(**{"temperature": 1.0, "top_k": 0, **change})
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    found = sample(torch.tensor(LOGITS).expand(2, -1), config, ends).tolist()
    assert found[0] == left[0] and found[1] in left


def test_numbers_are_uniform_and_of_one_sample_and_seed() -> None:
    found = uniforms(5, 2, 4000)
    assert uniforms(5, 2, 100) == found[:100]  # however long the text may become
    others = [uniforms(5, 3, 4000), uniforms(6, 2, 4000), uniforms(5 + 2**40, 2, 4000)]
    for other in others:
        assert abs(np.corrcoef(found, other)[0, 1]) < 0.06
    assert all(0 <= u < 1 for u in found) and len(set(found)) == 4000
    counts = np.histogram(found, 20, (0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 19 + 4 * np.sqrt(38)
    words = [int(word) for word in philox(7, 2, 0, 0x64726177, torch.tensor(5))]
    assert found[7] == ((words[0] << 21) + (words[1] >> 11)) / 2**53


def test_log_probabilities_are_those_of_the_whole_distribution() -> None:
    logits = torch.tensor(np.stack([LOGITS, LOGITS[::-1]]))
    expected = np.log(reference())
    found = logprobs(logits, torch.tensor([1, 8]), 3)
    assert [drawn.id for drawn in found] == [1, 8]
    for drawn in found:
        assert drawn.logprob == pytest.approx(expected[1], rel=1e-6)
    assert [token for token, _ in found[0].top] == [2, 6, 4]
    assert [token for token, _ in found[1].top] == [7, 3, 5]
    for drawn in found:
        assert [value for _, value in drawn.top] == pytest.approx(expected[[2, 6, 4]], rel=1e-6)
    assert logprobs(logits, torch.tensor([0, 0]), 0)[0].top == ()


@pytest.mark.parametrize("few", [1, 3, 1024])
@pytest.mark.parametrize("change", [case for case in CASES if "top_p" in case], ids=str)
def test_however_many_are_looked_at_first_for_top_p(
    change: dict[str, Any], few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _draws(change)
    monkeypatch.setattr(sampling, "FEW", few)
    assert _draws(change) == expected


@pytest.mark.parametrize("change", [{"top_k": 2}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}])
def test_what_is_as_likely_as_the_last_that_is_kept_is_kept(change: dict[str, Any]) -> None:
    """Ties are common in bf16; which of them comes first is nobody's choice."""
    assert set(_draws(change, np.array([0.0, 2.0, 1.0, 1.0, 1.0, -9.0]))) >= {1}
    tied = np.array([0.0, 2.0, 2.0, 2.0, -9.0])
    assert set(_draws(change, tied)) == {1, 2, 3}


def test_temperature_0_is_greedy() -> None:
    for u in (0.0, 0.5, 0.999):
        number = torch.full((2,), u, dtype=torch.float64)
        logits = torch.tensor(np.stack([LOGITS, LOGITS[::-1]]))
        assert sample(logits, SampleConfig(temperature=0), number).tolist() == [2, 7]


def test_a_tiny_temperature_is_greedy() -> None:
    assert set(_draws({"temperature": 1e-3})) == {2}


def test_equal_seeds_draw_equal_tokens() -> None:
    assert _draws({}) == _draws({})


def test_the_whole_vocabulary_is_reached_without_rules() -> None:
    assert set(_draws({}, np.zeros(10))) == set(range(10))
