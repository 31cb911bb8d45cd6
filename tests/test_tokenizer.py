"""Tokenizers: lossless, equal to transformers' GPT-2, streamable. pytest tests/test_tokenizer.py"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgpt.tokenizer import EOS, Tokenizer

TEXTS = [
    "def add(first, second):\n    return first + second\n\n\nadd(1, 2)  # it's three\n" * 5,
    "The cat sat on the mat; the cats' mats aren't the mats they'd want.\r\n\t" * 5,
    "\u00fcber caf\u00e9 na\u00efve \u4e2d\u6587 \U0001f642\U0001f642 \u0645\u0631\u062d " * 5,
]
HARD = [
    "",
    " ",
    "\n\n  \n",
    "  leading and trailing  ",
    "tabs\t\t\tand\r\nreturns\r",
    "it's they'll WE'VE don't 'tis",
    "1234567890 3.14 1e-5",
    "\x00\x01\x7f\x80\xad\xa0",
    "\u00e9 e\u0301 \u212b \ufb01 \u3000\u2028\u200d\ufeff",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u4e2d\u6587\u5b57",
    "a" * 300,
    f"text {EOS} text <|endoftext",
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(TEXTS, 320)


@pytest.fixture(scope="module", params=["bytes", "trained"])
def tokenizer(request: pytest.FixtureRequest, trained: Tokenizer) -> Tokenizer:
    return trained if request.param == "trained" else Tokenizer.bytes()


def in_library(tokenizer: Tokenizer, folder: Path) -> tokenizers.Tokenizer:
    """The same tokenizer as the `tokenizers` library reads it."""
    tokenizer.save(folder)
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def any_text() -> st.SearchStrategy[str]:
    pieces = st.sampled_from([EOS, "\x00", "the cat", "    return", "\u00e9", "\U0001f642", "\r\n"])
    return st.lists(st.text(max_size=20) | pieces, max_size=6).map("".join)


@given(text=any_text())
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_and_is_never_a_special_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert tokenizer.encode_batch([text, "", text]) == [ids, [], ids]
    assert b"".join(tokenizer.token_bytes[token] for token in ids) == text.encode()
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_batches_come_in_order_and_one_is_read_ahead() -> None:
    tokenizer = Tokenizer.bytes()
    batches = [[chr(0x61 + n) * n, "x"] for n in range(6)]
    read = 0

    def reading() -> Iterator[list[str]]:
        nonlocal read
        for batch in batches:
            read += 1
            yield batch

    for done, encoded in enumerate(tokenizer.encode_batches(reading()), 1):
        assert encoded == tokenizer.encode_batch(batches[done - 1])
        assert done <= read <= done + 1
    assert done == 6
    assert list(tokenizer.encode_batches([])) == []


def test_decode_agrees_with_the_library(trained: Tokenizer, tmp_path: Path) -> None:
    inner = in_library(trained, tmp_path)
    random = np.random.default_rng(0)
    for _ in range(200):
        ids = random.integers(0, trained.vocab_size, 30).tolist()
        assert trained.decode(ids) == inner.decode(ids, skip_special_tokens=True)


def test_bytes_are_their_own_ids() -> None:
    tokenizer = Tokenizer.bytes()
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.token_bytes == (*(bytes([value]) for value in range(256)), b"")
    assert tokenizer.encode("\u00e9\x00") == [0xC3, 0xA9, 0]
    assert tokenizer.byte_lengths.dtype == np.int32
    assert tokenizer.byte_lengths.tolist() == [1] * 256 + [0]


def test_training_is_deterministic_and_takes_the_size_asked_for(
    trained: Tokenizer,
) -> None:
    again = Tokenizer.train(iter(TEXTS), 320)
    assert again.digest == trained.digest
    assert (trained.vocab_size, trained.eos_id) == (320, 319)
    assert len(trained.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert Tokenizer.train(TEXTS, 321).digest != trained.digest


def test_little_text_gives_a_smaller_vocabulary() -> None:
    assert Tokenizer.train(["abab"], 5000).vocab_size == 259
    assert Tokenizer.train([], 257).vocab_size == 257
    with pytest.raises(ValueError, match=r"vocab_size must be at least 257.*got 256"):
        Tokenizer.train(["abab"], 256)


def test_text_full_of_the_special_tokens_spelling_does_not_learn_it() -> None:
    tokenizer = Tokenizer.train([EOS * 200], 400)
    assert tokenizer.eos_id not in tokenizer.encode(EOS)
    assert tokenizer.decode(tokenizer.encode(EOS)) == EOS


@pytest.mark.parametrize("token", [-1, 257])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    tokenizer = Tokenizer.bytes()
    with pytest.raises(ValueError, match=rf"token id must be in \[0, 257\), got {token}"):
        tokenizer.decode([0, token])


def test_save_and_load_and_transformers_agree(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPT2TokenizerFast

    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.digest == tokenizer.digest
    assert Tokenizer.load(tmp_path / "tokenizer.json").digest == tokenizer.digest
    assert loaded.decode(loaded.encode(EOS)) == EOS
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(theirs, GPT2TokenizerFast)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eos_id
    for text in HARD:
        ids = theirs(text, split_special_tokens=True)["input_ids"]
        assert tokenizer.encode(text) == loaded.encode(text) == ids, text
        assert theirs.decode(ids) == text


def test_vocab_and_merges_files_give_the_ids_of_transformers(
    trained: Tokenizer, tmp_path: Path
) -> None:
    from transformers import GPT2Tokenizer

    model = json.loads(in_library(trained, tmp_path).to_str())["model"]
    (tmp_path / "tokenizer.json").unlink()
    vocab = {**model["vocab"], EOS: trained.eos_id}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])])
    (tmp_path / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    ours = Tokenizer.load(tmp_path)
    theirs = GPT2Tokenizer.from_pretrained(tmp_path)
    assert (ours.vocab_size, ours.eos_id) == (len(theirs), theirs.eos_token_id)
    for text in [*HARD, *TEXTS]:
        ids = ours.encode(text)
        assert ids == theirs(text, split_special_tokens=True)["input_ids"], text
        assert ids == trained.encode(text)


def test_settings_of_a_foreign_file_that_lose_text_are_taken_off(
    trained: Tokenizer, tmp_path: Path
) -> None:
    inner = in_library(trained, tmp_path)
    inner.enable_truncation(4)
    inner.enable_padding(length=500)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode(TEXTS[0]) == trained.encode(TEXTS[0])


def make_word_level(inner: tokenizers.Tokenizer) -> None:
    inner.model = tokenizers.models.WordLevel({"a": 0, "[UNK]": 1, EOS: 2}, unk_token="[UNK]")


def add_prefix_space(inner: tokenizers.Tokenizer) -> None:
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)


def normalize(inner: tokenizers.Tokenizer) -> None:
    inner.normalizer = tokenizers.normalizers.NFC()


@pytest.mark.parametrize("change", [make_word_level, add_prefix_space, normalize])
def test_a_tokenizer_that_changes_text_is_refused_by_name(
    change: Callable[[tokenizers.Tokenizer], None], tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    inner = in_library(Tokenizer.bytes(), tmp_path)
    change(inner)
    inner.save(str(path))
    with pytest.raises(ValueError, match="must be byte-level") as raised:
        Tokenizer.load(path)
    assert str(path) in str(raised.value)


def test_a_tokenizer_without_the_special_token_is_refused(tmp_path: Path) -> None:
    text = in_library(Tokenizer.bytes(), tmp_path).to_str().replace("endoftext", "other")
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"must have the token <\|endoftext\|>"):
        Tokenizer.load(tmp_path)


def test_load_says_what_is_wrong_with_the_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"that exists.*got 'nowhere'"):
        Tokenizer.load("nowhere")
    with pytest.raises(ValueError, match=r"must have tokenizer.json, or vocab.json and merges.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer files must be readable") as raised:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(raised.value)


def test_gpt2_comes_from_the_cache_without_the_network(
    trained: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    repo = tmp_path / "models--gpt2"
    snapshot = repo / "snapshots" / ("0" * 40)
    trained.save(snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert Tokenizer.load("gpt2").digest == trained.digest
    shutil.rmtree(repo)
    asked = []

    def unreachable(repo: str, file: str, *, local_files_only: bool) -> str:
        asked.append(local_files_only)
        raise huggingface_hub.errors.LocalEntryNotFoundError("no\nroute")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(
        ValueError, match=r"gpt2 is neither in .* path of .* bytes or bpe"
    ) as raised:
        Tokenizer.load("gpt2")
    assert asked == [True, False]
    assert "\n" not in str(raised.value)
