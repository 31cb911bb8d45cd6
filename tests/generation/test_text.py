"""Text in, text out: whole characters, stop strings, samples, why a text ended.

pytest tests/generation/test_text.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

import flashgpt
from flashgpt.generation import decode as decoding
from flashgpt.generation.decode import decode
from flashgpt.generation.text import Text, TextGenerator
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import SampleConfig
from flashgpt.tokenizer import Tokenizer

FREE = SampleConfig(temperature=1.5, top_k=0, max_new_tokens=60)


def _says(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    """Makes the model say these ids."""
    drawn: Iterator[int] = iter(ids)
    monkeypatch.setattr(decoding, "sample", lambda logits, *_: _one(logits, next(drawn)))


def _one(logits_BV: Tensor, token: int) -> Tensor:
    return logits_BV.argmax(-1) * 0 + token


def _stream(generator: TextGenerator, config: SampleConfig) -> tuple[list[str], Text]:
    """All pieces, and the whole that the stream returns."""
    stream, pieces = generator.stream("x", config), []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


@pytest.fixture(scope="module")
def generator(model: GPTModel, tokenizer: Tokenizer) -> TextGenerator:
    return TextGenerator(model, tokenizer)


def test_pieces_are_whole_characters(
    generator: TextGenerator, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a\u00e9\U0001f642 \u4e2d\u6587\ne\u0301"
    _says(monkeypatch, [*tokenizer.encode(text), tokenizer.eos_id])
    pieces, whole = _stream(generator, SampleConfig())
    assert pieces == list(text)
    ids = tuple(tokenizer.encode(text))
    assert (whole.text, whole.reason, whole.ids, whole.sample) == (text, "eos", ids, 0)


def test_a_character_cut_by_the_end_is_marked(
    generator: TextGenerator, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokenizer.encode("ab\U0001f642")[:-1]
    _says(monkeypatch, ids)
    pieces, whole = _stream(generator, SampleConfig(max_new_tokens=len(ids)))
    assert pieces == ["a", "b", "\ufffd"] and whole.reason == "length"


@pytest.mark.parametrize(
    ("stop", "shown", "reason", "drawn"),
    [
        (("END",), list("a E"), "stop", 6),
        (("never", "END"), list("a E"), "stop", 6),
        (("ENDx",), [*"a E", "END", "."], "eos", 7),  # held back, and text after all
        ((), list("a EEND."), "eos", 7),
        ((".",), list("a EEND"), "stop", 7),
        (("a",), [], "stop", 1),
    ],
)
def test_a_stop_string_ends_the_text_and_no_part_of_it_is_shown(
    generator: TextGenerator,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    stop: tuple[str, ...],
    shown: list[str],
    reason: str,
    drawn: int,
) -> None:
    _says(monkeypatch, [*tokenizer.encode("a EEND."), tokenizer.eos_id])
    pieces, whole = _stream(generator, SampleConfig(stop=stop))
    assert "".join(pieces) == whole.text == "".join(shown)
    assert all(piece in "".join(shown) for piece in pieces) and len(whole.ids) == drawn
    assert whole.reason == reason


def test_a_stop_string_in_the_last_token_is_the_reason(
    generator: TextGenerator, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _says(monkeypatch, tokenizer.encode("ab."))
    _, whole = _stream(generator, SampleConfig(stop=(".",), max_new_tokens=3))
    assert (whole.text, whole.reason) == ("ab", "stop")


@pytest.mark.parametrize("seed", range(3))
def test_pieces_together_are_the_text_of_the_tokens(generator: TextGenerator, seed: int) -> None:
    config = dataclasses.replace(FREE, seed=seed)
    model, tokenizer = generator.model, generator.tokenizer
    ids = list(
        decode(model, tokenizer.encode("\u00e9"), config, vocab_size=257, eos_id=tokenizer.eos_id)
    )
    pieces = list(generator.stream("\u00e9", config))
    whole = tokenizer.decode(ids)
    assert all(pieces) and "".join(pieces) == whole == generator("\u00e9", config)
    assert flashgpt.generate(model, tokenizer, "\u00e9", config) == whole
    whole.encode("utf-8")
    assert "".join(generator.stream("\u00e9", config, use_cache=False)) == whole


PROMPTS = ["a", "b" * 8, "\u00e9", "a", "xyz"]


@pytest.mark.parametrize("batch", [1, 2, 4, 100])
def test_samples_are_the_same_in_any_batch(generator: TextGenerator, batch: int) -> None:
    config = dataclasses.replace(FREE, stop=("e", "\u00e9", "\n"), max_new_tokens=25)
    found = list(generator.texts(PROMPTS, config, samples=3, batch=batch))
    assert [(x.prompt, x.sample) for x in found] == [(p, s) for p in PROMPTS for s in range(3)]
    first = [generator(prompt, config) for prompt in PROMPTS]
    assert [text.text for text in found[::3]] == first
    assert [text.text for text in found[9:12]] == [text.text for text in found[:3]]
    assert len({text.ids for text in found[:3]}) == 3  # samples of a prompt differ
    assert {text.reason for text in found} >= {"stop", "length"}
    assert found == list(generator.texts(PROMPTS, config, samples=3))


def test_log_probabilities_come_where_they_are_asked_for(generator: TextGenerator) -> None:
    plain = next(generator.texts(["ab"], FREE))
    (text,) = generator.texts(["ab"], FREE, logprobs=2)
    assert text.ids == plain.ids and all(token.logprob is None for token in plain.tokens)
    for token in text.tokens:
        assert token.logprob is not None and token.logprob <= 0 and len(token.top) == 2
        assert token.top[0][1] >= token.top[1][1] and token.logprob <= token.top[0][1]
    (alone,) = generator.texts(["ab"], FREE, logprobs=0)
    assert all(token.top == () for token in alone.tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "prompts must be at least 1, got 0"),
        ({"prompts": ["a"], "samples": 0}, "samples must be at least 1, got 0"),
        ({"prompts": ["a"], "batch": 0}, "batch must be at least 1, got 0"),
        ({"prompts": [""]}, "^prompt must hold at least one token"),
        ({"prompts": ["a", ""]}, "^prompt 2: prompt must hold at least one token"),
        ({"prompts": ["a", "b" * 9]}, "prompt 2: prompt must be at most context_length 8"),
        ({"prompts": ["a"], "logprobs": 999}, "logprobs must be in 0 "),
    ],
)
def test_what_cannot_be_written_is_refused(
    generator: TextGenerator, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        next(generator.texts(**options))
