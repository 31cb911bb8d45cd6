"""The keys of the dropout law by Triton's Philox, in the interpreter without a GPU.

pytest tests/attention/test_triton_keys.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("triton")

from flashgpt.attention import triton_keys

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = [0, -1, -(2**63), 2**63 - 1]
Words = Callable[..., list[NDArray[np.uint64]]]


def check(
    words: Words,
    seed: int,
    first_row: int,
    layer: int,
    site: int,
    sizes: tuple[int, int, int, int, int],
) -> None:
    """All three tables, bit for bit, from the definition."""
    batch, heads, start, rows, columns = sizes
    given_words = (torch.tensor(x, device=DEVICE) for x in (seed, first_row))
    found = triton_keys.keys(*given_words, layer, site, *sizes)
    row = first_row + np.arange(batch)[:, None, None]
    position = np.arange(start, start + rows)
    bh = row * heads + np.arange(heads)[:, None]
    word = words((position, bh, layer, site), seed)
    column = words((np.arange(columns), 0, layer, site + 1), seed)
    wanted = (word[0] | np.uint64(1), word[1] ^ np.uint64(2**31), column[0])
    shapes = ((batch, heads, rows), (batch, heads, rows), (columns,))
    for got, exact, shape in zip(found, wanted, shapes, strict=True):
        assert got.dtype == torch.int32 and tuple(got.shape) == shape
        signed = np.broadcast_to(exact, shape).astype(np.uint32).view(np.int32)
        assert np.array_equal(got.cpu().numpy(), signed)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.sampled_from(SEEDS) | st.integers(-(2**63), 2**63 - 1),
    first_row=st.integers(0, 2**40),
    layer=st.integers(0, 200),
    site=st.sampled_from([0, 2, 4, 6]),
    sizes=st.tuples(
        st.integers(1, 5),
        st.integers(1, 5),
        st.integers(0, 2**20),
        st.integers(1, 65),
        st.integers(1, 130),
    ),
)
def test_keys_are_those_of_the_law(
    philox_numpy: Words,
    seed: int,
    first_row: int,
    layer: int,
    site: int,
    sizes: tuple[int, int, int, int, int],
) -> None:
    check(philox_numpy, seed, first_row, layer, site, sizes)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 0, triton_keys.BLOCK - 1, 1),
        (1, 1, 0, triton_keys.BLOCK, 1),
        (3, 5, 7, 129, triton_keys.BLOCK + 3),
    ],
    ids=str,
)
def test_rows_and_columns_may_end_anywhere_in_a_block(
    sizes: tuple[int, int, int, int, int], seed: int, philox_numpy: Words
) -> None:
    check(philox_numpy, seed, 2**33 + 5, 11, 0, sizes)


def test_masks_are_those_of_the_law(law: Callable[..., Any]) -> None:
    for seed in SEEDS:
        mask = law(0.1, seed, 2**40 - 1, 3)
        draw = mask.dropout
        given_words = (x.to(DEVICE) for x in (draw.seed, draw.first_row))
        a, b, c = triton_keys.keys(*given_words, draw.layer, 0, 2, 3, 30, 35, 65)
        kept = a[..., None] * c + b[..., None] >= draw.threshold - 2**31
        assert torch.equal(kept.cpu(), torch.from_numpy(mask.attention(2, 3, 35, 65)))


@pytest.mark.parametrize("change", ["seed", "first_row", "layer", "site", "start", "rounds"])
def test_the_definition_tells_faults_apart(change: str, philox_numpy: Words) -> None:
    def wrong(counter: Any, seed: int, rounds: int = 7) -> list[NDArray[np.uint64]]:
        position, bh, layer, site = counter
        return philox_numpy(
            (
                position + (change == "start"),
                bh + (change == "first_row"),
                layer + (change == "layer"),
                site + 2 * (change == "site"),
            ),
            seed + (change == "seed"),
            rounds + (change == "rounds"),
        )

    with pytest.raises(AssertionError):
        check(wrong, 5, 1, 2, 0, (1, 2, 3, 4, 5))


def test_the_end_of_the_tables_is_not_written_past() -> None:
    made: list[torch.Tensor] = []

    def roomy(*shape: int, **options: Any) -> torch.Tensor:
        made.append(torch.full((math.prod(shape) + 2048,), 99, **options))
        return made[-1][: math.prod(shape)].view(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", roomy)
        patch.setattr(torch, "empty_like", lambda x: roomy(*x.shape, dtype=x.dtype, device=DEVICE))
        seed, row = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        found = triton_keys.keys(seed, row, 0, 0, 2, 3, 0, 7, 5)
    assert len(made) == len(found) == 3
    assert all((x[-2048:] == 99).all() for x in made)
