"""Decoding: the same tokens with and without the cache, whole characters, nothing left changed.

pytest tests/generation/test_decode.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import flashgpt
from flashgpt.config import GPTConfig
from flashgpt.generation import decode as decoding
from flashgpt.generation.cache import LayerKV
from flashgpt.generation.decode import TextGenerator, decode
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import SampleConfig
from flashgpt.tokenizer import Tokenizer

CONTEXT = 8
GREEDY = SampleConfig(temperature=0, max_new_tokens=30)


def _model(vocab_size: int = 257, **changes: Any) -> GPTModel:
    """Random weights, large enough that greedy tokens depend on the whole context."""
    torch.manual_seed(3)
    cfg = GPTConfig(vocab_size, CONTEXT, 16, 2, 2, 0.0, tie_weights=False)
    model = GPTModel({**cfg.to_dict(), **changes}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10)
    return model


@pytest.fixture(scope="module")
def model() -> GPTModel:
    return _model()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.bytes()


def _by_definition(model: GPTModel, prompt: list[int], config: SampleConfig) -> list[int]:
    """Greedy, one whole forward pass a token."""
    window, found = list(prompt), []
    while len(found) < config.max_new_tokens:
        token = int(model(torch.tensor([window]))[0, -1].argmax())
        found.append(token)
        if len(window) == CONTEXT and config.past_context == "stop":
            break
        if len(window) == CONTEXT:
            window = window[-(CONTEXT // 2) :]
        window.append(token)
    return found


@pytest.mark.parametrize("past_context", ["stop", "slide"])
@pytest.mark.parametrize("length", range(1, CONTEXT + 1))
def test_greedy_tokens_are_the_same_with_and_without_the_cache(
    model: GPTModel, length: int, past_context: Any
) -> None:
    prompt = [(37 * i + length) % 256 for i in range(length)]
    config = SampleConfig(temperature=0, max_new_tokens=30, past_context=past_context)
    expected = _by_definition(model, prompt, config)
    assert len(expected) == (30 if past_context == "slide" else CONTEXT - length + 1)
    for use_cache in (True, False):
        found = decode(model, prompt, config, vocab_size=257, use_cache=use_cache)
        assert list(found) == expected
    if past_context == "slide":
        assert len(set(expected)) > 5  # no fixed point that any rule would reach


@pytest.mark.parametrize("fault", ["stale row", "no positions", "not cleared"])
def test_that_comparison_sees_a_wrong_cache(
    model: GPTModel, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    good = list(decode(model, [1, 2, 3], GREEDY, vocab_size=257))
    if fault == "stale row":
        extend = LayerKV.extend

        def stale(self: LayerKV, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return extend(self, k if self.length % 2 else torch.zeros_like(k), v)

        monkeypatch.setattr(LayerKV, "extend", stale)
    elif fault == "no positions":
        monkeypatch.setattr(torch, "arange", lambda a, b, device: torch.zeros(b - a).long())
    else:
        monkeypatch.setattr(decoding, "_last_logits", _without_clearing(decoding._last_logits))
    assert list(decode(model, [1, 2, 3], GREEDY, vocab_size=257)) != good


def _without_clearing(inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """After a slide, only the last half of the new window is computed anew."""

    def logits(model: GPTModel, ids: Tensor, cache: Any) -> Tensor:
        if cache.length == 0 and ids.shape[1] == CONTEXT // 2 + 1:
            cache.advance(2)
            return inner(model, ids[:, 2:], cache)
        return inner(model, ids, cache)

    return logits


@pytest.mark.parametrize("seed", [0, 1])
def test_equal_seeds_draw_equal_text_with_and_without_the_cache(model: GPTModel, seed: int) -> None:
    config = SampleConfig(seed=seed, max_new_tokens=40, temperature=1.0, top_k=20)
    streams = [
        list(decode(model, [5], config, vocab_size=257, use_cache=use_cache))
        for use_cache in (True, False, True)
    ]
    assert streams[0] == streams[1] == streams[2] and len(streams[0]) == 40
    other = SampleConfig(**{**vars(config), "seed": 2})
    assert list(decode(model, [5], other, vocab_size=257)) != streams[0]


def test_the_default_generator_is_left_alone(model: GPTModel) -> None:
    before = torch.get_rng_state()
    list(decode(model, [5], SampleConfig(max_new_tokens=5), vocab_size=257))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_between_tokens_the_model_is_as_it_was(training: bool) -> None:
    model = _model(drop_rate=0.5).train(training)
    ids = torch.tensor([[1, 2, 3]])
    expected = list(decode(_model(drop_rate=0.5), [5], GREEDY, vocab_size=257))
    found = []
    for token in decode(model, [5], GREEDY, vocab_size=257):
        found.append(token)
        assert model.training is training
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        model.zero_grad()
        model(ids, ids).backward()  # weights and graph are usable
        assert all(p.grad is not None and not p.is_inference() for p in model.parameters())
    assert found == expected  # dropout was off for the tokens


def test_a_stream_that_is_left_midway_leaves_the_mode() -> None:
    model = _model().train()
    next(decode(model, [5], GREEDY, vocab_size=257))
    assert model.training
    with torch.no_grad():
        next(decode(model, [5], GREEDY, vocab_size=257))
        assert not torch.is_grad_enabled()


def test_ids_past_the_tokenizers_are_never_drawn() -> None:
    model = _model(vocab_size=320)
    with torch.no_grad():
        model.lm_head.weight[257:] *= 100
    for config in (GREEDY, SampleConfig(temperature=5.0, top_k=0, max_new_tokens=200)):
        assert max(decode(model, [5], config, vocab_size=257)) < 257
    assert max(decode(model, [5], GREEDY, vocab_size=320)) >= 257  # the mask is what held them


def test_end_of_text_ends_and_is_not_given(model: GPTModel) -> None:
    tokens = list(decode(model, [5], GREEDY, vocab_size=257))
    eos = tokens[4]
    first = tokens.index(eos)
    assert list(decode(model, [5], GREEDY, vocab_size=257, eos_id=eos)) == tokens[:first]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt must hold at least one token"),
        ([1] * (CONTEXT + 1), "prompt must be at most context_length 8 tokens, got 9"),
        ([1, 257], r"prompt ids must be in 0 \.\. 256 \(vocab_size 257\), got 257"),
        ([-1], r"prompt ids must be in 0 \.\. 256 .*, got -1"),
    ],
)
def test_bad_prompts_are_refused(model: GPTModel, prompt: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(decode(model, prompt, GREEDY, vocab_size=257))


def _says(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    """Makes the model say these ids."""
    drawn: Iterator[int] = iter(ids)
    monkeypatch.setattr(decoding, "sample", lambda *_: next(drawn))


def test_pieces_are_whole_characters(
    model: GPTModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a\u00e9\U0001f642 \u4e2d\u6587\ne\u0301"
    _says(monkeypatch, [*tokenizer.encode(text), tokenizer.eos_id])
    pieces = list(TextGenerator(model, tokenizer).stream("x", SampleConfig()))
    assert pieces == list(text)


def test_a_character_cut_by_the_end_is_marked(
    model: GPTModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer.encode("ab\U0001f642")[:-1]
    _says(monkeypatch, ids)
    config = SampleConfig(max_new_tokens=len(ids))
    assert list(TextGenerator(model, tokenizer).stream("x", config)) == ["a", "b", "\ufffd"]


@pytest.mark.parametrize("seed", range(3))
def test_pieces_together_are_the_text_of_the_tokens(
    model: GPTModel, tokenizer: Tokenizer, seed: int
) -> None:
    config = SampleConfig(temperature=1.5, top_k=0, max_new_tokens=60, seed=seed)
    ids = list(
        decode(model, tokenizer.encode("\u00e9"), config, vocab_size=257, eos_id=tokenizer.eos_id)
    )
    generator = TextGenerator(model, tokenizer)
    pieces = list(generator.stream("\u00e9", config))
    whole = tokenizer.decode(ids)
    assert all(pieces) and "".join(pieces) == whole == generator("\u00e9", config)
    assert flashgpt.generate(model, tokenizer, "\u00e9", config) == whole
    whole.encode("utf-8")
    assert "".join(generator.stream("\u00e9", config, use_cache=False)) == whole
