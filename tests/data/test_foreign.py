"""Token files of nanoGPT, llm.c, modded-nanogpt as a source. pytest tests/data/test_foreign.py"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgpt.data import foreign
from flashgpt.data.prepare import prepare
from flashgpt.data.shards import TokenData, TokenSplit
from flashgpt.runconfig import DataConfig

END = 256


def raw(path: Path, ids: Sequence[int]) -> Path:
    """A file as nanoGPT's prepare.py writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.array(ids, np.uint16).tofile(path)
    return path


def headed(
    path: Path, ids: Sequence[int], magic: int = 20240520, version: int = 1, count: int = -1
) -> Path:
    """A file as llm.c's write_datafile writes it; `count` is a wrong one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids) if count < 0 else count
    path.write_bytes(header.tobytes() + np.array(ids, np.uint16).tobytes())
    return path


def opened(*sources: Path | str, tokenizer: str = "bytes", shard_tokens: int = 10**8) -> TokenData:
    cache = str(Path(sources[0]).parent / "cache")
    data = DataConfig(tuple(map(str, sources)), tokenizer, cache=cache)
    return TokenData.open(prepare(data, shard_tokens=shard_tokens))


def ids_of(split: TokenSplit) -> list[int]:
    return [token for shard in split.tokens for token in shard.tolist()]


def starts_of(split: TokenSplit, shard_tokens: int) -> list[int]:
    return [
        n * shard_tokens + at for n, starts in enumerate(split.starts) for at in starts.tolist()
    ]


def documents(ids: Sequence[int]) -> list[int]:
    """Where documents start: behind each end of text, and at the beginning if none is there."""
    behind = [at for at in range(1, len(ids)) if ids[at - 1] == END]
    return behind if ids[0] == END else [0, *behind]


@given(
    train=st.lists(st.integers(0, 5).map(lambda n: n or END), min_size=4, max_size=120),
    val=st.none() | st.lists(st.integers(0, 256), min_size=1, max_size=40),
    write=st.sampled_from([raw, headed]),
    shard_tokens=st.sampled_from([7, 10**8]),
    cut=st.integers(0, 120),
)
@settings(max_examples=80, deadline=None)
def test_every_id_is_taken_over(
    tmp_path_factory: pytest.TempPathFactory,
    train: list[int],
    val: list[int] | None,
    write: object,
    shard_tokens: int,
    cut: int,
) -> None:
    assert callable(write)
    folder = tmp_path_factory.mktemp("tokens")
    sources = [folder / "x_train_000001.bin", folder / "x_train_000002.bin"]
    cut = cut % len(train)
    parts = [train[:cut], train[cut:]] if cut else [train]
    for path, ids in zip(sources, parts, strict=False):
        write(path, ids)
    if val:
        write(folder / "x_val_000000.bin", val)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreign, "_SLICE", 5)
        data = opened(*sources[: len(parts)], shard_tokens=shard_tokens)
    border = len(train) if val else len(train) - max(2, round(len(train) / 20))
    assert ids_of(data.train) == train[:border]
    assert ids_of(data.val) == (val or train[border:])
    assert not data.train.ignored and not data.val.ignored
    starts = documents(train)
    assert starts_of(data.train, shard_tokens) == [at for at in starts if at < border]
    if val:
        assert starts_of(data.val, shard_tokens) == documents(val)
    else:
        cut_there = sorted({border, *(at for at in starts if at >= border)})
        assert starts_of(data.val, shard_tokens) == [at - border for at in cut_there]
    lengths = data.tokenizer.byte_lengths
    for split in (data.train, data.val):
        assert split.n_bytes == lengths[ids_of(split)].sum()


NAMES = [
    ("train.bin", ["val.bin"], ["val.bin"]),
    ("shakespeare_train.bin", ["shakespeare_val.bin", "val.bin"], ["shakespeare_val.bin"]),
    (
        "fineweb_train_000001.bin",
        ["fineweb_val_000000.bin", "fineweb_val_000001.bin", "other_val_000000.bin"],
        ["fineweb_val_000000.bin", "fineweb_val_000001.bin"],
    ),
    ("train.bin", ["x_val.bin", "val_1.bin"], []),
    ("a[b]_train.bin", ["a[b]_val.bin", "ab_val.bin"], ["a[b]_val.bin"]),
    ("training.bin", ["val.bin", "valing.bin"], []),
    ("tokens.bin", ["val.bin"], []),
]


@pytest.mark.parametrize(("name", "beside", "chosen"), NAMES)
def test_validation_is_the_file_of_the_usual_name(
    name: str, beside: list[str], chosen: list[str], tmp_path: Path
) -> None:
    raw(tmp_path / name, range(100))
    for number, other in enumerate(beside):
        raw(tmp_path / other, [200 + number] * 3)
    data = opened(tmp_path / name)
    wanted = [200 + beside.index(other) for other in chosen for _ in range(3)]
    assert ids_of(data.val) == (wanted or list(range(95, 100)))
    assert ids_of(data.train) == list(range(100 if wanted else 95))


def test_a_glob_takes_the_training_files_and_validation_only_once(tmp_path: Path) -> None:
    for number in range(3):
        headed(tmp_path / f"x_train_{number}.bin", [number] * 5)
    headed(tmp_path / "x_val_0.bin", [9] * 4)
    for pattern in ("x_train_*.bin", "x_*.bin"):
        data = opened(tmp_path / pattern)
        assert ids_of(data.train) == [0] * 5 + [1] * 5 + [2] * 5
        assert ids_of(data.val) == [9] * 4


def test_equal_requests_find_the_folder_again(tmp_path: Path) -> None:
    path, val = raw(tmp_path / "train.bin", range(50)), tmp_path / "val.bin"
    first = opened(path)
    assert opened(path).folder == first.folder
    headed(path, range(50))  # the same ids
    assert opened(path).folder == first.folder
    raw(val, [1, 2, 3])
    second = opened(path)
    assert second.folder != first.folder
    raw(path, [*range(49), 3])
    assert opened(path).folder not in (first.folder, second.folder)


def refusal(path: Path | str, tokenizer: str = "bytes") -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the callers look at the message
        opened(path, tokenizer=tokenizer)
    message = str(raised.value)
    assert "\n" not in message and str(path) in message
    return message


def test_the_tokenizer_must_be_named_and_have_every_id(tmp_path: Path) -> None:
    for write in (raw, headed):
        path = write(tmp_path / "train.bin", [1, 2, 3, 300, 4, 5])
        assert re.search(
            r"^data\.tokenizer must name the tokenizer that .* was made with .* got bpe",
            refusal(path, tokenizer="bpe"),
        )
        assert "got id 300 in" in refusal(path) and "a vocabulary of 257;" in refusal(path)
    headed(path, range(50))
    raw(tmp_path / "val.bin", [1, 60_000])
    with pytest.raises(ValueError, match=r"got id 60000 in .*val\.bin and a vocabulary of 257"):
        opened(path)


def test_a_file_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    raw(path, range(20))
    with path.open("ab") as file:
        file.write(b"x")
    assert "must be ids of two bytes, got 41 bytes" in refusal(path)
    path.write_bytes(b"")
    assert "must hold ids, got an empty file" in refusal(path)
    whole = headed(path, range(20)).read_bytes()
    for content in (whole[:-1], whole[:-2], whole + b"xx", whole[:1024], whole[:200], whole[:4]):
        path.write_bytes(content)
        message = refusal(path)
        assert f"as long as its header says, got {len(content)} bytes in" in message
        assert "it is cut short or damaged: get it again" in message
    headed(path, range(20), count=0)
    assert "whose header says 0 ids" in refusal(path)
    headed(path, range(20), version=7)
    assert "magic number 20240520 and version 1, got 20240520 and 7" in refusal(path)
    headed(path, range(20), magic=20240801)
    assert "magic number 20240520 and version 1, got 20240801 and 1" in refusal(path)


def test_our_own_shards_are_named_by_their_folder(tmp_path: Path) -> None:
    made = opened(raw(tmp_path / "train.bin", range(50)))
    shard = made.folder / "train-00000.bin"
    assert "must name the folder of token files that flashgpt prepared" in refusal(shard)


def test_tokens_and_text_do_not_mix(tmp_path: Path) -> None:
    path = raw(tmp_path / "train.bin", range(50))
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(ValueError, match=r"token files \(\.bin\) or text, got both .*train\.bin"):
        opened(path, tmp_path / "a.txt")
    # Within a folder of text they are what they always were: no text.
    data = DataConfig((str(tmp_path),), "bytes", cache=str(tmp_path / ".cache"))
    assert TokenData.open(prepare(data)).train.n_bytes < 10
    with pytest.raises(ValueError, match=r"data\.field is for \.jsonl and \.parquet files"):
        prepare(DataConfig((str(path),), "bytes", cache=str(tmp_path / "cache"), field="body"))


def test_a_file_that_becomes_shorter_meanwhile_is_not_kept(tmp_path: Path) -> None:
    path = raw(tmp_path / "train.bin", range(50))

    def cut(done: int, total: int, phase: str) -> None:
        if phase == "reading":
            raw(path, range(40))

    data = DataConfig((str(path),), "bytes", cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"must not change while it is read, got a shorter"):
        prepare(data, progress=cut)
    assert list((tmp_path / "cache").iterdir()) == []
