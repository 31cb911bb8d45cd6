"""Text to token ids and back: byte-level BPE, as GPT-2 has it.

Owns training, loading, saving, encoding and decoding of tokenizers. Does not own which text a
tokenizer is trained on (`flashgpt.data.shards`) or where ids are kept.

Every tokenizer here is byte-level: any text encodes, nothing is unknown, and decoding gives the
same text back. The special token `<|endoftext|>` closes a document; it never comes out of text,
even where the text contains these very characters.
"""

from __future__ import annotations

import builtins
import concurrent.futures
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from flashgpt.vocabulary import (
    EOS,
    byte_level,
    byte_of_symbol,
    check_ids,
    gpt2_file,
    read,
    with_eos,
)

if TYPE_CHECKING:
    import tokenizers

__all__ = ["EOS", "Tokenizer"]

# A text that only a lossless tokenizer gives back: no leading space, runs of white space, composed,
# decomposed and compatibility characters, NUL, and the special token's own spelling.
_PROBE = "a  B\r\n\n\t\u00e9 e\u0301 \u212b \ufb01 \u3000\u4e2d\u6587 \U0001f642\x00 " + EOS


class Tokenizer:
    """A byte-level tokenizer with the special token `<|endoftext|>`.

    Args:
        inner: a tokenizer of the `tokenizers` library; owned by the new object and changed by it
            (no truncation, no padding, special tokens never read from text).

    Raises:
        ValueError: `inner` is not byte-level, lacks `<|endoftext|>`, or has ids that two tokens
            share or that are 2^20 or more.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        self._inner = inner
        vocab = inner.get_vocab(with_added_tokens=True)
        check_ids(vocab)
        whole = byte_of_symbol().keys() <= vocab.keys()
        if not whole or self._bytes_of(self.encode(_PROBE)) != _PROBE.encode("utf-8"):
            raise ValueError("tokenizer must be byte-level and lose no text, got one that is not")
        if EOS not in vocab:
            raise ValueError(f"tokenizer must have the token {EOS}, got a vocabulary without it")
        self.eos_id: int = vocab[EOS]
        self.vocab_size: int = max(vocab.values()) + 1

    @classmethod
    def bytes(cls) -> Tokenizer:
        """One id a byte (id = value of the byte), and `<|endoftext|>` = 256."""
        from tokenizers import models

        return cls(with_eos(models.BPE(vocab=dict(byte_of_symbol()), merges=[])))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learns a byte-level BPE; equal texts give equal tokenizers.

        Args:
            texts: the texts to learn from, read once.
            vocab_size: ids wanted (count), `<|endoftext|>` included as the last one. Text that
                has fewer pairs to merge gives a smaller tokenizer.

        Raises:
            ValueError: `vocab_size` is below 257.
        """
        from tokenizers import models, pre_tokenizers, trainers

        if vocab_size < 257:
            raise ValueError(
                f"vocab_size must be at least 257 (256 bytes, {EOS}), got {vocab_size}"
            )
        inner = byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(with_eos(inner.model))

    @classmethod
    def load(cls, where: str | Path) -> Tokenizer:
        """Reads a tokenizer.

        Args:
            where: a folder with tokenizer.json, or with vocab.json and merges.txt; a
                tokenizer.json file; the word `bytes`; or the word `gpt2`, which is looked for in
                the Hugging Face cache first and then downloaded.

        Raises:
            ValueError: nothing there, no tokenizer, not byte-level, no `<|endoftext|>`, or `gpt2`
                is neither cached nor reachable.
        """
        if where == "bytes":
            return cls.bytes()
        path = Path(gpt2_file()) if where == "gpt2" else Path(where).expanduser()
        if not path.exists():
            raise ValueError(
                "tokenizer must be bytes, gpt2, or a folder or tokenizer.json that exists (bpe is "
                f"trained by flashgpt prepare), got {str(where)!r}"
            )
        try:
            return cls(read(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Writes what `load` and `transformers.AutoTokenizer.from_pretrained` read.

        Args:
            folder: made if it is not there; gets tokenizer.json and tokenizer_config.json.

        Raises:
            OSError: the files cannot be written.
        """
        from tokenizers import pre_tokenizers

        # transformers' GPT-2 class builds GPT-2's splitting rule itself; a tokenizer that splits
        # text in another way needs the class that takes tokenizer.json as it is.
        plain = isinstance(self._inner.pre_tokenizer, pre_tokenizers.ByteLevel)
        config = {
            "tokenizer_class": "GPT2Tokenizer" if plain else "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "bos_token": EOS,
            "eos_token": EOS,
            "unk_token": EOS,
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = self._inner.to_str(pretty=True)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8", newline="\n")
        text = json.dumps(config, indent=2) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8", newline="\n")

    def encode(self, text: str) -> list[int]:
        """The ids of a text; no special token is added or read.

        Raises:
            ValueError: a lone surrogate, which is no character: half of one, or a byte that was
                not UTF-8 where the text was read.
        """
        return self._encodings([text])[0].ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, spread over the CPU's cores."""
        return [encoding.ids for encoding in self._encodings(texts)]

    def encode_batches(self, batches: Iterable[Sequence[str]]) -> Iterator[list[list[int]]]:
        """`encode_batch` of each batch, in order; while the caller makes use of one, or reads the
        one after next, the next is being encoded."""
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            running: concurrent.futures.Future[list[tokenizers.Encoding]] | None = None
            for texts in batches:
                ahead = thread.submit(self._encodings, texts)
                if running:
                    yield [encoding.ids for encoding in running.result()]
                running = ahead
            if running:
                yield [encoding.ids for encoding in running.result()]

    def _encodings(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        try:
            return self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            for text in texts:
                utf8(text)  # says which character it is
            raise

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; specials are left out, invalid UTF-8 becomes U+FFFD.

        Raises:
            ValueError: an id is outside [0, vocab_size).
        """
        return self._bytes_of(ids).decode("utf-8", errors="replace")

    def _bytes_of(self, ids: Iterable[int]) -> builtins.bytes:
        table = self.token_bytes
        parts = []
        for token in ids:
            if not 0 <= token < len(table):
                raise ValueError(f"token id must be in [0, {len(table)}), got {token}")
            parts.append(table[token])
        return b"".join(parts)

    @functools.cached_property
    def token_bytes(self) -> tuple[builtins.bytes, ...]:
        """The bytes each id stands for; b"" for special tokens and for ids nothing stands at."""
        vocab = self._inner.get_vocab(with_added_tokens=True)
        added = self._inner.get_added_tokens_decoder()
        special = {token for token, entry in added.items() if entry.special}
        value = byte_of_symbol()
        table = [b""] * (max(vocab.values()) + 1)
        for symbols, token in vocab.items():
            if token in special:
                continue
            if all(symbol in value for symbol in symbols):
                table[token] = bytes(value[symbol] for symbol in symbols)
            else:
                table[token] = symbols.encode("utf-8")
        return tuple(table)

    @functools.cached_property
    def byte_lengths(self) -> npt.NDArray[np.int32]:
        """How many bytes of text each id stands for, int32 [vocab_size]; 0 for specials."""
        return np.array([len(entry) for entry in self.token_bytes], dtype=np.int32)

    @functools.cached_property
    def digest(self) -> str:
        """blake2b (hex) over the tokenizer.json: equal digests, equal ids."""
        canonical = json.dumps(json.loads(self._inner.to_str()), sort_keys=True)
        return hashlib.blake2b(canonical.encode("utf-8"), digest_size=32).hexdigest()


def utf8(text: str) -> bytes:
    """The bytes of a text.

    Raises:
        ValueError: it holds a lone surrogate, which has none; the first one is named.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise ValueError(
            f"text must be of whole characters, got the surrogate {code} at place {error.start}; "
            "give it as UTF-8"
        ) from None
