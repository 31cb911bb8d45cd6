"""The files of a run besides its checkpoints. pytest tests/train/test_record.py"""

from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashgpt.runconfig import RunConfig, TrainConfig
from flashgpt.toml import load_toml
from flashgpt.train.record import Record, _revision, add_sample, versions

RUN = RunConfig()


def _logged(folder: Path, steps: int) -> Record:
    record = Record(folder)
    record.start(RUN, 0)
    for step in range(1, steps + 1):
        record.log({"step": step, "loss": 1 / step, "lr": 1.0})
    return record


def _steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]


def test_a_run_has_these_files(trained: Any) -> None:
    names = {path.name for path in trained.folder.iterdir()}
    files = {"config.toml", "metrics.jsonl", "loss.png", "samples.txt", "state.json"}
    assert names == {*files, "checkpoints"}
    assert set(trained.metrics[0]) == {"step", "loss", "lr", "grad_norm", "epoch"}
    lines = (trained.folder / "metrics.jsonl").read_text().splitlines()
    for entry in map(json.loads, lines):
        assert entry["tokens_per_second"] > 0 and entry["data_seconds"] >= 0
        assert 2**24 < entry["peak_memory_bytes"] < 2**36
    state = json.loads((trained.folder / "state.json").read_text())
    assert state["last"] == state["best"] == "step_00000012"
    # The best is chosen by the same tokens as on the way; the last evaluation takes all of them.
    on_the_way = [e["val_loss"] for e in trained.metrics if "val_loss" in e][:-1]
    assert state["best_val_loss"] < min(on_the_way)
    assert state["versions"] == versions() and state["receipt"]
    assert (trained.folder / "samples.txt").read_text().startswith("--- after step 12 ---\n\n")
    epoch = 12 * 4 / (len(load_tokens(trained)) // 32)
    assert trained.metrics[-1]["epoch"] == pytest.approx(epoch, rel=0.01)


def load_tokens(trained: Any) -> str:
    """The training part of the text: all but the last 5 %."""
    text = Path(load_toml(trained.folder / "config.toml").data.source[0]).read_text()
    return text[: len(text) * 19 // 20]


def test_the_config_repeats_the_run(trained: Any, tmp_path: Path, cli: Callable[..., Any]) -> None:
    cli("train", trained.folder / "config.toml", "--out", tmp_path / "again").done()
    again = type(trained)(tmp_path / "again")
    assert again.same_as(trained) and again.metrics == trained.metrics
    written = [(run.folder / "config.toml").read_text() for run in (trained, again)]
    assert written[0] == written[1]
    samples = [(run.folder / "samples.txt").read_text() for run in (trained, again)]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("cut", ["", '{"step": 8, "lo', "\x00\x00"])
def test_what_was_logged_past_the_resumed_step_is_dropped(tmp_path: Path, cut: str) -> None:
    _logged(tmp_path, 7)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(cut)
    record = Record(tmp_path)
    record.start(RUN, 5)
    assert _steps(tmp_path) == [1, 2, 3, 4, 5] == [e["step"] for e in record.metrics]
    record.log({"step": 6})
    assert _steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_start_at_0_begins_anew(tmp_path: Path) -> None:
    _logged(tmp_path, 3)
    assert _logged(tmp_path, 0).metrics == [] == _steps(tmp_path)


def test_the_best_is_the_lowest_validation_loss(tmp_path: Path) -> None:
    record = _logged(tmp_path, 0)
    for step, loss in ((1, 2.0), (2, None), (3, 1.5), (4, 1.7)):
        record.saved(f"step_{step:08d}", [])
        if loss is not None:
            record.judged(f"step_{step:08d}", loss)
    state = json.loads((tmp_path / "state.json").read_text())
    assert (state["last"], state["best_val_loss"]) == ("step_00000004", 1.5)
    assert state["best"] == "step_00000003"
    again = Record(tmp_path)
    again.start(RUN, 4)
    again.judged("step_00000005", 1.6)  # worse than the best before the resume
    assert json.loads((tmp_path / "state.json").read_text())["best"] == "step_00000003"
    again.start(RUN, 2)  # from before the best one, which is of another way then
    again.judged("step_00000003", 1.7)
    assert json.loads((tmp_path / "state.json").read_text())["best_val_loss"] == 1.7


@pytest.mark.parametrize("line", ["3", "[]", "null", '{"loss": 1}', '{"step": "a"}', '{"step'])
def test_a_line_of_the_log_that_is_none_ends_what_is_kept(line: str, tmp_path: Path) -> None:
    _logged(tmp_path, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    record = Record(tmp_path)
    record.start(RUN, 5)
    assert _steps(tmp_path) == [1, 2, 3]


def test_a_damaged_state_is_named_and_blocks_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _logged(tmp_path, 3)
    (tmp_path / "state.json").write_text("{")
    record = Record(tmp_path)
    record.start(RUN, 2)
    assert "state.json cannot be read" in caplog.text
    assert record.state["best"] is None and len(record.metrics) == 2


def test_the_config_is_rewritten_only_when_it_differs(tmp_path: Path) -> None:
    record = _logged(tmp_path, 0)
    path = tmp_path / "config.toml"
    path.write_text(path.read_text() + "# mine\n")
    record.write_config(RUN)
    assert path.read_text().endswith("# mine\n")
    record.write_config(RunConfig(train=TrainConfig(steps=3)))
    assert load_toml(path).train.steps == 3 and "# mine" not in path.read_text()
    assert not list(tmp_path.glob(".*"))


def test_samples_are_appended(tmp_path: Path) -> None:
    add_sample(tmp_path, 1, "a \U0001f642")
    add_sample(tmp_path, 2, "b")
    written = (tmp_path / "samples.txt").read_text(encoding="utf-8")
    assert written == "--- after step 1 ---\na \U0001f642\n--- after step 2 ---\nb\n"


def test_a_full_disk_names_the_metrics_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: No space left on device"):
        record.log({"step": 1, "loss": 1.0})


def test_the_revision_is_that_of_the_package_and_of_nothing_around_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = [
            "git",
            "-c",
            "user.name=n",
            "-c",
            "user.email=e",
            "-C",
            str(tmp_path),
            *arguments,
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert _revision(package) is None
    git("init", "-q")
    _revision.cache_clear()
    assert _revision(package) is None  # in a checkout, but not of it
    git("add", "package/__init__.py")
    git("commit", "-q", "-m", "first")
    _revision.cache_clear()
    assert _revision(package) == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("1")
    _revision.cache_clear()
    assert _revision(package) == git("rev-parse", "HEAD") + "-dirty"
