"""Text from a model, token by token: prefill, then one step per token over a KV cache.

Past the context length `stop` ends, and `slide` keeps the last context_length // 2 tokens and fills
the cache anew. Without a cache the same windows are computed whole, so both give the same tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flashgpt.config import GPTConfig
from flashgpt.generation.cache import KVCache
from flashgpt.generation.sampling import sample
from flashgpt.model.gpt2 import GPTModel, check_ids
from flashgpt.runconfig import SampleConfig
from flashgpt.tokenizer import StreamDecoder, Tokenizer


def decode(
    model: GPTModel,
    prompt: Sequence[int],
    config: SampleConfig,
    *,
    vocab_size: int,
    eos_id: int | None = None,
    use_cache: bool = True,
) -> Iterator[int]:
    """Draws token ids after `prompt`, one at a time.

    Args:
        model: is used in eval mode; between tokens it is in the mode it was in.
        vocab_size: ids from here on (a padded vocabulary) are never drawn.
        eos_id: ends the text; is not part of it.
        use_cache: False computes every window whole, for comparison.

    Raises:
        ValueError: an empty prompt, one longer than the context, or ids outside the vocabulary.
    """
    check_prompt(prompt, model.cfg)
    context = model.cfg.context_length
    device = model.wte.weight.device
    generator = torch.Generator().manual_seed(config.seed)
    cache = KVCache(model.cfg, 1, device, model.wte.weight.dtype) if use_cache else None
    window = list(prompt)
    for _ in range(config.max_new_tokens):
        new = window if cache is None else window[cache.length :]
        logits_V = _last_logits(model, torch.tensor([new], device=device), cache)[:vocab_size]
        token = sample(logits_V, config, generator)
        if token == eos_id:
            return
        yield token
        if len(window) == context:
            if config.past_context == "stop":
                return
            window = window[context - context // 2 :]
            if cache is not None:
                cache.clear()
        window.append(token)


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
    check_ids(torch.tensor(prompt), cfg.vocab_size, "prompt ids")


@torch.inference_mode()
def _last_logits(model: GPTModel, ids_1T: Tensor, cache: KVCache | None) -> Tensor:
    """Logits after the last token, in eval mode; between tokens the model is as it was."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        logits: Tensor = model(ids_1T, cache=cache, last_only=True)[0, -1]
    finally:
        if was_training:
            model.train()
    return logits


@dataclasses.dataclass(frozen=True)
class TextGenerator:
    """Text in, text out."""

    model: GPTModel
    tokenizer: Tokenizer

    def stream(
        self, prompt: str, config: SampleConfig | None = None, *, use_cache: bool = True
    ) -> Iterator[str]:
        """The continuation of `prompt`, in pieces of whole characters as they come.

        Raises:
            ValueError: an empty prompt or one longer than the context.
        """
        ids = self.tokenizer.encode(prompt)
        decoder = StreamDecoder(self.tokenizer)
        for token in decode(
            self.model,
            ids,
            config or SampleConfig(),
            vocab_size=self.tokenizer.vocab_size,
            eos_id=self.tokenizer.eos_id,
            use_cache=use_cache,
        ):
            if piece := decoder.push(token):
                yield piece
        if piece := decoder.flush():
            yield piece

    def __call__(self, prompt: str, config: SampleConfig | None = None) -> str:
        """The whole continuation of `prompt`, without the prompt."""
        return "".join(self.stream(prompt, config))


def generate(
    model: GPTModel, tokenizer: Tokenizer, prompt: str, config: SampleConfig | None = None
) -> str:
    """The continuation of `prompt`, without the prompt.

    Raises:
        ValueError: an empty prompt or one longer than the context.
    """
    return TextGenerator(model, tokenizer)(prompt, config)
