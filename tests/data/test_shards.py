"""Prepared folders: exact, reused, checked, never overwritten. pytest tests/data/test_shards.py"""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashgpt.data import encode
from flashgpt.data import prepare as preparing
from flashgpt.data.prepare import prepare
from flashgpt.data.shards import TokenData, TokenSplit
from flashgpt.runconfig import DataConfig
from flashgpt.tokenizer import EOS, Tokenizer


def make_corpus(root: Path, count: int) -> list[str]:
    """Files of distinct text; returns the texts in the order of the corpus."""
    root.mkdir(parents=True)
    texts = [f"# {n}\r\ndef f{n}():\n    return {n} \u00e9\U0001f642 {EOS}\n" for n in range(count)]
    for number, text in enumerate(texts):
        (root / f"{number:03d}.py").write_text(text, encoding="utf-8", newline="")
    return texts


def texts_of(split: TokenSplit, tokenizer: Tokenizer) -> list[str]:
    """What the tokens of a split say, one text a document, read by the closing token."""
    ids = np.concatenate(split.tokens).tolist()
    ends = [place for place, token in enumerate(ids) if token == tokenizer.eos_id]
    assert ends[-1] == len(ids) - 1
    edges = [-1, *ends]
    return [tokenizer.decode(ids[a + 1 : b]) for a, b in itertools.pairwise(edges)]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    make_corpus(tmp_path / "code", 40)
    return DataConfig((str(tmp_path / "code"),), "bpe", 300, cache=str(tmp_path / "cache"))


@pytest.fixture
def prepared(config: DataConfig) -> Path:
    return prepare(config)


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes", "path"])
@pytest.mark.parametrize("shard_tokens", [64, 100_000_000])
def test_tokens_are_the_text_with_whole_documents_held_out(
    tokenizer: str, shard_tokens: int, tmp_path: Path
) -> None:
    texts = make_corpus(tmp_path / "code", 40)
    if tokenizer == "path":
        tokenizer = str(tmp_path / "mine")
        Tokenizer.train(texts[:5], 290).save(tokenizer)
    data = DataConfig((str(tmp_path / "code"),), tokenizer, 2000, cache=str(tmp_path / "cache"))
    opened = TokenData.open(prepare(data, shard_tokens=shard_tokens))
    train = texts_of(opened.train, opened.tokenizer)
    val = texts_of(opened.val, opened.tokenizer)
    assert len(val) == 2
    assert sorted(train + val) == sorted(texts)
    assert [text for text in texts if text in train] == train
    for split, said in ((opened.train, train), (opened.val, val)):
        assert split.n_documents == len(said)
        assert split.n_tokens == sum(len(opened.tokenizer.encode(text)) + 1 for text in said)
        assert split.n_bytes == sum(len(text.encode()) for text in said)
        assert [len(shard) for shard in split.tokens[:-1]] == [shard_tokens] * (
            len(split.tokens) - 1
        )
        assert 0 < len(split.tokens[-1]) <= shard_tokens
        assert all(shard.dtype == np.uint16 for shard in split.tokens)
        assert_starts_follow_ends(split, opened.tokenizer.eos_id)
    assert opened.vocab_size == opened.tokenizer.vocab_size
    if tokenizer == "bpe":
        assert opened.tokenizer.digest == Tokenizer.train(train, 2000).digest


def assert_starts_follow_ends(split: TokenSplit, eos_id: int) -> None:
    before = eos_id
    for ids, starts in zip(split.tokens, split.starts, strict=True):
        previous = np.concatenate([[before], ids[:-1]])
        np.testing.assert_array_equal(starts, np.flatnonzero(previous == eos_id))
        before = ids[-1]


@pytest.mark.parametrize("count", [1, 7, 19])
@pytest.mark.parametrize("shard_tokens", [50, 100_000_000])
def test_few_documents_give_the_last_tokens_to_validation(
    count: int, shard_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH", 16)
    monkeypatch.setattr(encode, "PART_BATCHES", 2)
    texts = make_corpus(tmp_path / "code", count)
    data = DataConfig((str(tmp_path / "code"),), "bytes", cache=str(tmp_path / "cache"))
    opened = TokenData.open(prepare(data, shard_tokens=shard_tokens))
    train, val = (np.concatenate(split.tokens).tolist() for split in (opened.train, opened.val))
    whole = [token for text in texts for token in [*text.encode(), 256]]
    assert train + val == whole
    assert len(val) == round(len(whole) / 20)
    assert opened.train.n_bytes + opened.val.n_bytes == sum(len(text.encode()) for text in texts)
    assert opened.val.starts[0][0] == 0
    assert opened.train.n_documents + opened.val.n_documents == count + 1


def test_a_document_longer_than_a_piece_is_one_document(tmp_path: Path) -> None:
    text = "".join(f"line {n} of a long file\n" for n in range(20_000))
    (tmp_path / "long.txt").write_text(text)
    data = DataConfig((str(tmp_path / "long.txt"),), "bpe", 400, cache=str(tmp_path / "cache"))
    told: list[tuple[int, int, str]] = []
    opened = TokenData.open(prepare(data, progress=lambda *args: told.append(args)))
    ids = np.concatenate([*opened.train.tokens, *opened.val.tokens]).tolist()
    assert ids == [*opened.tokenizer.encode(text), opened.tokenizer.eos_id]
    assert (opened.train.n_documents, opened.val.n_documents) == (1, 1)
    assert list(dict.fromkeys(phase for _, _, phase in told)) == [
        "reading",
        "training the tokenizer",
        "encoding",
    ]
    assert [told[-1][:2]] == [(len(text), len(text))]
    assert all(0 < done <= total for done, total, _ in told)


def test_a_vocabulary_past_uint16_is_kept_in_uint32(tmp_path: Path) -> None:
    import tokenizers

    make_corpus(tmp_path / "code", 20)
    Tokenizer.bytes().save(tmp_path / "wide")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "wide" / "tokenizer.json"))
    inner.add_tokens([f"filler{n}" for n in range(1 << 16)] + ["return"])
    inner.save(str(tmp_path / "wide" / "tokenizer.json"))
    data = DataConfig((str(tmp_path / "code"),), str(tmp_path / "wide"), cache=str(tmp_path / "c"))
    opened = TokenData.open(prepare(data))
    assert opened.train.tokens[0].dtype == np.uint32
    assert int(opened.train.tokens[0].max()) == 257 + (1 << 16)
    assert "return" in texts_of(opened.train, opened.tokenizer)[0]


def test_equal_requests_find_the_folder_again(config: DataConfig, prepared: Path) -> None:
    assert prepared.parent == Path(config.cache)
    assert re.fullmatch(r"code-bpe-[0-9a-f]{12}", prepared.name)
    made = (prepared / "dataset.json").stat().st_mtime_ns
    assert prepare(config) == prepared
    assert (prepared / "dataset.json").stat().st_mtime_ns == made
    assert os.listdir(config.cache) == [prepared.name]


def test_moving_the_corpus_keeps_the_folder(config: DataConfig, prepared: Path) -> None:
    old = Path(config.source[0])
    new = old.parent / "elsewhere" / "code"
    new.parent.mkdir()
    old.rename(new)
    assert prepare(DataConfig((str(new),), "bpe", 300, config.cache)) == prepared


def test_other_text_names_tokenizer_or_size_make_another_folder(
    config: DataConfig, prepared: Path
) -> None:
    source = Path(config.source[0])
    made = {prepared}
    made.add(prepare(DataConfig(config.source, "bpe", 301, config.cache)))
    made.add(prepare(DataConfig(config.source, "bytes", 300, config.cache)))
    made.add(prepare(config, shard_tokens=64))
    (source / "000.py").write_text("other text")
    made.add(prepare(config))
    (source / "000.py").rename(source / "000.txt")
    made.add(prepare(config))
    assert len(made) == 6
    bytes_made = prepare(DataConfig(config.source, "bytes", 300, config.cache))
    assert prepare(DataConfig(config.source, "bytes", 999, config.cache)) == bytes_made


def test_preparing_twice_gives_equal_bytes(config: DataConfig, tmp_path: Path) -> None:
    first, second = (prepare(config, out=tmp_path / name) for name in ("one", "two"))
    assert sorted(os.listdir(first)) == sorted(os.listdir(second))
    for name in os.listdir(first):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


FILES = ["train-00000.bin", "val-00000.bin", "train-00000.docs.npy", "tokenizer.json"]
FILES += ["tokenizer_config.json", "val-00000.docs.npy"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["flip", "truncate", "lengthen", "remove"])
def test_damage_is_named_and_repaired_by_preparing_again(
    name: str, harm: str, config: DataConfig, prepared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = prepared / name
    content = path.read_bytes()
    harmed = bytearray(content)
    harmed[-1] ^= 1
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(
            {"flip": harmed, "truncate": content[:-2], "lengthen": content + b"  "}[harm]
        )
    with pytest.raises(ValueError, match=rf"{name} is damaged or missing; run flashgpt prepare"):
        TokenData.open(prepared)
    with caplog.at_level(logging.WARNING):
        assert prepare(config) == prepared
    assert "preparing again" in caplog.text
    assert path.read_bytes() == content
    TokenData.open(prepared)


def test_a_changed_or_cut_record_is_damage(config: DataConfig, prepared: Path) -> None:
    path = prepared / "dataset.json"
    content = path.read_text()
    for harmed in (content.replace('"bytes": 1', '"bytes": 2'), content[:-9], "[]", ""):
        assert harmed != content
        path.write_text(harmed)
        with pytest.raises(ValueError, match=r"dataset\.json is damaged or missing"):
            TokenData.open(prepared)
    assert prepare(config) == prepared
    assert path.read_text() == content
    path.unlink()
    with pytest.raises(ValueError, match=r"no prepared folder: no dataset\.json; run flashgpt"):
        TokenData.open(prepared)
    assert prepare(config) == prepared
    assert path.read_text() == content


def forge(folder: Path, **changes: Any) -> None:
    """Rewrites dataset.json as its writer would have, so that every digest holds."""
    path = folder / "dataset.json"
    record = json.loads(path.read_text()) | changes
    del record["digest"]
    for name in record["files"]:
        content = (folder / name).read_bytes()
        record["files"][name] = hashlib.blake2b(content, digest_size=32).hexdigest()
    text = json.dumps(record, sort_keys=True).encode()
    record["digest"] = hashlib.blake2b(text, digest_size=32).hexdigest()
    path.write_text(json.dumps(record))


def patch_header(path: Path, word: int, value: int) -> None:
    content = bytearray(path.read_bytes())
    content[4 * word : 4 * word + 4] = value.to_bytes(4, "little")
    path.write_bytes(content)


def test_a_newer_format_names_the_version_needed(prepared: Path) -> None:
    forge(prepared)
    TokenData.open(prepared)
    patch_header(prepared / "train-00000.bin", 1, 7)
    forge(prepared)
    with pytest.raises(ValueError, match=r"train-00000\.bin has format 7.*reads formats up to 2"):
        TokenData.open(prepared)
    forge(prepared, format=9)
    with pytest.raises(ValueError, match=r"dataset\.json has format 9.*that reads format 9"):
        TokenData.open(prepared)


@pytest.mark.parametrize(("word", "value"), [(0, 1), (2, 4), (2, 3), (3, 5), (4, 1), (5, 298)])
def test_a_header_that_does_not_fit_its_file_is_damage(
    word: int, value: int, prepared: Path
) -> None:
    patch_header(prepared / "train-00000.bin", word, value)
    forge(prepared)
    with pytest.raises(ValueError, match=r"train-00000\.bin is damaged"):
        TokenData.open(prepared)


def test_ids_past_the_vocabulary_are_refused(prepared: Path) -> None:
    path = prepared / "val-00000.bin"
    content = bytearray(path.read_bytes())
    content[-2:] = (60_000).to_bytes(2, "little")
    path.write_bytes(content)
    patch_header(path, 5, 60_000)
    forge(prepared)
    with pytest.raises(ValueError, match=r"below the tokenizer's 300, got 60000 in .*val-00000"):
        TokenData.open(prepared)


def test_the_header_is_as_documented(prepared: Path) -> None:
    opened = TokenData.open(prepared)
    header = np.fromfile(prepared / "train-00000.bin", "<i4", 256)
    assert header[0].tobytes() == b"FGPT"
    highest = int(opened.train.tokens[0].max())
    assert header[1:6].tolist() == [1, 2, opened.train.n_tokens, 0, highest]
    assert not header[6:].any()


def test_out_is_made_reused_and_never_overwritten(config: DataConfig, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    assert prepare(config, out=out) == out
    made = (out / "dataset.json").stat().st_mtime_ns
    assert prepare(config, out=out) == out
    assert (out / "dataset.json").stat().st_mtime_ns == made
    assert not Path(config.cache).exists()
    other = DataConfig(config.source, "bytes", cache=config.cache)
    with pytest.raises(ValueError, match=r"out must be .* got .*mine, which is something else"):
        prepare(other, out=out)
    assert (out / "dataset.json").stat().st_mtime_ns == made
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("text")
    for place in (precious, precious / "thesis.txt"):
        with pytest.raises(ValueError, match="choose another folder or delete it"):
            prepare(config, out=place)
    assert (precious / "thesis.txt").read_text() == "text"
    assert os.listdir(precious) == ["thesis.txt"]


def test_a_prepared_folder_is_a_source(prepared: Path, config: DataConfig, tmp_path: Path) -> None:
    source = (str(prepared),)
    assert prepare(DataConfig(source, cache=str(tmp_path / "new"))) == prepared
    assert prepare(DataConfig(source, "bpe", 300)) == prepared
    assert prepare(DataConfig(source, str(prepared))) == prepared
    assert not (tmp_path / "new").exists()
    for wrong in (DataConfig(source, "bpe", 400), DataConfig(source, "bytes")):
        with pytest.raises(ValueError, match="must be those of the prepared folder"):
            prepare(wrong)
    with pytest.raises(ValueError, match="out must be left out for a prepared folder"):
        prepare(DataConfig(source), out=tmp_path / "out")
    as_bytes = prepare(DataConfig(config.source, "bytes", cache=config.cache))
    with pytest.raises(ValueError, match=r"with another tokenizer .* prepare TEXT --tokenizer"):
        prepare(DataConfig(source, str(as_bytes)))
    assert prepare(DataConfig((str(as_bytes),))) == as_bytes
    (prepared / "val-00000.bin").unlink()
    with pytest.raises(ValueError, match=r"val-00000\.bin is damaged or missing"):
        prepare(DataConfig(source))


def test_a_full_disk_is_one_line_and_leaves_no_trace(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preparing.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device; free space there or") as raised:
        prepare(config)
    assert raised.value.errno == errno.ENOSPC
    assert "\n" not in str(raised.value)
    assert os.listdir(config.cache) == []


def test_text_that_changes_meanwhile_is_not_kept(config: DataConfig) -> None:
    def append(done: int, total: int, phase: str) -> None:
        if phase == "training the tokenizer":
            with (Path(config.source[0]) / "039.py").open("a") as file:
                file.write("more")

    with pytest.raises(ValueError, match="must not change while it is read"):
        prepare(config, progress=append)
    assert os.listdir(config.cache) == []


def test_a_cache_that_is_a_file_is_named(config: DataConfig) -> None:
    Path(config.cache).write_text("text")
    with pytest.raises(OSError, match=r"cannot be written to .*cache.*choose another folder"):
        prepare(config)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks on folders")
def test_a_second_prepare_waits_for_the_first(config: DataConfig) -> None:
    import fcntl

    cache = Path(config.cache)
    cache.mkdir()
    waiting = threading.Event()
    phases: list[str] = []

    def tell(done: int, total: int, phase: str) -> None:
        phases.append(phase)
        if phase == "waiting for another prepare":
            waiting.set()

    first = os.open(cache, os.O_RDONLY)
    fcntl.flock(first, fcntl.LOCK_EX)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        second = pool.submit(prepare, config, progress=tell)
        try:
            assert waiting.wait(timeout=10)
            assert os.listdir(cache) == []
        finally:
            os.close(first)
        made = second.result(timeout=30)
    assert os.listdir(cache) == [made.name]
    assert phases.index("waiting for another prepare") < phases.index("encoding")


def test_what_is_left_out_is_said(config: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    (Path(config.source[0]) / "image.png").write_bytes(b"\x89PNG\x00")
    with caplog.at_level(logging.WARNING):
        opened = TokenData.open(prepare(config))
    assert "not UTF-8 text: 1 (code/image.png)" in caplog.text
    assert opened.train.n_documents + opened.val.n_documents == 40


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.txt"
    path.write_text("ab")
    with pytest.raises(ValueError, match="must hold at least 4 tokens, got 3"):
        prepare(DataConfig((str(path),), "bytes", cache=str(tmp_path / "cache")))
    assert os.listdir(tmp_path / "cache") == []
    path.write_text("abc")
    opened = TokenData.open(prepare(DataConfig((str(path),), "bytes", cache=str(tmp_path / "c"))))
    assert (opened.train.n_tokens, opened.val.n_tokens) == (2, 2)


def test_a_bad_tokenizer_is_refused_before_any_text_is_read(config: DataConfig) -> None:
    shutil.rmtree(config.source[0])
    with pytest.raises(ValueError, match="tokenizer must be"):
        prepare(DataConfig(config.source, "nonsense", cache=config.cache))


def test_a_folder_describes_itself(prepared: Path) -> None:
    opened = TokenData.open(prepared)
    line = opened.describe()
    assert line.startswith(f"code: {opened.train.n_tokens:,} training tokens")
    assert "(0.00 MB, 38 documents)" in line
    assert line.endswith("vocabulary 300")
    assert "\n" not in line


def test_plain_text_gives_the_same_folder_forever(tmp_path: Path) -> None:
    make_corpus(tmp_path / "code", 40)
    data = DataConfig((str(tmp_path / "code"),), "bytes", cache=str(tmp_path / "cache"))
    record = json.loads((prepare(data) / "dataset.json").read_text())
    # A change of these would end the resuming of every run on such text.
    assert record["format"] == 1
    assert record["fingerprint"][:16] == "51bb801d50a856b0"
    assert {name: digest[:16] for name, digest in record["files"].items() if "-" in name} == {
        "train-00000.bin": "846e44ffb50d0f53",
        "train-00000.docs.npy": "f41de03fa5c9a789",
        "val-00000.bin": "66bf47e41b7fcd9b",
        "val-00000.docs.npy": "ddd7bb1bd9d815b6",
    }
