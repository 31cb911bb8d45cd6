"""`flashgpt bench generate`: table, files, JSON line, and what is wrong said in one line.

pytest tests/verbs/test_bench_generate.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import generate as script
from flashgpt.measure import bench_generate, clock
from flashgpt.measure.generate_ways import DYNAMIC, OURS, STATIC, WAYS
from flashgpt.verbs import bench_generate as verb

Cli = Callable[..., Any]
SMALL = (
    *("--preset", "tiny", "--batches", "2", "1", "--prompt", "6", "--new-tokens", "8"),
    *("--rounds", "3", "--ways", "ours", "dynamic"),
)
TINY = ("bench", "generate", *SMALL)


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(clock.MEMORY_BYTES, "cpu", 2**12)
    monkeypatch.setattr("flashgpt.config.GPT2_VOCAB_SIZE", 128)
    monkeypatch.setattr(bench_generate, "LONG_PROMPT", 20)
    monkeypatch.chdir(tmp_path)


def test_table_files_and_the_line_of_json(cli: Cli) -> None:
    shown = cli(*TINY).done()
    lines = shown.splitlines()
    found = json.loads(lines[-1])
    assert found == json.loads(Path("bench/generate.json").read_text())
    assert {"device", "torch", "threads", "date", "transformers"} <= set(found["environment"])
    assert found["setup"]["dtype"] == "float32" and found["setup"]["device"] == "cpu"
    assert {path.name for path in Path("bench").iterdir()} == {"generate.json", "generate.png"}
    assert lines[-2] == "written to bench: generate.json, generate.png"
    content = Path("bench/generate.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"

    assert [(row["way"], row["batch"]) for row in found["rows"]] == [
        (way, batch) for batch in (1, 2) for way in (OURS, DYNAMIC)
    ]
    assert all(row["differing"] == 0 for row in found["rows"])
    tables = shown.split("first token after 20")
    for batch in (1, 2):
        rows = [row for row in found["rows"] if row["batch"] == batch]
        limit = rows[0]["limit_tokens_per_second"]
        table = tables[1].split(f"batch {batch}, limit {limit:,.0f} tokens/s\n")[1].splitlines()
        for row, line in zip(rows, table[1:3], strict=True):
            assert line.startswith(WAYS[row["way"]]) and len(line) <= 120
            assert f"{row['tokens_per_second']:,.0f}" in line and f"{row['share']:.1%}" in line
            assert line.endswith("equal") is (row["way"] == DYNAMIC)
    for first in found["first"]:
        assert f"{first['ms']:.3f}"[:4] in tables[2] and first["prompt"] == 20
    assert f"{found['weight_bytes'] / 2**20:,.0f} MiB of weights a step" in shown
    assert "not measured" not in shown


def test_json_is_all_that_is_printed_when_asked(cli: Cli) -> None:
    ran = cli(*TINY, "--ways", "ours", "--json", "--batches", "1", "--out", "a/b")
    shown = ran.done()
    assert shown.count("\n") == 1 and ran.err == ""
    found = json.loads(shown)
    assert found == json.loads(Path("a/b/generate.json").read_text())
    assert [row["way"] for row in found["rows"]] == [OURS] and found["refused"] == []


def test_what_differs_or_is_not_measured_is_shown(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = bench_generate._judge

    def change(setup: Any, one: Any, own_BC: Any, result: Any) -> None:
        if one.way == DYNAMIC:
            one.ids_BC[1, 3] += 1
        judged(setup, one, own_BC, result)

    monkeypatch.setattr(bench_generate, "_judge", change)
    monkeypatch.setattr("flashgpt.train.runtime.cannot_compile", lambda device: None)
    shown = cli(*TINY, "--batches", "2", "--ways", *WAYS, "--compiled-batches", "1").done()
    assert "1 differ from token 4\n" in shown
    refused = shown.split("not measured:\n")[1]
    assert f"  {WAYS[STATIC]}, batch 2: left out by --compiled-batches" in refused


def test_defaults_go_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the small vocabulary
    small = verb._setup(verb.Args())
    assert (small.cfg.n_layers, small.cfg.vocab_size, small.dtype) == (12, 50257, torch.float32)
    assert (small.batches, small.compiled_batches, small.rounds) == ((1, 8), (1,), 3)
    assert verb._setup(verb.Args(preset="tiny", prompt=3)).prompt == 3
    monkeypatch.setattr("flashgpt.train.runtime.device", lambda name: torch.device("cuda"))
    large = verb._setup(verb.Args())
    assert (large.batches, large.prompt, large.new_tokens) == ((1, 8, 32, 128), 128, 128)
    assert large.dtype == torch.bfloat16 and large.compiled_batches == large.batches
    tiny = verb._setup(verb.Args(preset="tiny", dtype="fp32"))
    assert (tiny.prompt, tiny.new_tokens, tiny.dtype) == (64, 64, torch.float32)


WRONG: list[tuple[str, int, list[str]]] = [
    ("--preset gpt3", 2, ["model.preset must be one of tiny, gpt2", "got 'gpt3'"]),
    ("--batches 0", 2, ["batches must be at least 1, got 0"]),
    ("--prompt 0", 2, ["prompt must be at least 1, got 0"]),
    ("--prompt 1020", 2, ["at most context_length 1024 together, got 1020 and 16"]),
    ("--new-tokens 1", 2, ["new_tokens must be at least 2, got 1"]),
    ("--rounds 1", 2, ["rounds must be at least 3, got 1"]),
    ("--dtype bf16", 2, ["dtype must be fp32 on the CPU, got bf16"]),
    ("--ways theirs", 2, ["--ways", "theirs"]),
    ("--no-peers", 2, ["bench generate has no option --no-peers"]),
    ("--out FILE", 1, ["FILE: File exists"]),
]


@pytest.mark.parametrize(("words", "status", "says"), WRONG, ids=[w[0] for w in WRONG])
def test_what_is_wrong_is_said_before_anything_is_measured(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, words: str, status: int, says: list[str]
) -> None:
    def unwanted(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(bench_generate, "measure", unwanted)
    Path("FILE").touch()
    ran = cli("bench", "generate", *words.split())
    line = ran.error(status)
    assert ran.out == ""
    for part in says:
        assert part in line, line
    assert not Path("bench").exists()


def test_ctrl_c_leaves_an_earlier_result(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli(*TINY, "--ways", "ours", "--json").done()
    before = {path: path.read_bytes() for path in Path("bench").iterdir()}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_generate, "alternate", interrupted)
    assert cli(*TINY, "--ways", "ours").status == 130
    assert {path: path.read_bytes() for path in Path("bench").iterdir()} == before


def test_help_shows_examples(cli: Cli) -> None:
    shown = cli("bench", "generate", "--help").done()
    assert "flashgpt bench generate --ways ours --batches 1 4 16" in shown
    for option in ("--preset", "--dtype", "--new-tokens", "--compiled-batches", "--json", "--out"):
        assert option in shown


def test_the_script_measures_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert script.main([*SMALL, "--out", str(tmp_path / "made")]) == 0
    shown = capsys.readouterr().out.splitlines()
    found = json.loads(shown[-1])
    assert found == json.loads((tmp_path / "made" / "generate.json").read_text())
    assert [(row["way"], row["batch"]) for row in found["rows"]] == [
        (way, batch) for batch in (2, 1) for way in (OURS, DYNAMIC)
    ]
    for row in found["rows"]:
        (line,) = [x for x in shown if x.startswith(f"{WAYS[row['way']]}, batch {row['batch']}: ")]
        assert f"{row['tokens_per_second']:,.0f} tokens/s" in line and "0 texts differ" in line
    with pytest.raises(SystemExit):
        script.main(["--preset", "tiny", "--prompt", "127"])
    assert "at most context_length 128 together" in capsys.readouterr().err
