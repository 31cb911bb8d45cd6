"""Checkpoints: complete, checked, replaced whole or not at all.

pytest tests/train/test_checkpoint.py
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import flashgpt
from flashgpt.runconfig import TrainConfig
from flashgpt.train import checkpoint
from flashgpt.train.checkpoint import DamagedError, check, good, load, steps
from flashgpt.train.parts import build

FILES = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer/digests.json",
    "trainer/guard.safetensors",
    "trainer/optimizer.safetensors",
    "trainer/state.json",
]
Flip = Callable[[Path, int], None]


def test_a_checkpoint_has_these_files_and_its_step(trained: Any) -> None:
    assert [path.name for path in trained.checkpoints] == [
        f"step_{step:08d}" for step in (4, 8, 12)
    ]
    for path in trained.checkpoints:
        files = sorted(f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file())
        assert files == FILES
        assert check(path).step == int(path.name.removeprefix("step_"))
    state = check(trained.checkpoints[-1]).state
    assert state["seed"] == 1337 and state["format"] == checkpoint.FORMAT
    assert any(line.startswith(("sdpa:", "blocked")) for line in state["receipt"])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_one_flipped_bit_is_found_named_and_passed_over(
    copied: Any,
    flip: Flip,
    cli: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    name: str,
    place: str,
) -> None:
    newest, before = copied.checkpoints[-1], copied.checkpoints[-2]
    file = newest / name
    size = file.stat().st_size
    flip(file, {"first": 0, "middle": size // 2, "last": size - 1}[place])
    with pytest.raises(DamagedError) as caught:
        check(newest)
    # The list of digests says of another file that it has changed.
    named = newest if name == "trainer/digests.json" else file
    assert str(named) in str(caught.value)
    assert str(named) in cli("generate", newest).error(1)
    found = list(good(copied.folder))
    assert isinstance(found[0], DamagedError)
    assert isinstance(found[1], checkpoint.Checkpoint) and found[1].path == before
    with caplog.at_level(logging.WARNING):
        load(copied.folder)
    assert "passed over" in caplog.text and str(named) in caplog.text


def test_bit_flips_all_over_the_small_trainer_files_are_damage(copied: Any, flip: Flip) -> None:
    """No flip of the format number's bits passes for a newer version, and none for sound."""
    newest = copied.checkpoints[-1]
    for name in ("trainer/state.json", "trainer/digests.json"):
        content = (newest / name).read_bytes()
        for at in range(0, len(content), 3 if name.endswith("digests.json") else 1):
            for bit in (1, 8):
                (newest / name).write_bytes(
                    content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
                )
                if json_or_none(newest / name) == json.loads(content):
                    continue  # another white space says the same
                with pytest.raises(DamagedError):
                    check(newest)
        (newest / name).write_bytes(content)
    check(newest)


def json_or_none(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copied: Any, name: str) -> None:
    (copied.checkpoints[-1] / name).unlink()
    with pytest.raises(DamagedError, match=name.replace(".", r"\.")):
        check(copied.checkpoints[-1])


def test_resume_passes_over_damage_and_repeats_the_run(
    copied: Any, trained: Any, flip: Flip, cli: Callable[..., Any]
) -> None:
    damaged = copied.checkpoints[-1] / "trainer" / "optimizer.safetensors"
    flip(damaged, 5000)
    shown = cli("train", "--resume", "--out", copied.folder).done()
    assert f"passed over: {damaged} is damaged" in shown
    assert f"goes on from {copied.checkpoints[-2]}" in shown
    assert copied.same_as(trained)
    assert copied.metrics == trained.metrics


def test_a_damaged_newest_checkpoint_costs_no_good_one(
    copied: Any, flip: Flip, cli: Callable[..., Any]
) -> None:
    """Were it counted among the newest, those saved on the way would be removed at once."""
    damaged = copied.checkpoints[-1]
    flip(damaged / "model.safetensors", 5000)
    again = ("train", "--resume", "--out", copied.folder, "--train.keep-checkpoints", 1)
    cli(*again, "--train.checkpoint-every", 1, "--train.stop-at", 10).done()
    assert [path.name for path in copied.checkpoints][-1] == "step_00000010"
    assert all(isinstance(found, checkpoint.Checkpoint) for found in good(copied.folder))
    assert damaged.with_name(f".damaged-{damaged.name}").exists()


def test_a_kill_between_two_names_loses_no_checkpoint(
    copied: Any, trained: Any, cli: Callable[..., Any]
) -> None:
    newest = copied.checkpoints[-1]
    newest.rename(newest.with_name(f".saving-old-{newest.name}"))
    assert f"goes on from {newest}" in cli("train", "--resume", "--out", copied.folder).done()
    assert copied.same_as(trained)


def test_a_reader_chooses_again_when_training_removes_what_it_reads(
    copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = checkpoint.huggingface.load

    def removed(folder: Path) -> Any:
        if folder == copied.checkpoints[-1] and len(copied.checkpoints) == 3:
            shutil.rmtree(folder)
        return read(folder)

    monkeypatch.setattr(checkpoint.huggingface, "load", removed)
    model, tokenizer = load(copied.folder)
    stored = checkpoint.load_file(copied.checkpoints[-1] / "model.safetensors")
    assert torch.equal(model.wte.weight, stored["transformer.wte.weight"]) and tokenizer is not None
    assert len(copied.checkpoints) == 2


def test_a_run_without_a_good_checkpoint_says_what_is_wrong(
    copied: Any, flip: Flip, cli: Callable[..., Any]
) -> None:
    for path in copied.checkpoints:
        flip(path / "model.safetensors", 5000)
    refused = cli("generate", copied.folder).error(1)
    assert all(str(path / "model.safetensors") in refused for path in copied.checkpoints)
    before = {path: path.read_bytes() for path in copied.folder.rglob("*") if path.is_file()}
    ran = cli("train", "--resume", "--out", copied.folder)
    assert "has no good checkpoint to go on from; restore one, or start anew" in ran.error(1)
    assert ran.out.count("passed over") == 3
    after = {path: path.read_bytes() for path in copied.folder.rglob("*") if path.is_file()}
    assert after == before


def test_a_newer_format_is_refused_and_not_passed_over(
    copied: Any, cli: Callable[..., Any]
) -> None:
    newest, newer = copied.checkpoints[-1], checkpoint.FORMAT + 1
    state = json.loads((newest / "trainer" / "state.json").read_text())
    checkpoint.write_json(newest / "trainer" / "state.json", {**state, "format": newer})
    (newest / "trainer" / "digests.json").unlink()
    checkpoint.write_json(newest / "trainer" / "digests.json", checkpoint._digests(newest))
    for command in (("generate", copied.folder), ("train", "--resume", "--out", copied.folder)):
        refused = cli(*command).error(1)
        assert str(newest) in refused
        assert f"format {newer}, this version reads up to {checkpoint.FORMAT}" in refused


NO_SPACE = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", NO_SPACE, ids=["os", "safetensors"])
def test_a_full_disk_is_one_line_and_leaves_what_is_there(
    copied: Any,
    trained: Any,
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    refused = cli("train", "--resume", "--out", copied.folder, "--train.steps", 14).error(1)
    assert "no space left on the disk for" in refused and "step_00000014" in refused
    assert "Errno" not in refused and "--resume" in refused
    monkeypatch.undo()
    assert [
        path.name for path in (copied.folder / "checkpoints").iterdir() if path.name[0] == "."
    ] == []
    assert copied.same_as(trained)
    cli("train", "--resume", "--out", copied.folder).done()


def test_a_disk_without_room_is_seen_before_a_step_is_done(
    tmp_path: Path, cli: Callable[..., Any], options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    refused = cli("train", *options, "--out", tmp_path / "run").error(1)
    assert f"no space left on the disk for {tmp_path / 'run'}" in refused
    assert re.search(r"takes 1[67]\.\d MB, 1\.0 are free; free some", refused)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_disk_that_fills_up_on_the_way_ends_the_run_and_keeps_what_is_saved(
    tmp_path: Path, cli: Callable[..., Any], options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    run = tmp_path / "run"

    def free(_: Path) -> Any:
        return usage._replace(free=10**6) if checkpoint.steps(run) else usage

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", free)
        assert "no space left on the disk" in cli("train", *options, "--out", run).error(1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000004"]
    assert "goes on from" in cli("train", "--resume", "--out", run).done()


def test_a_run_whose_folder_vanishes_says_so(
    tmp_path: Path, cli: Callable[..., Any], options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint.save

    def vanished(run: Path, contents: checkpoint.Contents) -> Path:
        shutil.rmtree(run)
        return save(run, contents)

    monkeypatch.setattr(checkpoint, "save", vanished)
    refused = cli("train", *options, "--out", tmp_path / "run").error(1)
    assert str(tmp_path / "run") in refused and "No such file or directory" in refused


def test_saving_over_a_checkpoint_replaces_it_whole(copied: Any, tmp_path: Path) -> None:
    """A damaged checkpoint of the step makes room only for a complete new one."""
    model, tokenizer = load(copied.folder)
    assert tokenizer is not None
    parts = build(model, tokenizer, TrainConfig(tokens_per_step=128))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = parts.optimizer.state_tensors(), parts.guard.state_tensors()
    contents = checkpoint.Contents(model.cfg, tokenizer, {"step": 12}, weights, *state)
    newest = copied.checkpoints[-1]
    (newest / "config.json").write_text("{}")
    path = checkpoint.save(copied.folder, contents)
    assert path == newest and check(newest).step == 12
    assert sorted(p.name for p in newest.parent.iterdir()) == [p.name for p in copied.checkpoints]


def test_steps_are_newest_first(trained: Any) -> None:
    assert steps(trained.folder) == trained.checkpoints[::-1]


def test_load_takes_a_run_its_best_a_checkpoint_and_a_plain_folder(
    copied: Any, tmp_path: Path
) -> None:
    first, *_, last = copied.checkpoints
    state = json.loads((copied.folder / "state.json").read_text())
    (copied.folder / "state.json").write_text(json.dumps({**state, "best": first.name}))
    shutil.copytree(first, tmp_path / "plain", ignore=shutil.ignore_patterns("trainer"))
    for path, best, wanted in [
        (copied.folder, False, last),
        (copied.folder, True, first),
        (first, False, first),
        (tmp_path / "plain", False, first),
    ]:
        model, tokenizer = flashgpt.load(path, best=best)
        assert not model.training and tokenizer is not None and tokenizer.vocab_size == 257
        stored = checkpoint.load_file(wanted / "model.safetensors")["transformer.wte.weight"]
        assert torch.equal(model.wte.weight, stored)
    (tmp_path / "plain" / "tokenizer.json").unlink()
    assert load(tmp_path / "plain")[1] is None


def test_nothing_to_load_is_said(tmp_path: Path, copied: Any) -> None:
    with pytest.raises(ValueError, match="holds neither checkpoints nor"):
        load(tmp_path)
    with pytest.raises(ValueError, match="is no folder; name a run or a GPT-2 folder"):
        load(tmp_path / "none")
    state = json.loads((copied.folder / "state.json").read_text())
    (copied.folder / "state.json").write_text(json.dumps({**state, "best": None}))
    with pytest.raises(ValueError, match="has no best checkpoint yet"):
        load(copied.folder, best=True)


def test_no_file_of_a_run_is_a_pickle(trained: Any) -> None:
    for path in trained.folder.rglob("*"):
        if path.suffix == ".safetensors":
            assert checkpoint.load_file(path)  # their first byte is a length, which may be any
        elif path.is_file():
            start = path.read_bytes()[:4]
            assert start[:1] != b"\x80" and start != b"PK\x03\x04", path
    package = Path(flashgpt.__file__).parent
    # Other programs' files, which are read by a reader that runs nothing.
    others = {package / "interop" / name for name in ("files.py", "nanogpt.py")}
    for source in package.rglob("*.py"):
        code = source.read_text()
        assert code.count("torch.load(") == code.count(", weights_only=True)"), source
        for word in ("pickle.load", "Unpickler(", "weights_only=False", "allow_pickle=True"):
            assert word not in code, (source, word)
        for word in ("torch.load(", "torch.save(", "import pickle"):
            assert word not in code or source in others, (source, word)


def test_json_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value.json"
    checkpoint.write_json(path, {"a": 1})

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", broken)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_json(path, {"a": 2})
    assert json.loads(path.read_bytes()) == {"a": 1}
