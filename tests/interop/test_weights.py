"""The table of names covers the model, both ways. pytest tests/interop/test_weights.py"""

from __future__ import annotations

import pytest

from flashgpt.interop.weights import HUGGINGFACE, Row, rows
from flashgpt.model.gpt2 import GPTModel

CFG = dict(vocab_size=7, context_length=5, emb_dim=8, n_heads=2, n_layers=3, drop_rate=0.0)


def test_every_parameter_has_one_row() -> None:
    model = GPTModel({**CFG, "qkv_bias": True, "tie_weights": False})
    found = list(rows(HUGGINGFACE, 3))
    assert sorted(row.ours for row in found) == sorted(model.state_dict())
    assert len({row.theirs for row in found}) == len(found) == len({row.ours for row in found})


def test_exactly_the_matrices_of_the_blocks_are_transposed() -> None:
    model = GPTModel({**CFG, "qkv_bias": True})
    state = model.state_dict()
    for row in rows(HUGGINGFACE, 3):
        assert row.transposed == (row.ours.startswith("h.") and state[row.ours].dim() == 2)


@pytest.mark.parametrize("n_layers", [1, 12])
def test_layers_are_filled_in(n_layers: int) -> None:
    table = (Row("a", "b"), Row("h.{i}.x", "t.{i}.y", transposed=True))
    expected = [Row("h.%d.x" % i, "t.%d.y" % i, True) for i in range(n_layers)]  # noqa: UP031
    assert list(rows(table, n_layers)) == [Row("a", "b"), *expected]
