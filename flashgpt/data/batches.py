"""Which tokens a step sees: a pure function of the seed and the step.

Owns the cutting of token shards into windows, their order, and the evaluation windows. Does not
own devices or processes: every process can ask for any rows of any step's batch.

A window is context_length + 1 tokens: the first context_length are the input, the last
context_length the targets. Windows start at multiples of context_length in each shard, so that
every token but a shard's first is a target of one window at most. Targets that do not count are
-100 (`IGNORE`), and where none of a window's counts, it is no window.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from flashgpt.data.shards import TokenSplit

IGNORE = -100  # a target that does not count; the model's loss passes over it
Int64s = npt.NDArray[np.int64]
Batch = tuple[Int64s, Int64s]


class Batches:
    """The training batches of a run.

    Args:
        split: the tokens.
        context_length: tokens a row predicts.
        rows: sequences in one step's batch, all devices and micro-batches together.
        seed: order of the windows, in [0, 2^64).

    Raises:
        ValueError: `split` has no complete window, or a number is out of range.
    """

    def __init__(self, split: TokenSplit, context_length: int, rows: int, seed: int) -> None:
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must be in [0, 2^64), got {seed}")
        self._windows = _Windows(split, context_length, rows)
        if self._windows.complete and not self._windows.count:
            raise ValueError(
                f"corpus must have a window of context_length {context_length} with a target that "
                "counts, got none; use more text or a larger model.context_length"
            )
        if not self._windows.count:
            longest = max((len(shard) for shard in split.tokens), default=0)
            raise ValueError(
                f"corpus must have at least {context_length + 1} tokens for one window of "
                f"context_length {context_length}, got {longest}; use more text or a smaller "
                "model.context_length"
            )
        self._rows, self._seed = rows, seed
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    @property
    def n_windows(self) -> int:
        """Windows in one epoch."""
        return self._windows.count

    def batch(self, step: int, first: int = 0, count: int | None = None) -> Batch:
        """The rows `first` to `first + count` of a step's batch; all rows when left out.

        Each window comes once in an epoch. Where an epoch ends within a batch, the next one
        begins there.

        Args:
            step: optimizer step, from 0.
            first: first row.
            count: rows (count).

        Returns:
            ids and targets, int64 [count, context_length]; targets are the ids one token on, or
            -100 where they do not count.

        Raises:
            ValueError: `step` is negative, or the rows are not in the batch.
        """
        count = self._rows - first if count is None else count
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        if first < 0 or count < 1 or first + count > self._rows:
            raise ValueError(
                f"rows must be within the batch's {self._rows}, got first {first}, count {count}"
            )
        return self._windows.gather(self._indices(step * self._rows + first, count))

    def counted(self, step: int) -> int:
        """Targets that count in the whole of a step's batch, without reading its tokens."""
        return self._windows.counted(self._indices(step * self._rows, self._rows))

    def windows(self, step: int) -> list[tuple[int, int]]:
        """Where each row of a step's batch stands: number of the shard, offset in it (tokens)."""
        return [self._windows.place(at) for at in self._indices(step * self._rows, self._rows)]

    def _indices(self, begin: int, count: int) -> list[int]:
        """The windows of samples `begin` to `begin + count`, counted through all epochs."""
        places = (divmod(sample, self.n_windows) for sample in range(begin, begin + count))
        return [int(self._order(epoch)[at]) for epoch, at in places]

    def epochs(self, step: int) -> float:
        """How many times the windows have been seen after `step` steps."""
        return step * self._rows / self.n_windows

    def _shuffle(self, epoch: int) -> Int64s:
        # NumPy promises the raw stream of a bit generator for all versions, but not what
        # Generator.permutation makes of it; a run must resume in the same order anywhere.
        stream = np.random.Philox(key=np.array([self._seed, epoch], np.uint64))
        return np.argsort(stream.random_raw(self.n_windows), kind="stable")


def eval_windows(
    split: TokenSplit, context_length: int, rows: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """Consecutive windows in order; every token that counts is predicted once at most.

    Args:
        split: the tokens.
        context_length: tokens a row predicts.
        rows: most rows in a batch.
        max_tokens: predict this many at most, but one window at least, in complete windows
            spread evenly over the split, the same ones each time; left out, all.

    Returns:
        ids and targets, int64 [at most rows, context_length]; what remains of a shard comes as a
        shorter batch of one row.

    Raises:
        ValueError: no shard has two tokens, no target counts, or a number is out of range.
    """
    windows = _Windows(split, context_length, rows)
    targets = sum(len(shard) - 1 for shard in split.tokens)
    if targets < 1:
        raise ValueError(
            f"validation must have at least 2 tokens, got {split.n_tokens}; use more text"
        )
    if all(
        len(shard) < 2 or (number in split.ignored and split.ignored[number][1:].all())
        for number, shard in enumerate(split.tokens)
    ):
        raise ValueError("validation must have a target that counts, got none; use more text")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if max_tokens is None or max_tokens >= targets or not windows.count:
        return windows.all()
    wanted = max(1, min(windows.count, max_tokens // context_length))
    return windows.some([index * windows.count // wanted for index in range(wanted)])


def strided_windows(
    split: TokenSplit, context_length: int, stride: int, rows: int
) -> Iterator[Batch]:
    """Windows that begin `stride` tokens after one another; every token that counts is predicted
    once, after at least context_length - stride others where the shard has so many before it.

    In all but a shard's first window the targets that an earlier one has predicted are -100.

    Args:
        split: the tokens.
        context_length: most tokens a row reads.
        stride: tokens from the beginning of a window to that of the next.
        rows: most rows in a batch.

    Returns:
        ids and targets as of `eval_windows`, whose rows these are for a stride of context_length.

    Raises:
        ValueError: `stride` is not in 1 .. context_length, or as `eval_windows`.
    """
    if not 1 <= stride <= context_length:
        raise ValueError(f"stride must be in 1 .. context_length {context_length}, got {stride}")
    if stride == context_length:
        return eval_windows(split, context_length, rows)
    eval_windows(split, context_length, rows)  # refuses what has nothing to predict
    return _strided(split, context_length, stride, rows)


def _strided(split: TokenSplit, context_length: int, stride: int, rows: int) -> Iterator[Batch]:
    cutter = _Windows(split, context_length, rows)
    waiting: list[Batch] = []
    for shard, tokens in enumerate(split.tokens):
        done = 0  # targets of the shard that have been predicted
        for start in range(0, len(tokens), stride):
            if done >= len(tokens) - 1:
                break
            ids, targets = cutter.cut(shard, start, start + context_length + 1)
            targets[: done - start] = IGNORE
            done = start + len(ids)
            if (targets == IGNORE).all():
                continue
            if len(waiting) == rows or (waiting and len(waiting[0][0]) != len(ids)):
                yield _stacked(waiting)
                waiting = []
            waiting.append((ids, targets))
    if waiting:
        yield _stacked(waiting)


def _stacked(windows: Sequence[Batch]) -> Batch:
    ids, targets = zip(*windows, strict=True)
    return np.stack(ids), np.stack(targets)


class _Windows:
    """The complete windows of a split in which a target counts, numbered through its shards."""

    def __init__(self, split: TokenSplit, context_length: int, rows: int) -> None:
        for name, value in (("context_length", context_length), ("rows", rows)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._tokens, self._ignored = split.tokens, split.ignored
        self._length, self._rows = context_length, rows
        self._complete = [max(len(shard) - 1, 0) // context_length for shard in split.tokens]
        self._counting = [self._with_target(shard) for shard in range(len(split.tokens))]
        counts = [len(windows) for windows in self._counting]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self.count = sum(counts)
        self.complete = sum(self._complete)

    def _with_target(self, shard: int) -> Sequence[int] | Int64s:
        """Numbers of the complete windows of a shard in which a target counts."""
        complete = self._complete[shard]
        if shard not in self._ignored:
            return range(complete)
        ignored = self._ignored[shard][1 : complete * self._length + 1]
        return np.flatnonzero(~ignored.reshape(complete, self._length).all(axis=1))

    def place(self, index: int) -> tuple[int, int]:
        """Shard and offset (tokens) of the window of this number."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        within = index - (int(self._ends[shard - 1]) if shard else 0)
        return shard, int(self._counting[shard][within]) * self._length

    def gather(self, indices: Sequence[int]) -> Batch:
        """The windows of these numbers, as ids and targets."""
        ids, targets = np.empty((2, len(indices), self._length), np.int64)
        for row, index in enumerate(indices):
            shard, start = self.place(index)
            ids[row], targets[row] = self.cut(shard, start, start + self._length + 1)
        return ids, targets

    def counted(self, indices: Sequence[int]) -> int:
        """Targets that count in the windows of these numbers."""
        total = len(indices) * self._length
        for shard, start in map(self.place, indices):
            if shard in self._ignored:
                ignored = self._ignored[shard][start + 1 : start + self._length + 1]
                total -= int(np.count_nonzero(ignored))
        return total

    def cut(self, shard: int, start: int, stop: int) -> Batch:
        """Ids of a shard but for the last one, and the id after each as its target."""
        tokens = self._tokens[shard][start:stop].astype(np.int64)
        targets = tokens[1:].copy()
        if shard in self._ignored:
            targets[self._ignored[shard][start + 1 : stop]] = IGNORE
        return tokens[:-1], targets

    def some(self, indices: Sequence[int]) -> Iterator[Batch]:
        """The windows of these numbers, in batches."""
        for at in range(0, len(indices), self._rows):
            yield self.gather(indices[at : at + self._rows])

    def all(self) -> Iterator[Batch]:
        """Every window in batches, and after each shard what remains of it as one row."""
        begin = 0
        for shard, end in enumerate(self._ends.tolist()):
            yield from self.some(range(begin, end))
            start = self._complete[shard] * self._length
            ids, targets = self.cut(shard, start, len(self._tokens[shard]))
            if (targets != IGNORE).any():
                yield ids[None], targets[None]
            begin = end
