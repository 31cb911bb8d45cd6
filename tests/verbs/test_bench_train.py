"""`flashgpt bench train`: table, files, JSON line, and what is wrong said in one line.

pytest tests/verbs/test_bench_train.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flashgpt.measure import bench_train, clock
from flashgpt.measure.step_parts import PARTS
from flashgpt.measure.train_variants import HUGGING_FACE, OFF, ON
from flashgpt.verbs import bench_train as verb

Cli = Callable[..., Any]
TINY = (
    *("bench", "train", "--preset", "tiny", "--context", "16", "--batch", "2", "--steps", "1"),
    *("--rounds", "3", "--compile", "off"),
)


@pytest.fixture(autouse=True)
def _small(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(clock.PEAK_SIZE, "cpu", 64)
    monkeypatch.setattr(verb, "VOCAB_SIZE", 128)
    monkeypatch.chdir(tmp_path)


def test_table_files_and_the_line_of_json(cli: Cli) -> None:
    shown = cli(*TINY).done()
    lines = shown.splitlines()
    found = json.loads(lines[-1])
    assert found == json.loads(Path("bench/train.json").read_text())
    assert {"device", "torch", "threads", "date", "transformers"} <= set(found["environment"])
    assert found["setup"]["precision"] == "fp32" and found["setup"]["device"] == "cpu"
    assert found["setup"]["cfg"]["n_layers"] == 1 and found["tokens_per_step"] == 32
    assert {path.name for path in Path("bench").iterdir()} == {"train.json", "train.png"}
    assert lines[-2] == "written to bench: train.json, train.png"
    content = Path("bench/train.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"

    assert [(row["model"], row["dropout"]) for row in found["rows"]] == [
        (model, p) for p in (0.0, 0.1) for model in (ON, OFF, HUGGING_FACE)
    ]
    assert set(found["parts"]) == set(PARTS)
    shown_rows = [line for line in lines if line.startswith((ON, OFF, HUGGING_FACE))]
    tables = shown_rows[6:]  # behind the six notes of what is being measured
    assert len(tables) == 12  # by dropout: three rows of speed, three of parts
    for i, row in enumerate(found["rows"]):
        speed, parts = tables[i + i // 3 * 3], tables[i + i // 3 * 3 + 3]
        assert speed.startswith(row["model"]) and parts.startswith(row["model"])
        assert f"{row['tokens_per_second']:,.0f}" in speed and f"{row['mfu']:.1%}" in speed
        assert f"{row['peak_bytes'] / 2**20:,.0f}" in speed and len(speed) <= 120
        assert parts.split()[-len(PARTS) :] == [f"{row['parts'][part]:,.1f}" for part in PARTS]
    assert "not measured" not in shown


def test_json_is_all_that_is_printed_when_asked(cli: Cli) -> None:
    ran = cli(*TINY, "--json", "--dropout", "0.2", "--no-peers", "--out", "a/b")
    shown = ran.done()
    assert shown.count("\n") == 1 and ran.err == ""
    found = json.loads(shown)
    assert found == json.loads(Path("a/b/train.json").read_text())
    assert {row["dropout"] for row in found["rows"]} == {0.2}
    assert [row["reason"] for row in found["refused"]] == ["left out by --no-peers"]


def test_what_is_not_measured_is_shown_with_the_reason(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_train, "build", full)
    shown = cli(*TINY, "--dropout", "0").done()
    assert f"  {ON}, eager, dropout 0: out of memory" in shown.split("not measured:\n")[1]
    assert json.loads(shown.splitlines()[-1])["rows"] == []
    assert Path("bench/train.png").exists()


def test_defaults_go_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    small = verb._setup(verb.Args())
    assert (small.cfg.n_layers, small.cfg.emb_dim, small.cfg.vocab_size) == (6, 384, 8192)
    assert (small.cfg.context_length, small.batch, small.autocast) == (256, 8, None)
    monkeypatch.undo()  # the small vocabulary
    monkeypatch.setattr("flashgpt.train.runtime.device", lambda name: torch.device("cuda"))
    large = verb._setup(verb.Args(batch=64))
    assert (large.cfg.n_layers, large.cfg.emb_dim, large.cfg.vocab_size) == (12, 768, 50304)
    assert (large.cfg.context_length, large.batch, large.autocast) == (1024, 64, torch.bfloat16)
    assert large.alternates is False


WRONG: list[tuple[str, int, list[str]]] = [
    ("--preset gpt3", 2, ["model.preset must be one of tiny, gpt2", "got 'gpt3'"]),
    ("--context 0", 2, ["context_length must be at least 1, got 0"]),
    ("--batch 0", 2, ["batch must be at least 1, got 0"]),
    ("--steps 0", 2, ["steps must be at least 1, got 0"]),
    ("--rounds 1", 2, ["rounds must be at least 3, got 1"]),
    ("--dropout 1", 2, ["dropout must be in [0, 1), got 1"]),
    ("--dropout x", 2, ["--dropout", "'x'"]),
    ("--compile maybe", 2, ["--compile", "maybe"]),
    ("--lengths 8", 2, ["bench train has no option --lengths"]),
    ("--save", 2, ["bench train has no option --save"]),
    ("--out FILE", 1, ["FILE: File exists"]),
]


@pytest.mark.parametrize(("words", "status", "says"), WRONG, ids=[w[0] for w in WRONG])
def test_what_is_wrong_is_said_before_anything_is_measured(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, words: str, status: int, says: list[str]
) -> None:
    def unwanted(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(bench_train, "measure", unwanted)
    Path("FILE").touch()
    ran = cli("bench", "train", *words.split())
    line = ran.error(status)
    assert ran.out == ""
    for part in says:
        assert part in line, line
    assert not Path("bench").exists()


def test_ctrl_c_leaves_an_earlier_result(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli(*TINY, "--dropout", "0", "--no-peers", "--json").done()
    before = {path: path.read_bytes() for path in Path("bench").iterdir()}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_train, "alternate", interrupted)
    assert cli(*TINY).status == 130
    assert {path: path.read_bytes() for path in Path("bench").iterdir()} == before


def test_help_shows_examples(cli: Cli) -> None:
    shown = cli("bench", "train", "--help").done()
    assert "flashgpt bench train --dropout 0 --compile off" in shown
    for option in ("--preset", "--context", "--batch", "--no-peers", "--json", "--out"):
        assert option in shown
