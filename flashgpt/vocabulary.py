"""Vocabularies of a byte-level BPE, as GPT-2's: made, read from files, and looked at.

Owns GPT-2's stand-ins for bytes, the files and what can be wrong with them. Works with the objects
of the `tokenizers` library; what is done with one is `flashgpt.tokenizer`'s.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

EOS = "<|endoftext|>"
VOCAB, MERGES = "vocab.json", "merges.txt"
MOST_IDS = 2**20  # tables have a place for each; the largest vocabularies in use have a quarter
PICKLE = b"\x80"  # the first byte of one since protocol 2; JSON cannot begin with it


@functools.cache
def byte_of_symbol() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself, or a character from U+0100 up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (value for value in range(256) if value not in printable)
    return {chr(value): value for value in sorted(printable)} | {
        chr(0x100 + place): value for place, value in enumerate(others)
    }


def byte_level(model: tokenizers.models.Model) -> tokenizers.Tokenizer:
    """A tokenizer that splits text as GPT-2's does, without special tokens."""
    import tokenizers

    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return inner


def with_eos(model: tokenizers.models.Model) -> tokenizers.Tokenizer:
    """`byte_level` and the special token `<|endoftext|>`: its id, or the next one there is."""
    import tokenizers

    inner = byte_level(model)
    inner.add_special_tokens([tokenizers.AddedToken(EOS, special=True, normalized=False)])
    return inner


def check_ids(vocab: Mapping[str, int]) -> None:
    """Refuses ids that no table of tokens can hold.

    Raises:
        ValueError: an id of `MOST_IDS` or more, or one that two tokens share.
    """
    if (largest := max(vocab.values(), default=0)) >= MOST_IDS:
        raise ValueError(f"tokenizer ids must be below {MOST_IDS:,}, got {largest:,}")
    token_of: dict[int, str] = {}
    for token, id_ in vocab.items():
        if (other := token_of.setdefault(id_, token)) != token:
            pair = " and ".join(sorted((repr(other), repr(token))))
            raise ValueError(
                f"tokenizer must give each token an id of its own, got {id_} for {pair}"
            )


def read(path: Path) -> tokenizers.Tokenizer:
    """A tokenizer from a tokenizer.json, or a folder with one, or with vocab.json and merges.txt.

    Raises:
        ValueError: a file is missing, damaged, of another kind, or does not fit the other.
    """
    import tokenizers

    file = path / "tokenizer.json" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        return _read_merges(path)
    if file.name in (VOCAB, MERGES):
        raise ValueError(f"{VOCAB} and {MERGES} belong together; name the folder that holds both")
    with file.open("rb") as opened:
        if opened.read(1) == PICKLE:
            raise ValueError(
                "it is a pickle, which may hold code, and is not read. nanoGPT's meta.pkl lists "
                "characters and knows no others: convert its model without a tokenizer, or train "
                "anew on the text with --data.tokenizer bytes"
            )
    with _readable():
        return tokenizers.Tokenizer.from_file(str(file))


def _read_merges(folder: Path) -> tokenizers.Tokenizer:
    """A tokenizer from vocab.json and merges.txt.

    A merges.txt that is cut short would be read without a word, and give other ids.
    """
    from tokenizers import models

    files = [folder / VOCAB, folder / MERGES]
    if missing := [file.name for file in files if not file.exists()]:
        also = f"; it lacks {missing[0]}" if len(missing) == 1 else ""
        raise ValueError(
            f"tokenizer folder must have tokenizer.json, or {VOCAB} and {MERGES}{also}"
        )
    with _readable():
        vocab, merges = models.BPE.read_file(*map(str, files))
        model = models.BPE(vocab, merges)
    made = {first + second for first, second in merges} | byte_of_symbol().keys()
    # What people add to a vocabulary is bracketed: <|endoftext|>, <pad>, [SEP].
    added = re.compile(r"<.*>|\[.*\]", re.DOTALL)
    if orphans := [token for token in vocab.keys() - made if not added.fullmatch(token)]:
        first = min(orphans, key=vocab.__getitem__)
        raise ValueError(
            f"{MERGES} must make every token of {VOCAB}, got {len(orphans):,} that it does not, "
            f"the first {first!r} (id {vocab[first]}); it is cut short, or another tokenizer's"
        )
    return with_eos(model)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """The library raises plain Exception for every kind of broken file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"tokenizer files must be readable, got: {error}") from error


def gpt2_file() -> str:
    """Where GPT-2's tokenizer.json lies: in the Hugging Face cache, if need be after a download.

    Raises:
        ValueError: neither cached nor reachable.
    """
    import huggingface_hub

    for cached_only in (True, False):
        try:
            return huggingface_hub.hf_hub_download(
                "gpt2", "tokenizer.json", local_files_only=cached_only
            )
        except OSError as error:
            cause = error
    raise ValueError(
        "tokenizer gpt2 is neither in the Hugging Face cache nor can it be downloaded; give the "
        "path of a GPT-2 tokenizer.json, or use bytes or bpe"
    ) from cause
