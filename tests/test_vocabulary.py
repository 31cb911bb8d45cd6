"""GPT-2's ids, from GPT-2's files, judged by a plain reading of its rule and by transformers.

transformers' class and ours both stand on the `tokenizers` library, so a third encoder is written
out here: GPT-2's pattern and lowest-rank merging, on nothing but `regex`.

pytest tests/test_vocabulary.py
"""

from __future__ import annotations

import functools
import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgpt.tokenizer import EOS, Tokenizer

TEXTS = [
    "def add(first, second):\n    return first + second\n\n\nadd(1, 2)  # it's three\n" * 5,
    "The cat sat on the mat; the cats' mats aren't the mats they'd want.\r\n\t" * 5,
    "\u00fcber caf\u00e9 na\u00efve \u4e2d\u6587\u5b57 \U0001f642\U0001f642 \u0645\u0631\u062d "
    * 5,
    "1234 5678 3.14 = x ** 2 != y  \n" * 5,
]
HARD = {
    "nothing": "",
    "emoji joined": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308",
    "flags and skins": "\U0001f1e9\U0001f1ea\U0001f44d\U0001f3fd",
    "combining": "e\u0301 a\u0308\u0323 \u0915\u094d\u0937\u093f Z\u0351\u036b\u0343a\u0332lgo",
    "compatibility": "\u00e9\u212b\ufb01\u2460\u00bd \u2167 \uff21",
    "line ends": "one\r\ntwo\rthree\n\r\n\n four\u2028five\u0085six\x0bseven\x0ceight",
    "spaces": "a  b   c\t\t\td\u00a0\u00a0e\u3000f\u200bg \n \n  \t end   ",
    "contractions": "it's WE'VE they'll I'd 'tis don''t 're''s we\u2019re o'clock 'S",
    "numbers": "1234567890 3.14 1e-5 \u0663\u0664 \u4e00\u4e8c \u00b2\u00b3 0x1F 1_000",
    "cjk": "\u4e2d\u6587\u3001\u65e5\u672c\u8a9e\u3002\ud55c\uad6d \U00020000",
    "right to left": "\u05e9\u05dc\u05dd \u200f\u0645\u0631\u062d\u0628\u064b\u202e abc\u202c",
    "control": "".join(map(chr, range(32))) + "\x7f" + "".join(map(chr, range(0x80, 0xA0))),
    "no characters": "\ufffe\uffff\ufeff\ufffd\U0010ffff",
    "escaped surrogates": "\\ud83d\\ude00 \\udcff",
    "special spelt": f"a{EOS}{EOS} b<|endoftext <|pad|>",
    "punctuation": "!!!???...---===>>> (((a))) \"'`~@#$%^&*",
}  # fmt: skip
PATTERN = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.train(TEXTS, 400)


@pytest.fixture(scope="module")
def model(gpt2: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Vocabulary and merges of `gpt2`, as its tokenizer.json has them."""
    folder = tmp_path_factory.mktemp("trained")
    gpt2.save(folder)
    found: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())["model"]
    return {**found, "vocab": {**found["vocab"], EOS: gpt2.eos_id}}


def write(folder: Path, model: dict[str, Any]) -> Path:
    """vocab.json and merges.txt, as OpenAI and transformers write them."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(model: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("files"), model)


class Plain:
    """GPT-2's encoder, written out (Radford et al. 2019, section 2.2)."""

    def __init__(self, model: dict[str, Any]) -> None:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        rest = itertools.count(0x100)
        self.symbol = [chr(b if b in printable else next(rest)) for b in range(256)]
        self.rank = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
        self.vocab = model["vocab"]

    def encode(self, text: str) -> list[int]:
        return [id_ for word in PATTERN.findall(text) for id_ in self.word(word)]

    @functools.cache  # noqa: B019  # lives as long as its module's tests
    def word(self, word: str) -> tuple[int, ...]:
        parts = [self.symbol[byte] for byte in word.encode()]
        while True:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: self.rank.get(pair, 10**9), default=None)
            if best not in self.rank:
                return tuple(self.vocab[part] for part in parts)
            at = pairs.index(best)
            parts[at : at + 2] = ["".join(best)]


@pytest.fixture(scope="module")
def plain(model: dict[str, Any]) -> Plain:
    return Plain(model)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Callable[[str], list[int]]:
    """transformers' GPT2Tokenizer on the same two files; specials are text."""
    from transformers import GPT2Tokenizer, GPT2TokenizerFast

    found = [kind.from_pretrained(folder) for kind in (GPT2Tokenizer, GPT2TokenizerFast)]

    def encode(text: str) -> list[int]:
        one, other = (kind(text, split_special_tokens=True)["input_ids"] for kind in found)
        assert one == other
        return list(one)

    return encode


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.mark.parametrize("text", HARD.values(), ids=HARD)
def test_hard_texts_have_gpt2s_ids(
    text: str, ours: Tokenizer, plain: Plain, theirs: Callable[[str], list[int]]
) -> None:
    ids = ours.encode(text)
    assert ids == plain.encode(text) == theirs(text)
    assert ours.decode(ids) == text and ours.eos_id not in ids


def mixed() -> st.SearchStrategy[str]:
    pieces = st.sampled_from([*HARD.values(), " ", "  ", "\n", "the cat", " return", "'ll", "'"])
    return st.lists(st.text(max_size=12) | pieces, max_size=8).map("".join)


@given(text=mixed())
@settings(max_examples=300, deadline=None)
def test_any_text_has_gpt2s_ids(
    text: str, ours: Tokenizer, plain: Plain, theirs: Callable[[str], list[int]]
) -> None:
    ids = ours.encode(text)
    assert ids == plain.encode(text) == theirs(text)
    assert ours.decode(ids) == text


@pytest.mark.parametrize("unit", ["a", " ", "the cat ", "\n", "\u4e2d", "\U0001f642\u200d", "'s"])
def test_very_long_runs_have_gpt2s_ids(
    unit: str, ours: Tokenizer, theirs: Callable[[str], list[int]]
) -> None:
    text = unit * 30_000
    ids = ours.encode(text)
    assert ids == theirs(text) and ours.decode(ids) == text


@given(raw=st.binary(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_bytes_have_ids_and_come_back(raw: bytes, ours: Tokenizer) -> None:
    """Where the text of a stream is cut within a character, its ids are bytes all the same."""
    tokenizer = Tokenizer.bytes()
    assert b"".join(tokenizer.token_bytes[id_] for id_ in raw) == raw
    assert tokenizer.decode(raw) == raw.decode("utf-8", errors="replace")
    id_of = {part: id_ for id_, part in enumerate(ours.token_bytes) if len(part) == 1}
    ids = [id_of[bytes([byte])] for byte in raw]
    assert b"".join(ours.token_bytes[id_] for id_ in ids) == raw
    assert ours.decode(ids) == raw.decode("utf-8", errors="replace")


def test_a_special_token_is_one_where_its_id_is_written_and_nowhere_else(
    folder: Path, ours: Tokenizer
) -> None:
    from transformers import GPT2Tokenizer

    theirs = GPT2Tokenizer.from_pretrained(folder)
    read = theirs(f"one{EOS} two")["input_ids"]
    assert read == [*ours.encode("one"), ours.eos_id, *ours.encode(" two")]
    assert ours.decode(read) == "one two" == theirs.decode(read, skip_special_tokens=True)
    assert ours.eos_id not in ours.encode(f"one{EOS} two")


@pytest.mark.parametrize(("text", "code"), [("ab\ud800", "U+D800"), ("ab\udcff!", "U+DCFF")])
def test_half_a_character_is_refused(text: str, code: str, ours: Tokenizer) -> None:
    wanted = rf"whole characters, got the surrogate {code.replace('+', '[+]')} at place 2"
    for tokenizer in (ours, Tokenizer.bytes()):
        with pytest.raises(ValueError, match=wanted):
            tokenizer.encode(text)
        with pytest.raises(ValueError, match=wanted):
            tokenizer.encode_batch(["fine", text])


def test_line_ends_of_windows_are_no_matter(
    model: dict[str, Any], tmp_path: Path, ours: Tokenizer
) -> None:
    write(tmp_path, model)
    content = (tmp_path / "merges.txt").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "merges.txt").write_bytes(content)
    assert Tokenizer.load(tmp_path).digest == ours.digest


def test_bracketed_additions_need_no_merge(model: dict[str, Any], tmp_path: Path) -> None:
    more = {**model["vocab"], "<pad>": 400, "[SEP]": 401}
    found = Tokenizer.load(write(tmp_path, {**model, "vocab": more}))
    assert found.vocab_size == 402
    assert found.decode(found.encode("<pad>[SEP]")) == "<pad>[SEP]"


def _cut(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def _vocab(folder: Path, change: Callable[[dict[str, int]], object]) -> None:
    path = folder / "vocab.json"
    vocab = json.loads(path.read_text())
    change(vocab)
    path.write_text(json.dumps(vocab))


# What is done to a good folder, and what must be said of it.
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "merges cut at a line": (
        lambda p: (p / "merges.txt").write_text(
            "".join((p / "merges.txt").read_text().splitlines(keepends=True)[:100])
        ),
        r"merges\.txt must make every token of vocab\.json, got 14 that it does not, the first "
        r"'.*' \(id \d+\); it is cut short, or another tokenizer's",
    ),
    "merges empty": (
        lambda p: (p / "merges.txt").write_text(""),
        "got 113 that it does not, the first",
    ),
    "merges cut in a line": (lambda p: _cut(p / "merges.txt", 0.5), "merges"),
    "merges of another tokenizer": (
        lambda p: (p / "merges.txt").write_text("#version: 0.2\nq z\nqz q\n"),
        "files must be readable, got: .*`qz` out of vocabulary",
    ),
    "merges of three": (lambda p: (p / "merges.txt").write_text("a b c\n"), "files must be read"),
    "merges no text": (lambda p: (p / "merges.txt").write_bytes(b"\xff\xfe q"), "valid UTF-8"),
    "merges missing": (lambda p: (p / "merges.txt").unlink(), r"; it lacks merges\.txt"),
    "vocabulary cut": (lambda p: _cut(p / "vocab.json", 0.5), "files must be readable"),
    "vocabulary missing": (lambda p: (p / "vocab.json").unlink(), r"; it lacks vocab\.json"),
    "vocabulary a list": (lambda p: (p / "vocab.json").write_text("[1]"), "files must be readable"),
    "a byte missing": (lambda p: _vocab(p, lambda v: v.pop("q")), "must be byte-level"),
    "one id twice": (
        lambda p: _vocab(p, lambda v: v.update(q=v["z"])),
        r"must give each token an id of its own, got \d+ for 'q' and 'z'",
    ),
    "no id": (lambda p: _vocab(p, lambda v: v.update(q=-1)), "files must be readable"),
    "an enormous id": (
        lambda p: _vocab(p, lambda v: v.update(q=2**32 - 1)),
        "ids must be below 1,048,576, got 4,294,967,295",
    ),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGED.values(), ids=DAMAGED)
def test_files_that_are_damaged_or_do_not_fit_are_one_line(
    damage: Callable[[Path], object], says: str, model: dict[str, Any], tmp_path: Path
) -> None:
    damage(write(tmp_path, model))
    with pytest.raises(ValueError, match=says) as raised:
        Tokenizer.load(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_half_of_a_tokenizer_is_refused_with_the_remedy(name: str, folder: Path) -> None:
    with pytest.raises(ValueError, match="belong together; name the folder that holds both"):
        Tokenizer.load(folder / name)


class Trap:
    """What runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    for name, content in (
        ("meta.pkl", {"vocab_size": 2, "stoi": {"a": 0, "b": 1}, "itos": {0: "a", 1: "b"}}),
        ("trap.pkl", Trap(tmp_path / "ran")),
    ):
        (tmp_path / name).write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=r"is a pickle.*not read.*--data\.tokenizer bytes"):
            Tokenizer.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()
