"""JSON lines: each line a document, only completions count. pytest tests/data/test_jsonl.py"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgpt.data import corpus, encode
from flashgpt.data.corpus import held_out, survey
from flashgpt.data.files import find_files
from flashgpt.data.prepare import prepare
from flashgpt.data.shards import TokenData, TokenSplit
from flashgpt.runconfig import DataConfig
from flashgpt.tokenizer import Tokenizer


def write(path: Path, objects: Sequence[Any], between: str = "") -> Path:
    """A .jsonl file; `between` stands in front of every line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{between}{json.dumps(entry)}\n" for entry in objects))
    return path


def opened(
    *sources: Path, tokenizer: str = "bytes", field: str = "text", shard_tokens: int = 10**8
) -> TokenData:
    """The sources prepared in a folder beside the first."""
    data = DataConfig(
        tuple(map(str, sources)), tokenizer, 300, str(sources[0].parent / "cache"), field
    )
    return TokenData.open(prepare(data, shard_tokens=shard_tokens))


def tokens_of(split: TokenSplit) -> list[tuple[int, bool]]:
    """Every token of a split, and whether it counts as a target."""
    found = []
    for number, ids in enumerate(split.tokens):
        ignored = split.ignored.get(number, np.zeros(len(ids), np.bool_))
        found += list(zip(ids.tolist(), (~ignored).tolist(), strict=True))
    return found


def documents_of(split: TokenSplit, eos_id: int) -> list[list[tuple[int, bool]]]:
    """The same, one list a document."""
    documents: list[list[tuple[int, bool]]] = [[]]
    for token, counts in tokens_of(split):
        documents[-1].append((token, counts))
        if token == eos_id:
            documents.append([])
    assert documents.pop() == []
    return documents


def expected(entry: dict[str, str], tokenizer: Tokenizer) -> list[tuple[int, bool]]:
    """A document's tokens and whether they count, from the definition."""
    prompt, counted = (
        ("", entry["text"]) if "text" in entry else (entry["prompt"], entry["completion"])
    )
    ids = [(token, False) for token in tokenizer.encode(prompt)]
    return [*ids, *((token, True) for token in [*tokenizer.encode(counted), tokenizer.eos_id])]


texts = st.text(st.sampled_from('ab \n\r\u00e9\U0001f642\u2028\x00"\\{'), max_size=40)
entries = st.builds(lambda text: {"text": text}, texts.filter(bool)) | st.builds(
    lambda prompt, completion: {"prompt": prompt, "completion": completion, "id": 3}, texts, texts
).filter(lambda entry: entry["prompt"] or entry["completion"])


@given(
    objects=st.lists(entries, min_size=1, max_size=45),
    between=st.sampled_from(["", "\n", " \r\n\n"]),
    shard_tokens=st.sampled_from([7, 64, 10**8]),
)
@settings(max_examples=100, deadline=None)
def test_every_token_is_there_and_the_completions_count(
    tmp_path_factory: pytest.TempPathFactory,
    objects: list[dict[str, str]],
    between: str,
    shard_tokens: int,
) -> None:
    path = write(tmp_path_factory.mktemp("lines") / "my.jsonl", objects, between)
    tokenizer = Tokenizer.bytes()
    wanted = [expected(entry, tokenizer) for entry in objects]
    if sum(map(len, wanted)) < 4:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE", 16)
        patch.setattr(encode, "BATCH", 50)
        data = opened(path, shard_tokens=shard_tokens)
    ignored = {**data.train.ignored, **data.val.ignored}
    if len(objects) < 20:
        whole = tokens_of(data.train) + tokens_of(data.val)
        assert whole == [token for document in wanted for token in document]
        assert len(tokens_of(data.val)) == max(2, round(len(whole) / 20))
    else:
        train, val = (documents_of(split, 256) for split in (data.train, data.val))
        assert sorted(train + val) == sorted(wanted)
        assert [document for document in wanted if document in train] == train or val
        assert val and len(val) < len(wanted)
        assert (data.train.n_documents, data.val.n_documents) == (len(train), len(val))
    for split in (data.train, data.val):
        for number, mask in split.ignored.items():
            assert mask.any() and mask.shape == split.tokens[number].shape
    every = [counts for split in (data.train, data.val) for _, counts in tokens_of(split)]
    assert all(every) == (not ignored)
    record = json.loads((data.folder / "dataset.json").read_text())
    assert record["format"] == (2 if ignored else 1)


def test_no_token_lies_across_the_border(tmp_path: Path) -> None:
    Tokenizer.train(["the answer is 42. " * 50], 300).save(tmp_path / "mine")
    tokenizer = Tokenizer.load(tmp_path / "mine")
    entry = {"prompt": "the answ", "completion": "er is 42. "}
    assert tokenizer.encode("the answer is 42. ") != [
        token for text in entry.values() for token in tokenizer.encode(text)
    ]
    data = opened(write(tmp_path / "my.jsonl", [entry]), tokenizer=str(tmp_path / "mine"))
    assert tokens_of(data.train) + tokens_of(data.val) == expected(entry, tokenizer)


def test_the_field_is_named_and_comes_before_prompt_and_completion(tmp_path: Path) -> None:
    entry = {"body": "a body", "text": "a text", "prompt": "a prompt", "completion": "so"}
    path = write(tmp_path / "my.jsonl", [entry])
    for field in ("body", "text", "prompt"):
        data = opened(path, field=field)
        whole = tokens_of(data.train) + tokens_of(data.val)
        assert whole == expected({"text": entry[field]}, data.tokenizer)


GOOD = b'{"text": "good"}\n'
BAD = [
    (b"{'text': 1}", "no JSON (Expecting property name enclosed in double quotes, column 2)"),
    (b'{"text": "cut', "no JSON (Unterminated string starting at, column 10)"),
    (b"[" * 100_000, "no JSON that can be read (maximum recursion depth exceeded"),
    (b'["text"]', "JSON that is no object"),
    (b"{}", "the fields none"),
    (b'{"body": "x", "id": 1}', "the fields 'body', 'id'"),
    (b'{"prompt": "x"}', "the fields 'prompt'"),
    (b'{"text": null}', "'text' that is no string"),
    (b'{"prompt": "x", "completion": ["y"]}', "'completion' that is no string"),
    (b'{"text": "\xff"}', "an invalid byte at offset 10"),
    (b'{"text": "\\ud800"}', "half a surrogate pair"),
]


@pytest.mark.parametrize(("line", "fault"), BAD)
@pytest.mark.parametrize("named", [True, False])
def test_a_bad_line_is_named(line: bytes, fault: str, named: bool, tmp_path: Path) -> None:
    path = tmp_path / "texts" / "my.jsonl"
    path.parent.mkdir()
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match=re.escape(f"got {fault}")) as raised:
        opened(path if named else path.parent)
    message = str(raised.value)
    assert f"in line 3 of {path}; name the field with --field (train: --data.field)" in message
    assert "\n" not in message and message.startswith("data.source line must be a JSON object")


def test_a_file_without_text_is_an_empty_file(tmp_path: Path) -> None:
    empty = tmp_path / "texts" / "empty.jsonl"
    write(empty, [{"text": ""}, {"prompt": "", "completion": ""}], between="\n")
    with pytest.raises(ValueError, match=r"must hold text, got an empty file .*empty\.jsonl"):
        opened(empty)
    (empty.parent / "a.txt").write_text("some text")
    found = survey(find_files([str(empty.parent)]))
    assert [file.name for file in found.files] == ["texts/a.txt"]
    # Without a line that counts, it is a plain corpus.
    assert found == survey(find_files([str(empty.parent)])) and found.groups == ()


def test_text_files_and_lines_are_one_corpus(tmp_path: Path) -> None:
    pair = {"prompt": "why? ", "completion": "because"}
    write(tmp_path / "texts" / "b.jsonl", [{"text": f"line {n}"} for n in range(15)] + [pair])
    for name in ("a", "c", "d", "e"):
        (tmp_path / "texts" / f"{name}.txt").write_text(f"file {name}\n")
    data = opened(tmp_path / "texts")
    tokenizer = data.tokenizer
    train, val = (documents_of(split, 256) for split in (data.train, data.val))
    wanted = [
        *({"text": f"line {n}"} for n in range(15)),
        *({"text": f"file {name}\n"} for name in "acde"),
        pair,
    ]
    assert sorted(train + val) == sorted(expected(entry, tokenizer) for entry in wanted)
    assert len(train) + len(val) == 20 and val
    assert data.train.n_bytes + data.val.n_bytes == sum(
        len("".join(entry.values())) for entry in wanted
    )


def held_bytes(path: Path) -> tuple[set[str], float]:
    """The documents held out, and their part of the text."""
    found = survey(find_files([str(path)]))
    held = held_out(found)
    pieces = list(corpus.documents(found.files))
    chosen = {piece.text for piece in pieces if piece.group in held}
    return chosen, sum(map(len, chosen)) / sum(len(piece.text) for piece in pieces)


def test_five_per_cent_of_the_lines_are_held_out_whatever_the_place(tmp_path: Path) -> None:
    lines = [{"text": f"{n} ".ljust(50 + n % 100, "x")} for n in range(3000)]
    held, part = held_bytes(write(tmp_path / "here" / "my.jsonl", lines))
    assert 0.05 <= part < 0.051 and 100 < len(held) < 200
    assert held_bytes(write(tmp_path / "there" / "my.jsonl", lines))[0] == held
    more = [*lines, *({"text": f"new {n}"} for n in range(300))]
    grown, _ = held_bytes(write(tmp_path / "grown" / "my.jsonl", more))
    assert len(held - grown) == 0
    assert held_bytes(write(tmp_path / "few" / "my.jsonl", lines[:19]))[0] == set()


def test_a_giant_line_is_never_held_out(tmp_path: Path) -> None:
    for place in range(20):
        lines = [
            {"text": ("x" if n == place else "y") * (1 + 999 * (n == place))} for n in range(20)
        ]
        path = write(tmp_path / str(place) / "my.jsonl", lines)
        found = survey(find_files([str(path)]))
        held = held_out(found)
        assert held and sum(found.groups[group] for group in held) <= 101


def test_the_tokenizer_learns_from_training_lines_alone(tmp_path: Path) -> None:
    lines = [{"prompt": f"{chr(0x100 + n)}", "completion": "a" * 50} for n in range(40)]
    found = survey(find_files([str(write(tmp_path / "my.jsonl", lines))]))
    held = held_out(found)
    text = "".join(corpus.sample(found, held))
    pieces = list(corpus.documents(found.files))
    assert text == "".join(piece.text for piece in pieces if piece.group not in held)
    assert held and len(text) < 40 * 51


def test_the_field_is_part_of_the_request(tmp_path: Path) -> None:
    entry = {"body": "words and words", "text": "another text"}
    path = write(tmp_path / "my.jsonl", [entry])
    body = opened(path, field="body")
    assert body.folder != opened(path).folder
    assert json.loads((body.folder / "dataset.json").read_text())["field"] == "body"
    for field in ("text", "body"):
        assert prepare(DataConfig((str(body.folder),), "bytes", field=field)) == body.folder
    with pytest.raises(ValueError, match=r"data\.field must be that of the prepared folder"):
        prepare(DataConfig((str(body.folder),), "bytes", field="title"))
    plain = tmp_path / "plain.txt"
    plain.write_text("some text")
    with pytest.raises(
        ValueError, match=r"data\.field is for \.jsonl and \.parquet files, got 'body'"
    ):
        opened(plain, field="body")


def test_lines_that_change_meanwhile_are_not_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "my.jsonl", [{"text": "some words " * 9}] * 30)
    size = path.stat().st_size

    def append(done: int, total: int, phase: str) -> None:
        if phase == "training the tokenizer" and path.stat().st_size == size:
            with path.open("a") as file:
                file.write('{"text": "more"}\n')

    data = DataConfig((str(path),), "bpe", 300, str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="must not change while it is read"):
        prepare(data, progress=append)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_mask_that_is_damaged_is_named(tmp_path: Path) -> None:
    data = opened(write(tmp_path / "my.jsonl", [{"prompt": "why? " * 20, "completion": "so"}]))
    mask = data.folder / "train-00000.ignored.bin"
    content = mask.read_bytes()
    assert content == b"\x01" * data.train.n_tokens
    for harmed in (content[:-1], b"\x00" + content[1:]):
        mask.write_bytes(harmed)
        with pytest.raises(ValueError, match=r"train-00000\.ignored\.bin is damaged or missing"):
            TokenData.open(data.folder)
    mask.unlink()
    with pytest.raises(ValueError, match=r"train-00000\.ignored\.bin is damaged or missing"):
        TokenData.open(data.folder)
