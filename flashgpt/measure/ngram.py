"""An interpolated byte 3-gram model: what counting alone achieves on the same text.

Witten-Bell interpolation (IEEE Trans. Inf. Theory 37(4), 1991): after a context seen c times, with
u different bytes following, the next byte has the probability (count + u * shorter context's
probability) / (c + u); the empty context falls back on the uniform distribution over 256 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from flashgpt.data.shards import TokenSplit
from flashgpt.tokenizer import Tokenizer

ORDER = 3
PIECE_TOKENS = 1 << 20


class ByteTrigrams:
    """Counts of byte 1-, 2- and 3-grams; about 150 MB."""

    def __init__(self) -> None:
        self.counts = [np.zeros(256**n, dtype=np.int64) for n in range(1, ORDER + 1)]

    def add(self, text: bytes) -> None:
        """Counts one more piece of text."""
        for n, codes in enumerate(_codes(np.frombuffer(text, dtype=np.uint8)), start=1):
            self.counts[n - 1] += np.bincount(codes, minlength=256**n)

    def bits(self, text: bytes) -> float:
        """Bits that the model needs for every byte of `text`."""
        probability = np.full(len(text), 1 / 256)
        for n, codes in enumerate(_codes(np.frombuffer(text, dtype=np.uint8)), start=1):
            table = self.counts[n - 1].reshape(-1, 256)
            seen, kinds = table.sum(axis=1), (table > 0).sum(axis=1)
            context, total = codes // 256, seen + kinds
            part = probability[n - 1 :]
            known = total[context] > 0
            mixed = (self.counts[n - 1][codes] + kinds[context] * part) / np.maximum(
                total[context], 1
            )
            probability[n - 1 :] = np.where(known, mixed, part)
        return float(-np.log2(probability).sum())


def bits_per_byte(train: Iterable[bytes], held_out: Iterable[bytes]) -> float:
    """Bits per byte on `held_out` of a model that counted `train`."""
    model = ByteTrigrams()
    for text in train:
        model.add(text)
    bits = n_bytes = 0.0
    for text in held_out:
        if text:
            bits += model.bits(text)
            n_bytes += len(text)
    return bits / n_bytes


def text_of(split: TokenSplit, tokenizer: Tokenizer) -> Iterator[bytes]:
    """The text that a split's tokens stand for, in pieces."""
    table = tokenizer.token_bytes
    for ids in split.tokens:
        for at in range(0, len(ids), PIECE_TOKENS):
            yield b"".join([table[i] for i in ids[at : at + PIECE_TOKENS].tolist()])


def _codes(text: np.ndarray) -> Iterable[np.ndarray]:
    """Codes of all n-grams of a text, for n = 1, 2, 3; the last byte is the lowest digit."""
    wide = text.astype(np.int64)
    for n in range(1, ORDER + 1):
        length = max(0, len(wide) - n + 1)
        code = np.zeros(length, dtype=np.int64)
        for i in range(n):
            code = code * 256 + wide[i : i + length]
        yield code
