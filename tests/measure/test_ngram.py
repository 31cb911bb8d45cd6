"""Witten-Bell trigrams against a dictionary version. pytest tests/measure/test_ngram.py"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from flashgpt.data.shards import TokenSplit
from flashgpt.measure.ngram import ByteTrigrams, bits_per_byte, text_of
from flashgpt.tokenizer import Tokenizer

PIECES = [b"abracadabra abba", b"a", b"", b"cab \xff\x00 ab", b"ab"]


class Plain:
    """The definition: P(x | c) = (n(cx) + u(c) P(x | c without its first byte)) / (n(c) + u(c))."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.counts: Counter[bytes] = Counter()
        for text in pieces:
            for n in (1, 2, 3):
                self.counts.update(text[at : at + n] for at in range(len(text) - n + 1))

    def probability(self, context: bytes, byte: int) -> float:
        shorter = self.probability(context[1:], byte) if context else 1 / 256
        followed = [n for gram, n in self.counts.items() if gram[:-1] == context and n]
        if not followed:
            return shorter
        kinds, seen = len(followed), sum(followed)
        count = self.counts[context + bytes([byte])]
        return (count + kinds * shorter) / (seen + kinds)

    def bits(self, text: bytes) -> float:
        return -sum(
            math.log2(self.probability(text[max(0, at - 2) : at], text[at]))
            for at in range(len(text))
        )


@pytest.fixture(scope="module")
def model() -> ByteTrigrams:
    made = ByteTrigrams()
    for text in PIECES:
        made.add(text)
    return made


@pytest.mark.parametrize("context", [b"", b"a", b"ab", b"zz", b"za"])
def test_probabilities_of_a_context_sum_to_1(model: ByteTrigrams, context: bytes) -> None:
    """Bytes that were never seen all have the same probability; `z` stands for them."""
    before, plain = model.bits(context), Plain(PIECES)
    seen = sorted(set(b"".join(PIECES)))
    total = 0.0
    for byte, times in [(ord("z"), 256 - len(seen)), *((byte, 1) for byte in seen)]:
        found = 2.0 ** -(model.bits(context + bytes([byte])) - before)
        assert found == pytest.approx(plain.probability(context, byte), rel=1e-9)
        assert found > 0
        total += found * times
    assert total == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("text", [b"", b"a", b"ab", b"abracad", b"quite other \xfe text", b"zzz"])
def test_bits_are_those_of_the_definition(model: ByteTrigrams, text: bytes) -> None:
    assert model.bits(text) == pytest.approx(Plain(PIECES).bits(text), abs=1e-9)


def test_bits_per_byte_of_several_texts() -> None:
    held_out = [b"abra", b"", b"cab"]
    plain = Plain(PIECES)
    expected = sum(plain.bits(text) for text in held_out) / 7
    assert bits_per_byte(PIECES, held_out) == pytest.approx(expected, rel=1e-12)
    assert bits_per_byte([], [b"xyz"]) == 8.0  # nothing counted: uniform


def test_text_of_a_split_is_its_text() -> None:
    tokenizer = Tokenizer.bytes()
    first, second = (
        np.array([*tokenizer.encode(text), tokenizer.eos_id], np.uint16)
        for text in ("a\u00e9", "b")
    )
    split = TokenSplit([first, second], [np.zeros(1, np.int64)] * 2, 4)
    assert b"".join(text_of(split, tokenizer)) == "a\u00e9b".encode()
