"""`flashgpt demo` from end to end, one second each. pytest tests/verbs/test_demo.py

The standard library and the model are small here, and what `verify` runs is cut down.
"""

from __future__ import annotations

import re
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashgpt import orchestrator
from flashgpt.measure import audit
from flashgpt.toml import load_toml
from flashgpt.train.loop import Result
from flashgpt.verbs import demo

Cli = Callable[..., Any]
FILES = {"config.toml", "metrics.jsonl", "loss.png", "samples.txt", "state.json", "checkpoints"}


@pytest.fixture(autouse=True)
def _small(tiny: None, short_audit: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def _summary(shown: str) -> dict[str, str]:
    rows = re.findall(r"^  (\w[\w -]+?)  +(\S.*)$", shown, re.MULTILINE)
    return dict(rows)


@pytest.fixture
def stdlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """24 small files of the standard library."""
    real = Path(sysconfig.get_path("stdlib"))
    small = tmp_path / "lib"
    small.mkdir()
    for path in sorted(real.glob("*.py"), key=lambda p: (p.stat().st_size, p.name))[40:64]:
        shutil.copy(path, small)
    monkeypatch.setattr(sysconfig, "get_path", lambda name, *_: str(small))


def test_the_whole_way_and_a_second_time(
    tmp_path: Path, cli: Cli, stdlib: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = cli("demo", "--seconds", 1).done()
    run = tmp_path / "runs" / "demo"
    assert {path.name for path in run.iterdir()} == FILES
    steps = load_toml(run / "config.toml").train.steps
    assert steps >= 10
    assert re.search(rf"[\d,]+ parameters, \d+ ms a step: {steps} steps in about 1 s\n", shown)
    assert "training the tokenizer ..." in shown and "encoding ..." in shown
    summary = _summary(shown)
    assert re.fullmatch(
        r"\d\.\d{3} bits per byte \(a byte 3-gram model: \d\.\d{3}\), perplexity [\d.]+",
        summary["held-out text"],
    )
    assert summary["use_flash proven"] == "both settings agree"
    checkpoint = f"runs/demo/checkpoints/step_{steps:08d}"
    assert summary["checkpoint"] == f"{checkpoint} (transformers loads it as it is)"
    assert (tmp_path / checkpoint / "model.safetensors").is_file()
    assert summary["loss plot"] == "runs/demo/loss.png"
    assert summary["sample"] == "runs/demo/samples.txt"
    assert "def " in (run / "samples.txt").read_text(encoding="utf-8")
    assert summary["config"] == "runs/demo/config.toml repeats the run"
    commands = shown.split("next:\n")[1].splitlines()
    assert f"  flashgpt train --resume --out runs/demo --train.steps {2 * steps}" in commands
    for command in commands:
        assert command.startswith("  flashgpt ")

    (prepared,) = (path for path in (tmp_path / "data").iterdir() if path.name[0] != ".")
    before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    monkeypatch.setattr(orchestrator, "train", _no_training(orchestrator.train))
    again = cli("demo", "--seconds", 1)
    assert again.status == 128 + 2 and "--resume --out runs/demo-2" in again.out
    assert "training the tokenizer" not in again.out and "encoding" not in again.out
    assert {path: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


def _no_training(train: Any) -> Any:
    """A run that is interrupted at once."""

    def interrupted(run: Any, data: Any, out: Path, **_: Any) -> Any:
        out.mkdir(parents=True)
        return None, Result(0, None, out / "checkpoints", interrupted=2)

    return interrupted


def test_an_own_text(cli: Cli, text: Path) -> None:
    shown = cli("demo", text, "--seconds", 1, "--out", "my run").done()
    config = load_toml("my run/config.toml")
    assert config.data.source == (str(text),) and config.sample.prompt == "\n"
    assert {path.name for path in Path("my run").iterdir()} == FILES
    assert not Path("runs").exists()
    assert _summary(shown)["sample"] == "my run/samples.txt"
    own = [line for line in shown.split("next:\n")[1].splitlines() if "my run" in line]
    assert len(own) == 3 and all("'my run'" in line for line in own)


def test_a_failed_proof_is_status_1(cli: Cli, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "greedy_equal", lambda *_: False)
    ran = cli("demo", text, "--seconds", 1, "--out", "mine")
    assert ran.status == 1
    assert _summary(ran.out)["use_flash proven"] == "FAILED, see the table above"


def test_free_names(tmp_path: Path) -> None:
    wanted = tmp_path / "demo"
    for expected in ("demo", "demo-2", "demo-3"):
        assert demo.free_name(wanted).name == expected
        (tmp_path / expected).mkdir()
