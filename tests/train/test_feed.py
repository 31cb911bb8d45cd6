"""Batches read ahead: the same ones, in any order of asking. pytest tests/train/test_feed.py"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashgpt.data.batches import IGNORE, Batches
from flashgpt.data.shards import TokenSplit
from flashgpt.train.feed import Feed

CPU = torch.device("cpu")


class Made:
    """Batches that tell their step, and how often each was read."""

    def __init__(self, masked: Any = None) -> None:
        self.masked = np.zeros((4, 3), bool) if masked is None else np.array(masked)
        self.read: list[int] = []

    def batch(self, step: int, first: int = 0, count: int = 4) -> Any:
        self.read.append(step)
        ids = np.arange(12).reshape(4, 3) + 100 * step
        rows = slice(first, first + count)
        return ids[rows], np.where(self.masked, IGNORE, ids + 1)[rows]

    def counted(self, _: int) -> int:
        return int(np.count_nonzero(~self.masked))


@given(steps=st.lists(st.integers(0, 20), max_size=8), micro=st.sampled_from([1, 2, 4]))
def test_every_step_has_its_own_batch_in_whatever_order(steps: list[int], micro: int) -> None:
    made: Any = Made()
    with Feed(made, 4, micro, CPU) as feed:
        for step in steps:
            micros = feed.take(step)
            ids, targets = made.batch(step)
            assert [m.first_row for m in micros] == list(range(0, 4, micro))
            assert torch.equal(torch.cat([m.ids_BT for m in micros]), torch.from_numpy(ids))
            assert torch.equal(torch.cat([m.targets_BT for m in micros]), torch.from_numpy(targets))
            assert [m.weight for m in micros] == [micro / 4] * (4 // micro)


def test_steps_in_order_are_read_once_and_ahead() -> None:
    made: Any = Made()
    with Feed(made, 4, 4, CPU) as feed:
        for step in range(5, 9):
            feed.take(step)
    assert made.read[:4] == [5, 6, 7, 8]
    assert len(set(made.read)) == len(made.read) <= 6


def test_micro_batches_weigh_as_many_targets_as_they_count() -> None:
    made: Any = Made([[True, True, False], [True, True, False], [True, True, False], [False] * 3])
    with Feed(made, 4, 2, CPU) as feed:
        micros = feed.take(0)
    assert [(m.first_row, m.weight) for m in micros] == [(0, 2 / 6), (2, 4 / 6)]


def test_a_process_reads_its_own_rows_alone() -> None:
    """The same micro-batches as those of the whole step, bit for bit."""

    class Watched(np.ndarray):
        starts: list[int]

        def __getitem__(self, at: Any) -> Any:
            self.starts.append(at.start)
            return np.asarray(self)[at]

    tokens = np.arange(40, dtype=np.uint16).view(Watched)
    Watched.starts = []
    ignored = np.arange(40) % 7 < 2
    batches = Batches(TokenSplit([tokens], [np.zeros(1, np.int64)], 0, {0: ignored}), 3, 4, 7)
    with Feed(batches, 4, 1, CPU, range(2, 4)) as feed:
        own = feed.take(0)
    read = set(Watched.starts)
    assert read <= {start for step in range(3) for _, start in batches.windows(step)[2:]}
    assert len({micro.weight for micro in own}) == 2
    for one, other in zip(own, feed.whole(0)[2:], strict=True):
        assert torch.equal(one.ids_BT, other.ids_BT)
        assert torch.equal(one.targets_BT, other.targets_BT)
        assert (one.first_row, one.weight) == (other.first_row, other.weight)


def test_what_reading_raises_comes_up_where_the_step_is_taken() -> None:
    class Broken(Made):
        def batch(self, step: int, *rows: int) -> Any:
            if step == 2:
                raise OSError("the disk is gone")
            return super().batch(step, *rows)

    broken: Any = Broken()
    with Feed(broken, 4, 4, CPU) as feed:
        assert feed.take(0) and feed.take(1)
        with pytest.raises(OSError, match="the disk is gone"):
            feed.take(2)


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    made: Any = Made()
    with Feed(made, 4, 4, CPU) as feed:
        feed.take(0)
    assert threading.active_count() == before
