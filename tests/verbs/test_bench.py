"""`flashgpt bench` and `bench attention`: table, files, JSON line, what is wrong in one line.

pytest tests/verbs/test_bench.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashgpt.attention import measured
from flashgpt.measure import bench_attention, clock

Cli = Callable[..., Any]
TINY = (
    *("bench", "attention", "--lengths", "32", "8", "--tokens", "64", "--heads", "2"),
    *("--head-dim", "16", "--rounds", "3"),
)


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(clock.PEAK_SIZE, "cpu", 64)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASHGPT_CACHE", str(tmp_path / "cache"))
    measured._here.cache_clear()


def test_table_files_and_the_line_of_json(cli: Cli, tmp_path: Path) -> None:
    shown = cli(*TINY).done()
    lines = shown.splitlines()
    found = json.loads(lines[-1])
    assert found == json.loads((tmp_path / "bench" / "attention.json").read_text())
    assert set(found) == {"environment", "setup", "peak_flop_per_second", "rows", "refused"}
    assert {"device", "torch", "python", "threads", "date"} <= set(found["environment"])
    assert found["setup"]["lengths"] == [8, 32] and found["setup"]["dtype"] == "float32"
    names = {path.name for path in (tmp_path / "bench").iterdir()}
    assert names == {"attention.json", "speed.png", "memory.png"}
    assert lines[-2] == "written to bench: attention.json, speed.png, memory.png"
    assert not (tmp_path / "cache").exists()


def test_the_tables_show_every_row(cli: Cli) -> None:
    shown = cli(*TINY).done()
    found = json.loads(shown.splitlines()[-1])
    off, on = shown.split("dropout off\n")[-1].split("dropout 0.1\n")
    for part, dropout in ((off, False), (on, True)):
        rows = [row for row in found["rows"] if row["dropout"] == dropout]
        table = [line for line in part.split("\npeak:")[0].splitlines() if " to " in line]
        assert len(table) == len(rows)
        for line, row in zip(table, rows, strict=True):
            assert line.startswith(row["kernel"])
            assert line.split()[-1] == f"{row['times_standard']:.2f}"
            assert line.split()[-2] == f"{row['peak_bytes'] / 2**20:,.1f}"
            assert len(line) <= 120
    refused = shown.split("not measured:\n")[1]
    for entry in found["refused"]:
        assert f"  {entry['kernel']:14} {entry['reason']} (dropout " in refused
    assert "data is on cpu (dropout off; dropout on)" in refused


def test_json_is_all_that_is_printed_when_asked(cli: Cli) -> None:
    ran = cli(*TINY, "--json", "--dropout", "0", "--out", "a/b")
    shown = ran.done()
    assert shown.count("\n") == 1 and ran.err == ""
    found = json.loads(shown)
    assert found == json.loads(Path("a/b/attention.json").read_text())
    assert {row["dropout"] for row in found["rows"]} == {False}


def test_saved_is_what_choose_reads(cli: Cli, tmp_path: Path) -> None:
    shown = cli(*TINY, "--save").done()
    path = tmp_path / "cache" / "attention.json"
    assert f"saved to {path}; `choose` now uses it on this device" in shown.splitlines()
    found = json.loads(shown.splitlines()[-1])
    (device,) = json.loads(path.read_text())["devices"].values()
    keys = [(row["length"], row["dropout"], row["gradient"]) for row in device["rows"]]
    assert len(keys) == len(set(keys)) == 8
    for row in device["rows"]:
        names = {"blocked"} if row["dropout"] else {"blocked", "sdpa:cpu"}
        assert row["dtype"] == "float32" and names <= set(row["milliseconds"])
        assert not {"standard", bench_attention.SDPA} & set(row["milliseconds"])
        timed = "forward_backward" if row["gradient"] else "forward"
        for name, ms in row["milliseconds"].items():
            (mine,) = [
                entry[timed]["ms"]
                for entry in found["rows"]
                if (entry["kernel"], entry["length"], entry["dropout"])
                == (name, row["length"], row["dropout"])
            ]
            assert ms == mine


WRONG: list[tuple[str, int, list[str]]] = [
    ("", 2, ["bench measures one of attention, train, generate, got nothing"]),
    ("decode", 2, ["bench measures one of attention, train, generate, got 'decode'"]),
    ("--lengths 8", 2, ["bench measures one of attention, train, generate, got '--lengths'"]),
    ("attention --lengths 0", 2, ["lengths must be at least 1, got 0"]),
    ("attention --lengths x", 2, ["--lengths", "'x'"]),
    ("attention --tokens 0", 2, ["tokens must be at least 1, got 0"]),
    ("attention --heads 0", 2, ["heads must be at least 1"]),
    ("attention --head-dim -1", 2, ["head_dim must be at least 1, got -1"]),
    ("attention --dropout 1.5", 2, ["dropout must be in [0, 1), got 1.5"]),
    ("attention --rounds 1", 2, ["rounds must be at least 3, got 1"]),
    ("attention --dtype fp8", 2, ["--dtype", "fp8"]),
    ("attention --length 3", 2, ["no option --length", "did you mean --lengths?"]),
    ("attention --no-peers", 2, ["bench attention has no option --no-peers"]),
    ("attention --out FILE", 1, ["FILE: File exists"]),
    ("attention --out FILE/sub", 1, ["FILE/sub: Not a directory"]),
]


@pytest.mark.parametrize(("words", "status", "says"), WRONG, ids=[w[0] or "none" for w in WRONG])
def test_what_is_wrong_is_said_before_anything_is_measured(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, words: str, status: int, says: list[str]
) -> None:
    def unwanted(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(bench_attention, "measure", unwanted)
    Path("FILE").touch()
    ran = cli("bench", *words.split())
    line = ran.error(status)
    assert ran.out == ""
    for part in says:
        assert part in line, line
    assert not Path("bench").exists()


def test_ctrl_c_leaves_an_earlier_result(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli(*TINY, "--dropout", "0", "--json").done()
    before = {path: path.read_bytes() for path in Path("bench").iterdir()}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_attention, "alternate", interrupted)
    assert cli(*TINY).status == 130
    assert {path: path.read_bytes() for path in Path("bench").iterdir()} == before


def test_help_shows_examples(cli: Cli) -> None:
    shown = cli("bench", "attention", "--help").done()
    assert "flashgpt bench attention --lengths 256 1024 --dropout 0" in shown
    for option in ("--tokens", "--dtype", "--flex", "--save", "--json", "--out"):
        assert option in shown
