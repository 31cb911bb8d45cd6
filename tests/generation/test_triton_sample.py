"""The draw in one kernel: the tokens of `sampling.sample`.

Without a GPU in Triton's interpreter. pytest tests/generation/test_triton_sample.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashgpt.generation.sampling import sample
from flashgpt.runconfig import SampleConfig

pytest.importorskip("triton")

from flashgpt.generation import triton_sample
from flashgpt.generation.triton_step import State

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 4  # of a tile of the vocabulary
DRAWS = 24 if torch.cuda.is_available() else 5  # the interpreter is slow


def tokens(logits_BV: Tensor, uniform_BS: Tensor, config: SampleConfig) -> list[list[int]]:
    """What is drawn with each number."""
    texts, vocab = logits_BV.shape
    padded = torch.full((texts, -(-vocab // ROWS) * ROWS), -torch.inf, device=DEVICE)
    padded[:, :vocab] = logits_BV
    best_BP = padded.view(texts, -1, ROWS).amax(-1)
    best_BP2 = torch.stack([best_BP, torch.zeros_like(best_BP)], -1)
    zeros = torch.zeros(texts, dtype=torch.int32, device=DEVICE)
    found = []
    for step in range(uniform_BS.shape[1]):
        ids_B = torch.full((texts,), -1, dtype=torch.int64, device=DEVICE)
        now = State(ids_B, zeros, zeros, zeros + step, ids_B[None])
        triton_sample.draw(logits_BV, best_BP2, now, uniform_BS, config)
        found.append(now.id_B.tolist())
    return found


@pytest.mark.parametrize(
    ("vocab", "changes"),
    [
        (203, {"top_k": 5}),
        (203, {"top_k": 0}),
        (203, {"top_k": 0, "top_p": 0.7}),
        (203, {"top_k": 12, "top_p": 0.9, "temperature": 0.7}),
        (203, {"top_k": 30, "top_p": 0.9, "min_p": 0.2}),
        (7, {"top_k": 3}),
        (1, {"top_k": 5}),
    ],
    ids=str,
)
def test_tokens_are_those_of_sample(
    vocab: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_sample, "ALL", 64)  # several looks at the vocabulary
    config = SampleConfig(**changes)
    generator = torch.Generator().manual_seed(vocab)
    logits_BV = torch.randn(2, vocab, generator=generator).to(DEVICE)
    uniform_BS = torch.rand(2, DRAWS, generator=generator, dtype=torch.float64)
    uniform_BS[:, 0], uniform_BS[:, 1] = 0.0, 1 - 2.0**-53
    uniform_BS = uniform_BS.to(DEVICE)
    expected = [sample(logits_BV, config, uniform_B).tolist() for uniform_B in uniform_BS.T]
    assert tokens(logits_BV, uniform_BS, config) == expected
    assert vocab == 1 or len({row[0] for row in expected}) > 1


@pytest.mark.parametrize("top_k", [0, 3])
def test_tokens_as_likely_as_the_last_are_kept(top_k: int) -> None:
    """Also where they stand in more tiles than there is room for."""
    logits_BV = torch.zeros(1, 101, device=DEVICE)
    logits_BV[0, 40:42] = 1.0
    numbers = torch.tensor([[0.0, 0.31, 0.42, 0.97]], dtype=torch.float64, device=DEVICE)
    config = SampleConfig(top_k=top_k)
    expected = [sample(logits_BV, config, u).tolist() for u in numbers.T]
    assert tokens(logits_BV, numbers, config) == expected
    assert len({row[0] for row in expected}) == 4


def test_limits_that_matter_are_seen() -> None:
    """The comparison fails if a limit is left out."""
    logits_BV = torch.randn(1, 203, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    numbers = torch.tensor([[0.1, 0.6]], dtype=torch.float64, device=DEVICE)
    whole = tokens(logits_BV, numbers, SampleConfig(top_k=0))
    for changes in ({"top_k": 5}, {"top_k": 0, "top_p": 0.3}, {"top_k": 0, "min_p": 0.5}):
        assert tokens(logits_BV, numbers, SampleConfig(**changes)) != whole
