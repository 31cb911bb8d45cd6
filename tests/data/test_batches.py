"""Batches: each window once an epoch, pure in (seed, step). pytest tests/data/test_batches.py"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgpt.data.batches import IGNORE, Batches, eval_windows
from flashgpt.data.shards import TokenSplit
from flashgpt.model import loss


def split_of(*lengths: int) -> TokenSplit:
    """Shards whose ids count up through all of them, so that an id tells its place."""
    edges = np.cumsum([0, *lengths])
    shards = [np.arange(a, b, dtype=np.uint16) for a, b in itertools.pairwise(edges)]
    return TokenSplit(shards, [np.zeros(1, np.int64)] * len(shards), n_bytes=int(edges[-1]))


def windows_of(lengths: list[int], length: int) -> list[int]:
    """First ids of all complete windows, from the definition."""
    edges = np.cumsum([0, *lengths]).tolist()
    return [
        begin + start
        for begin, n in zip(edges, lengths, strict=False)
        for start in range(0, n, length)
        if start + length + 1 <= n
    ]


shapes = st.tuples(
    st.lists(st.integers(1, 60), min_size=1, max_size=4),
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(0, 2**64 - 1),
).filter(lambda shape: max(shape[0]) > shape[1])


@given(shape=shapes)
@settings(max_examples=150, deadline=None)
def test_each_window_comes_once_in_each_epoch(
    shape: tuple[list[int], int, int, int],
) -> None:
    lengths, length, rows, seed = shape
    batches = Batches(split_of(*lengths), length, rows, seed)
    expected = windows_of(lengths, length)
    assert batches.n_windows == len(expected)
    firsts = []
    for step in range(-(-3 * len(expected) // rows)):
        ids, targets = batches.batch(step)
        assert ids.shape == targets.shape == (rows, length)
        assert ids.dtype == targets.dtype == np.int64
        np.testing.assert_array_equal(targets, ids + 1)
        np.testing.assert_array_equal(ids, ids[:, :1] + np.arange(length))
        firsts += ids[:, 0].tolist()
    for epoch in range(3):
        seen = firsts[epoch * len(expected) : (epoch + 1) * len(expected)]
        assert sorted(seen) == expected


@given(shape=shapes, step=st.integers(0, 50), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_batch_is_pure_and_slices_compose(
    shape: tuple[list[int], int, int, int], step: int, data: st.DataObject
) -> None:
    lengths, length, rows, seed = shape
    split = split_of(*lengths)
    batches = Batches(split, length, rows, seed)
    ids, targets = batches.batch(step)
    for other in data.draw(st.lists(st.integers(0, 50), max_size=5)):
        batches.batch(other)
    first = data.draw(st.integers(0, rows - 1))
    count = data.draw(st.integers(1, rows - first))
    for source in (batches, Batches(split, length, rows, seed)):
        part_ids, part_targets = source.batch(step, first=first, count=count)
        np.testing.assert_array_equal(part_ids, ids[first : first + count])
        np.testing.assert_array_equal(part_targets, targets[first : first + count])
    np.testing.assert_array_equal(batches.batch(step, first=first)[0], ids[first:])


def test_order_differs_between_seeds_and_epochs_and_is_the_same_forever() -> None:
    split = split_of(101)
    orders = [
        Batches(split, 10, 10, seed).batch(step)[0][:, 0] for seed in (0, 1) for step in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4
    # A change of these numbers would break the resuming of every run.
    assert (orders[0] // 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


def test_the_global_order_does_not_depend_on_the_batch_size() -> None:
    split = split_of(101)
    large = [Batches(split, 10, 8, 3).batch(step)[0] for step in range(4)]
    small = [Batches(split, 10, 2, 3).batch(step)[0] for step in range(16)]
    np.testing.assert_array_equal(np.concatenate(large), np.concatenate(small))


def test_epochs_are_counted_in_windows() -> None:
    batches = Batches(split_of(101), 10, 4, 0)
    assert [batches.epochs(step) for step in (0, 1, 5)] == [0.0, 0.4, 2.0]


def test_a_split_without_a_window_says_what_to_do() -> None:
    with pytest.raises(
        ValueError,
        match=r"at least 65 tokens for one window of context_length 64, got 64; use more text or a "
        r"smaller model.context_length",
    ):
        Batches(split_of(64), 64, 1, 0)
    assert Batches(split_of(65), 64, 1, 0).n_windows == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step must not be negative"),
        ({"step": 0, "first": 4}, "within the batch's 4, got first 4"),
        ({"step": 0, "first": -1}, "got first -1"),
        ({"step": 0, "first": 2, "count": 3}, "got first 2, count 3"),
        ({"step": 0, "count": 0}, "count 0"),
    ],
)
def test_rows_outside_the_batch_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(split_of(101), 10, 4, 0).batch(**arguments)


@pytest.mark.parametrize("bad", [{"rows": 0}, {"context_length": 0}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(bad: dict[str, int]) -> None:
    arguments = {"context_length": 10, "rows": 4, "seed": 0} | bad
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        Batches(split_of(101), **arguments)


@given(shape=shapes)
@settings(max_examples=150, deadline=None)
def test_evaluation_predicts_every_token_once(
    shape: tuple[list[int], int, int, int],
) -> None:
    lengths, length, rows, _ = shape
    predicted = []
    for ids, targets in eval_windows(split_of(*lengths), length, rows):
        assert len(ids) <= rows
        assert ids.shape == targets.shape
        assert ids.shape[1] == length or (len(ids) == 1 and ids.shape[1] < length)
        assert ids.dtype == targets.dtype == np.int64
        np.testing.assert_array_equal(targets, ids + 1)
        predicted += targets.reshape(-1).tolist()
    starts = np.cumsum([0, *lengths])[:-1].tolist()
    assert predicted == [token for token in range(sum(lengths)) if token not in starts]


@given(shape=shapes, limit=st.integers(1, 300))
@settings(max_examples=150, deadline=None)
def test_limited_evaluation_is_a_fixed_even_choice_of_windows(
    shape: tuple[list[int], int, int, int], limit: int
) -> None:
    lengths, length, rows, _ = shape
    split = split_of(*lengths)
    chosen = list(eval_windows(split, length, rows, max_tokens=limit))
    again = eval_windows(split, length, rows, max_tokens=limit)
    for (ids, targets), (ids_again, targets_again) in zip(chosen, again, strict=True):
        np.testing.assert_array_equal(ids, ids_again)
        np.testing.assert_array_equal(targets, targets_again)
    predicted = sum(targets.size for _, targets in chosen)
    everything = sum(n - 1 for n in lengths)
    if limit >= everything:
        assert predicted == everything
        return
    expected = windows_of(lengths, length)
    assert predicted == length * max(1, min(limit // length, len(expected)))
    at = [expected.index(first) for ids, _ in chosen for first in ids[:, 0].tolist()]
    gaps = np.diff([*at, len(expected) + at[0]])
    assert at == sorted(set(at))
    assert gaps.max() - gaps.min() <= 1


def test_a_short_split_is_evaluated_as_one_partial_window() -> None:
    ((ids, targets),) = eval_windows(split_of(5), 64, 8, max_tokens=2)
    assert ids.tolist() == [[0, 1, 2, 3]]
    assert targets.tolist() == [[1, 2, 3, 4]]
    with pytest.raises(ValueError, match="validation must have at least 2 tokens, got 1"):
        eval_windows(split_of(1), 64, 8)
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        eval_windows(split_of(50), 8, 8, max_tokens=0)


def masked(lengths: list[int], marks: list[bool]) -> TokenSplit:
    """`split_of`, with marks on ids that do not count; a shard without a mark has no mask."""
    split = split_of(*lengths)
    ignored = {}
    for number, shard in enumerate(split.tokens):
        mask = np.array(marks)[shard % len(marks)]
        if mask.any():
            ignored[number] = mask
    return TokenSplit(split.tokens, split.starts, split.n_bytes, ignored)


def counting(split: TokenSplit) -> set[int]:
    """The ids that count as targets."""
    found: set[int] = set()
    for number, shard in enumerate(split.tokens):
        mask = split.ignored.get(number, np.zeros(len(shard), np.bool_))
        found |= set(shard[1:][~mask[1:]].tolist())
    return found


marks = st.lists(st.sampled_from([True, True, False]), min_size=1, max_size=200)


@given(shape=shapes, marks=marks)
@settings(max_examples=200, deadline=None)
def test_targets_that_do_not_count_are_ignored_and_empty_windows_left_out(
    shape: tuple[list[int], int, int, int], marks: list[bool]
) -> None:
    lengths, length, rows, seed = shape
    split = masked(lengths, marks)
    counts = counting(split)
    expected = [
        first
        for first in windows_of(lengths, length)
        if counts & set(range(first + 1, first + length + 1))
    ]
    if not expected:
        with pytest.raises(ValueError, match="with a target that counts, got none"):
            Batches(split, length, rows, seed)
        return
    batches = Batches(split, length, rows, seed)
    assert batches.n_windows == len(expected)
    firsts = []
    for step in range(-(-2 * len(expected) // rows)):
        ids, targets = batches.batch(step)
        np.testing.assert_array_equal(ids, ids[:, :1] + np.arange(length))
        np.testing.assert_array_equal(
            targets, np.where(np.isin(ids + 1, list(counts)), ids + 1, IGNORE)
        )
        assert batches.counted(step) == np.count_nonzero(targets != IGNORE)
        firsts += ids[:, 0].tolist()
    for epoch in range(2):
        assert sorted(firsts[epoch * len(expected) : (epoch + 1) * len(expected)]) == expected


@given(shape=shapes, marks=marks, limit=st.none() | st.integers(1, 300))
@settings(max_examples=200, deadline=None)
def test_evaluation_predicts_what_counts_and_passes_over_empty_windows(
    shape: tuple[list[int], int, int, int], marks: list[bool], limit: int | None
) -> None:
    lengths, length, rows, _ = shape
    split = masked(lengths, marks)
    counts = counting(split)
    if not counts:
        with pytest.raises(ValueError, match="validation must have a target that counts, got none"):
            eval_windows(split, length, rows, max_tokens=limit)
        return
    predicted: list[int] = []
    for ids, targets in eval_windows(split, length, rows, max_tokens=limit):
        assert ids.shape == targets.shape and len(ids) <= rows
        assert (targets != IGNORE).any(axis=1).all()
        np.testing.assert_array_equal(
            targets, np.where(np.isin(ids + 1, list(counts)), ids + 1, IGNORE)
        )
        predicted += targets[targets != IGNORE].tolist()
    assert predicted == sorted(set(predicted)) and predicted
    if limit is None:
        assert set(predicted) == counts
    else:
        assert len(predicted) <= max(limit, length)


def test_an_ignored_target_has_the_number_that_the_loss_passes_over() -> None:
    assert IGNORE == loss.IGNORE
