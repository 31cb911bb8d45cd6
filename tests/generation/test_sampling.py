"""The drawn distribution against its definition in NumPy.

pytest tests/generation/test_sampling.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flashgpt.generation.sampling import sample
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
    generator = torch.Generator().manual_seed(1)
    return [sample(torch.tensor(logits), config, generator) for _ in range(DRAWS)]


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


def test_temperature_0_is_greedy_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert sample(torch.tensor(LOGITS), SampleConfig(temperature=0), generator) == 2
    assert torch.equal(generator.get_state(), before)


def test_a_tiny_temperature_is_greedy() -> None:
    assert set(_draws({"temperature": 1e-3})) == {2}


def test_equal_seeds_draw_equal_tokens() -> None:
    assert _draws({}) == _draws({})


def test_the_whole_vocabulary_is_reached_without_rules() -> None:
    assert set(_draws({}, np.zeros(10))) == set(range(10))
