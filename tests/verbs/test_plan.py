"""`flashgpt plan`: table, files, the config it writes, and what is wrong said in one line.

pytest tests/verbs/test_plan.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashgpt.measure import plan, step_sample
from flashgpt.toml import load_toml
from flashgpt.verbs import plan as verb

Cli = Callable[..., Any]
MODEL = ("--model.n-layers", "1", "--model.emb-dim", "32", "--model.context-length", "16")
TINY = (
    *("plan", "--data.tokenizer", "bytes", "--train.tokens-per-step", "64", "--train.seed", "5"),
    *MODEL,
)


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_sample, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(plan, "WAYS", plan.WAYS[:2])
    monkeypatch.setitem(plan.FIRST_TOKENS, "cpu", 16)
    monkeypatch.chdir(tmp_path)


def test_table_files_config_and_the_line_of_json(cli: Cli) -> None:
    shown = cli(*TINY).done()
    lines = shown.splitlines()
    found = json.loads(lines[-1])
    assert found == json.loads(Path("plan/plan.json").read_text())
    assert {path.name for path in Path("plan").iterdir()} == {"plan.json", "plan.png", "run.toml"}
    content = Path("plan/plan.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    assert {"device", "torch", "threads", "date"} <= set(found["environment"])
    assert [(row["use_flash"], row["micro_batch"]) for row in found["rows"]] == [
        (flash, size) for flash in (True, False) for size in (1, 2, 4)
    ]
    predicted = [row for row in found["rows"] if row["predicted_peak_bytes"] is not None]
    assert [row["micro_batch"] for row in predicted] == [4, 4]
    assert len(found["predictions"]) == 36 and found["setup"]["cfg"]["vocab_size"] == 257

    measured, ahead = shown.split("\npredicted, not measured: GPUs that are not here")
    for row in found["rows"]:
        line = next(x for x in measured.splitlines() if x.startswith(f"{row['way']} ") and
                    x.removeprefix(row["way"]).split()[0] == str(row["micro_batch"]))  # fmt: skip
        assert f"{row['tokens_per_second']:,.0f}" in line and len(line) <= 120
    assert len([line for line in ahead.splitlines() if line.startswith("gpt2")]) == 36
    assert "200 GB/s within 8 GPUs" in ahead and "interpreter and libraries" in shown


def test_the_config_is_the_one_given_with_the_choice_and_is_never_overwritten(cli: Cli) -> None:
    shown = cli(*TINY).done()
    found = json.loads(Path("plan/plan.json").read_text())
    best, config = found["best"], load_toml("plan/run.toml")
    assert best["tokens_per_second"] == max(row["tokens_per_second"] for row in found["rows"])
    assert config.train.micro_batch == best["micro_batch"] and config.train.seed == 5
    assert config.model.use_flash is (None if best["use_flash"] else False)
    assert config.model.n_layers == 1 and config.data.tokenizer == "bytes"
    assert f"  train.micro_batch = {best['micro_batch']} (was left out)" in shown
    assert "nothing else was measured" not in shown
    assert "train.seed" not in shown
    before = Path("plan/run.toml").read_bytes()
    again = cli("plan", "plan/run.toml", "--json")
    assert again.done().count("\n") == 1 and again.err == ""
    assert json.loads(again.out)["config"] == "plan/run-2.toml"
    assert Path("plan/run.toml").read_bytes() == before
    assert load_toml("plan/run-2.toml").train.seed == 5


def test_a_choice_of_one_is_said_to_be_one(cli: Cli) -> None:
    hint = "nothing else was measured; more --seconds compares more"
    assert hint in cli(*TINY, "--seconds", "0.001").done()


def test_what_does_not_fit_is_shown_and_nothing_is_written(cli: Cli) -> None:
    shown = cli(*TINY, "--memory", "0.0001").done()
    assert "use_flash on, micro-batch 4: does not fit" in shown or " no\n" in shown
    assert "nothing that was measured fits" in shown
    assert json.loads(shown.splitlines()[-1])["config"] is None
    assert not Path("plan/run.toml").exists()


def test_the_model_is_that_of_the_run_to_come(cli: Cli, trained: Any, text: Path) -> None:
    shape = verb._shape(verb.read(["--model.init-from", str(trained.folder)]).run)
    assert (shape.vocab_size, shape.context_length, shape.n_layers) == (257, 32, 2)
    assert verb._shape(verb.read(["--data.vocab-size", "4000"]).run).vocab_size == 4000
    cli("prepare", text, "--tokenizer", "bytes", "--out", "data/words").done()
    assert verb._shape(verb.read(["--data.source", "data/words"]).run).vocab_size == 257


WRONG: list[tuple[str, int, list[str]]] = [
    ("missing.toml", 2, ["missing.toml cannot be read"]),
    ("my.txt", 2, ["my.txt is no TOML file"]),
    ("--margin 1", 2, ["margin must be in [0, 1), got 1"]),
    ("--memory 0", 2, ["memory must be positive and finite (GiB), got 0"]),
    ("--memory -1", 2, ["memory must be positive and finite (GiB), got -1"]),
    ("--memory inf", 2, ["memory must be positive and finite (GiB), got inf"]),
    ("--memory nan", 2, ["memory must be positive and finite (GiB), got nan"]),
    ("--seconds 0", 2, ["seconds must be positive and finite, got 0"]),
    ("--seconds nan", 2, ["seconds must be positive and finite, got nan"]),
    ("--cluster.tflops 0", 2, ["cluster.tflops must be positive, got 0"]),
    ("--train.tokens-per-step 100", 2, ["train.tokens_per_step must be a multiple"]),
    ("--train.precision fp16", 2, ["train.precision must be fp32 (or auto) on the CPU"]),
    ("--train.device cuda", 2, ["torch finds no CUDA device"]),
    ("--model.preset gpt3", 2, ["model.preset must be one of tiny, gpt2"]),
    ("--micro-batch 4", 2, ["plan has no option --micro-batch"]),
    ("--out FILE", 1, ["FILE: File exists"]),
]


@pytest.mark.parametrize(("words", "status", "says"), WRONG, ids=[w[0] for w in WRONG])
def test_what_is_wrong_is_said_before_anything_is_measured(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, words: str, status: int, says: list[str]
) -> None:
    def unwanted(*_: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(plan, "measure", unwanted)
    Path("FILE").touch()
    ran = cli("plan", *words.split())
    line = ran.error(status)
    assert ran.out == ""
    for part in says:
        assert part in line, line
    assert not Path("plan").exists()


def test_ctrl_c_leaves_an_earlier_result(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("plan").mkdir()
    Path("plan/plan.json").write_text("{}")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(step_sample, "measure", interrupted)
    assert cli(*TINY).status == 130
    assert [path.name for path in Path("plan").iterdir()] == ["plan.json"]
    assert Path("plan/plan.json").read_text() == "{}"


def test_the_predictions_of_the_docs_are_those_of_the_table() -> None:
    page = (Path(verb.__file__).parents[2] / "docs" / "planning.md").read_text()
    shown = [line for line in page.splitlines() if line.startswith("| gpt2")]
    ahead = [p for p in verb.table(verb.Cluster(), 0.1) if p.gpus in (8, 64)]
    expected = [verb._cells_ahead(p) for p in ahead if p.model in ("gpt2", "gpt2-xl")]
    assert shown == [f"| {' | '.join(cells)} |" for cells in expected] and len(shown) == 8


def test_help_shows_examples(cli: Cli) -> None:
    shown = cli("plan", "--help").done()
    assert "flashgpt plan runs/mine/config.toml" in shown
    for option in ("--memory", "--margin", "--cluster.network-bandwidth", "--train.micro-batch"):
        assert option in shown
