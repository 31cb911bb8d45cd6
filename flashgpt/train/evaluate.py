"""Loss, perplexity and bits per byte of a model on a token split."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from flashgpt.data.batches import Batch, eval_windows, strided_windows
from flashgpt.data.shards import TokenSplit
from flashgpt.model.gpt2 import GPTModel
from flashgpt.model.loss import IGNORE
from flashgpt.train.parallel import ALONE, Parallel
from flashgpt.train.runtime import casting
from flashgpt.train.wrapping import evaluating

EVAL_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        loss: nats per predicted token; tokens that do not count as targets are not predicted.
        bits_per_byte: bits for all predicted tokens, over the UTF-8 bytes they stand for; an
            end-of-text token costs bits and stands for no byte.
        tokens: predicted tokens.
        bytes: the bytes they stand for.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


def evaluate(
    model: GPTModel,
    split: TokenSplit,
    byte_lengths: np.ndarray,
    *,
    max_tokens: int | None = None,
    stride: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
    autocast: torch.dtype | None = None,
    parallel: Parallel = ALONE,
) -> Evaluation:
    """Predicts a split in windows of the context length, each token at most once.

    Dropout is off; the model returns to the mode it was in.

    Args:
        byte_lengths: UTF-8 bytes of each token id.
        max_tokens: about how many tokens, spread evenly; all when left out, and with a stride.
        stride: tokens by which the windows advance; one after the other when left out. A token
            then has context_length - stride others before it at least, as far as there are any.
        progress: hears the tokens done so far, in this process.
        autocast: dtype of the products, fp32 when left out.
        parallel: the processes that share the windows; all get the same result.

    Raises:
        ValueError: nothing to predict, a stride not in 1 .. context_length, or both limits.
    """
    device, context = model.wte.weight.device, model.cfg.context_length
    if stride is None:
        windows = eval_windows(split, context, EVAL_ROWS, max_tokens=max_tokens)
    elif max_tokens is None:
        windows = strided_windows(split, context, stride, EVAL_ROWS)
    else:
        raise ValueError(f"max_tokens must be left out with a stride, got {max_tokens}")
    was_training = model.training
    model.eval()
    nats, tokens, n_bytes = 0.0, 0, 0
    try:
        with torch.no_grad(), casting(device, autocast), evaluating(model):
            for (ids, targets), is_own in _shared(windows, parallel):
                on_device = [torch.from_numpy(x).to(device) for x in (ids, targets)]
                counted = targets[targets != IGNORE]
                loss = model(*on_device).item()
                if not is_own:
                    continue
                nats += loss * counted.size
                tokens += counted.size
                n_bytes += int(byte_lengths[counted].sum())
                progress(tokens)
    finally:
        model.train(was_training)
    return _evaluation(*parallel.totals(nats, tokens, n_bytes))


def _shared(windows: Iterable[Batch], parallel: Parallel) -> Iterator[tuple[Batch, bool]]:
    """The batches of this process, every `size`-th, each marked as its own.

    All have as many, for a sharded model runs in all at once: at the end some repeat another's.
    """
    windows = iter(windows)
    while group := list(itertools.islice(windows, parallel.size)):
        is_own = parallel.rank < len(group)
        yield group[parallel.rank if is_own else 0], is_own


def together(found: Sequence[Evaluation]) -> Evaluation:
    """The evaluation of several splits as one."""
    nats = sum(part.loss * part.tokens for part in found)
    return _evaluation(nats, sum(part.tokens for part in found), sum(part.bytes for part in found))


def _evaluation(nats: float, tokens: int, n_bytes: int) -> Evaluation:
    bits = nats / math.log(2)
    return Evaluation(nats / tokens, bits / n_bytes if n_bytes else math.inf, tokens, n_bytes)
