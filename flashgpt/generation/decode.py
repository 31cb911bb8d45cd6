"""Token ids from a model, one after the other, for one prompt or for many side by side.

Past the context length `stop` ends, and `slide` keeps the last context_length // 2 tokens and fills
the cache anew. Without a cache the same windows are computed whole, so both give the same tokens.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence

import torch

from flashgpt.config import GPTConfig
from flashgpt.generation.ahead import Ahead
from flashgpt.generation.rows import Logits, Row
from flashgpt.generation.sampling import Drawn, logprobs, sample, uniforms
from flashgpt.model.gpt2 import GPTModel, check_ids
from flashgpt.runconfig import SampleConfig


def decode(
    model: GPTModel,
    prompt: Sequence[int],
    config: SampleConfig,
    *,
    vocab_size: int,
    eos_id: int | None = None,
    use_cache: bool = True,
) -> Iterator[int]:
    """Draws token ids after `prompt`, one at a time: `decode_rows` for a single row."""
    row = Row(list(prompt), config.max_new_tokens)
    found = decode_rows(
        model, [row], config, vocab_size=vocab_size, eos_id=eos_id, use_cache=use_cache
    )
    with contextlib.closing(found):  # now, not when the collector comes: a graph is given back
        for _, drawn in found:
            yield drawn.id


def decode_rows(
    model: GPTModel,
    rows: Sequence[Row],
    config: SampleConfig,
    *,
    vocab_size: int,
    eos_id: int | None = None,
    use_cache: bool = True,
    top: int | None = None,
) -> Generator[tuple[Row, Drawn], None, None]:
    """Draws a token for every row that has not ended, then the next for each.

    A row's tokens depend on its prompt, its number as a sample and the config, not on the rows
    beside it, but for rounding: another batch shape may add up in another order, which moves a
    logit in its last digits.

    Args:
        model: is used in eval mode; between tokens it is in the mode it was in.
        rows: prompts as windows; are written to. The caller may end one by giving it a reason.
        config: `prompt`, `max_new_tokens` and `stop` are the caller's business.
        vocab_size: ids from here on (a padded vocabulary) are never drawn.
        eos_id: ends a text; is not part of it.
        use_cache: False computes every window whole, for comparison.
        top: also log-probabilities, of the token and of so many likeliest.

    Raises:
        ValueError: an empty prompt, one longer than the context, ids outside the vocabulary, or
            more log-probabilities than it has ids.
    """
    for row in rows:
        check_prompt(row.window, model.cfg)
    if max(config.stop_ids, default=0) >= vocab_size:
        raise ValueError(
            f"sample.stop_ids must be below the tokenizer's vocab_size {vocab_size}, "
            f"got {max(config.stop_ids)}"
        )
    if top is not None and not 0 <= top <= vocab_size:
        raise ValueError(f"logprobs must be in 0 .. vocab_size {vocab_size}, got {top}")
    greedy = config.temperature == 0
    random = {row: [] if greedy else uniforms(config.seed, row.sample, row.limit) for row in rows}
    logits = Logits(model, use_cache=use_cache)
    ahead = Ahead(model, logits, config, random, vocab_size) if use_cache and top is None else None
    device = model.wte.weight.device
    try:
        while alive := [row for row in rows if row.reason is None]:
            if ahead is not None and (tokens := ahead.tokens(alive)) is not None:
                found = [Drawn(token) for token in tokens]
            else:
                logits_BV = logits.after(alive)[:, :vocab_size]
                number = [0.0 if greedy else random[row][len(row.ids)] for row in alive]
                uniform_B = torch.tensor(number, dtype=torch.float64, device=device)
                chosen_B = sample(logits_BV, config, uniform_B)
                if top is None:
                    found = [Drawn(token) for token in chosen_B.tolist()]
                else:
                    found = logprobs(logits_BV, chosen_B, top)
            for row, drawn in zip(alive, found, strict=True):
                if drawn.id == eos_id:
                    row.reason = "eos"
                elif drawn.id in config.stop_ids:
                    row.reason = "stop"
                else:
                    row.push(drawn.id, model.cfg.context_length, config.past_context)
                    yield row, drawn
    finally:
        if ahead is not None:
            ahead.close()


def check_prompt(prompt: Sequence[int], cfg: GPTConfig) -> None:
    """Refuses what a model cannot go on from.

    Raises:
        ValueError: an empty prompt, one longer than the context, or ids outside the vocabulary.
    """
    if not prompt:
        raise ValueError("prompt must hold at least one token, got none")
    if len(prompt) > cfg.context_length:
        raise ValueError(
            f"prompt must be at most context_length {cfg.context_length} tokens, "
            f"got {len(prompt)}; shorten it"
        )
    if min(prompt) < 0 or max(prompt) >= cfg.vocab_size:  # by itself faster than a tensor
        check_ids(torch.tensor(prompt), cfg.vocab_size, "prompt ids")
