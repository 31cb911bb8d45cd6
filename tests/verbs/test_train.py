"""`flashgpt train` as a person sees it. pytest tests/verbs/test_train.py"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashgpt.toml import load_toml
from flashgpt.verbs.train import read

Cli = Callable[..., Any]


def test_the_lines_of_a_run(tmp_path: Path, cli: Cli, options: list[str]) -> None:
    """The whole output, in a folder whose name looks like markup and is longer than a line."""
    out = tmp_path / ("[bold]:cat: " + "x" * 100)
    lines = cli("train", *options, "--out", out).done().splitlines()
    assert any(
        re.fullmatch(r"words: [\d,]+ training tokens .*, vocabulary 257", line) for line in lines
    )
    assert any(line.startswith("step 1/12  loss 5.") for line in lines)
    assert any(line.startswith("step 12/12  loss ") for line in lines)
    judged = [line for line in lines if ": validation loss" in line]
    assert [line.split(":")[0] for line in judged] == ["step 4", "step 8", "step 12"]
    assert all(re.search(r"perplexity [\d.,]+, [\d.]+ bits per byte$", line) for line in judged)
    checkpoint = out / "checkpoints" / "step_00000012"
    assert f"checkpoint {checkpoint}, plot {out / 'loss.png'}" in lines
    assert f'write with it: flashgpt generate {shlex.quote(str(out))} --prompt "..."' in lines
    assert checkpoint.is_dir() and (out / "loss.png").is_file()


def test_the_sample_on_the_screen_is_the_one_in_the_file(
    tmp_path: Path, cli: Cli, options: list[str]
) -> None:
    shown = cli("train", *options, "--out", tmp_path, "--sample.prompt", "a :cat: [red]").done()
    written = (tmp_path / "samples.txt").read_text(encoding="utf-8")
    sample = written.removeprefix("--- after step 12 ---\n")
    assert sample.startswith("a :cat: [red]") and len(sample) > 14
    visible = [re.sub(r"[\x00-\x1f\x7f]", "", text) for text in (sample, shown)]
    assert visible[0] in visible[1]


def test_resume_takes_the_runs_config_and_options_override_it(trained: Any) -> None:
    args = read(["--resume", "--out", str(trained.folder), "--train.steps", "20"])
    stored = load_toml(trained.folder / "config.toml")
    assert args.resume and (args.model, args.data) == (stored.model, stored.data)
    assert (args.train.steps, args.train.lr) == (20, 1e-2)


def test_a_stop_holds_for_one_start(copied: Any) -> None:
    path = copied.folder / "config.toml"
    path.write_text(path.read_text().replace("# stop_at =", "stop_at = 4"))
    assert read([str(path)]).train.stop_at == 4
    assert read(["--resume", "--out", str(copied.folder)]).train.stop_at is None
    again = read(["--resume", "--out", str(copied.folder), "--train.stop-at", "9"])
    assert again.train.stop_at == 9


def test_a_folder_that_cannot_be_written_is_told_before_the_text_is_prepared(
    tmp_path: Path, cli: Cli, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    prepared: list[Any] = []
    monkeypatch.setattr("flashgpt.data.prepare.prepare", lambda *given, **_: prepared.append(given))
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        refused = cli("train", *options, "--out", out).error(1)
        assert f"{tmp_path / 'file'} is a file; choose another --out" in refused
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode)
    )
    refused = cli("train", *options, "--out", tmp_path / "some" / "run").error(1)
    assert f"{tmp_path} cannot be written; choose another --out" in refused
    assert not prepared and not (tmp_path / "some").exists()


def test_resume_without_a_run_needs_to_know_what_to_train(tmp_path: Path, cli: Cli) -> None:
    """A mistyped --out begins nothing; where it is said what to begin, a first start is none."""
    wrong = cli("train", "--resume", "--out", tmp_path / "mistyped").error(2)
    assert f"{tmp_path / 'mistyped'} holds no run to go on with; choose another --out" in wrong
    assert not (tmp_path / "mistyped").exists()
    source = ["--data.source", "my.txt"]
    assert read(["--resume", "--out", str(tmp_path), *source]).data.source == ("my.txt",)


def test_resume_with_a_file_takes_the_file(tmp_path: Path, trained: Any) -> None:
    (tmp_path / "other.toml").write_text("[train]\nsteps = 99\n")
    args = read([str(tmp_path / "other.toml"), "--resume", "--out", str(trained.folder)])
    assert args.train.steps == 99 and args.resume


@pytest.mark.parametrize("use_flash", [True, False])
def test_the_switch_is_kept_in_config_and_checkpoint(
    tmp_path: Path, train: Callable[..., Any], use_flash: bool
) -> None:
    run = train(tmp_path / "run", "--train.stop-at", 1, "--model.use-flash", use_flash)
    assert load_toml(run.folder / "config.toml").model.use_flash is use_flash
    info = (run.folder / "state.json").read_text()
    assert ('"standard served' in info) or use_flash


def test_a_preset_replaces_the_files_model_section(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[model]\npreset = "tiny"\nemb_dim = 64\nn_heads = 2\n')
    kept = read([str(path)]).model.resolve(300)
    replaced = read([str(path), "--model.preset", "gpt2", "--model.n-layers", "3"]).model.resolve(
        300
    )
    assert (kept.emb_dim, kept.n_layers) == (64, 4)
    assert (replaced.emb_dim, replaced.n_heads, replaced.n_layers) == (768, 12, 3)


def test_an_empty_text_is_no_config(tmp_path: Path, cli: Cli) -> None:
    """It is valid TOML, and would train on something else than the user meant."""
    path = tmp_path / "empty.txt"
    path.write_text("")
    found = cli("train", path)
    assert found.status == 2
    assert f"{path} is no TOML file; text goes behind --data.source {path}" in found.err
