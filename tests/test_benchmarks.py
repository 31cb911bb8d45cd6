"""The scripts of the published measurements: what they write, and that they see what is wrong.

pytest tests/test_benchmarks.py
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from benchmarks import curves, overhead, prepare
from flashgpt.attention import kernels
from flashgpt.attention.dropout import Dropout
from flashgpt.model.gpt2 import GPTModel

STEPS = 4
TINY = f"--steps {STEPS} --layers 1 --emb-dim 64 --context-length 32 --out".split()
stdlib = functools.cache(curves._stdlib)


@pytest.fixture(autouse=True)
def text_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "_stdlib", stdlib)


def losses_of(folder: Path) -> list[dict[str, list[float]]]:
    """The losses of each learning rate."""
    return [c["losses"] for c in json.loads((folder / "curves.json").read_text())["curves"]]


def first_steps_agree(losses: dict[str, list[float]]) -> bool:
    return all(abs(losses[run][0] - losses["standard"][0]) <= 1e-5 for run in curves.RUNS)


def test_both_settings_give_one_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "here"
    assert curves.main([*TINY, str(out)]) == 0

    record = json.loads((out / "curves.json").read_text())
    assert [curve["lr"] for curve in record["curves"]] == [6e-4, 3e-3]
    assert {"torch", "cpu", "threads", "date"} <= record["environment"].keys()
    for curve, losses in zip(record["curves"], losses_of(out), strict=True):
        assert set(losses) == {"flash", "standard", "control"}
        assert curve["kernels"]["standard"] == curve["kernels"]["control"] == ["standard"]
        assert "standard" not in curve["kernels"]["flash"] and curve["kernels"]["flash"]
        assert first_steps_agree(losses)
        for values in losses.values():
            assert len(values) == STEPS and all(map(math.isfinite, values))
            assert len(set(values)) == STEPS and values[-1] < values[0]
        # The control is another computation, not standard once more.
        assert losses["control"] != losses["standard"]
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["claims_hold"] is record["claims_hold"] is True
    assert [curve["holds"] for curve in summary["curves"]] == [True, True]

    picture = (out / "curves.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and picture[-8:-4] == b"IEND"
    assert struct.unpack(">II", picture[16:24]) == (1210, 770)
    assert sorted(path.name for path in out.iterdir()) == ["curves.json", "curves.png"]


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time of a tiny run."""
    monkeypatch.setattr(curves, "draw", lambda record, path: None)


Attention = Callable[..., tuple[Any, ...]]


def no_scale(attention: Attention, q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Any:
    return attention(q * q.shape[-1] ** 0.5, k, v, **rest)


def other_mask(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, *, dropout: Dropout, **rest: Any
) -> Any:
    dropout = dataclasses.replace(dropout, seed=dropout.seed + 1)
    return attention(q, k, v, dropout=dropout, **rest)


@pytest.mark.usefixtures("no_picture")
@pytest.mark.parametrize("mutation", [no_scale, other_mask], ids=lambda m: m.__name__)
def test_a_broken_flash_path_is_reported(
    mutation: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, kernel in kernels.KERNELS.items():
        if name != "standard":
            broken = functools.partial(mutation, kernel.attention)
            monkeypatch.setitem(
                kernels.KERNELS, name, dataclasses.replace(kernel, attention=broken)
            )
    assert curves.main([*TINY, str(tmp_path)]) == 1
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["claims_hold"] is False
    assert [curve["holds"] for curve in summary["curves"]] == [False, False]


@pytest.mark.usefixtures("no_picture")
def test_a_control_with_the_masks_of_other_rows_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_dropout = GPTModel.set_dropout
    monkeypatch.setattr(
        GPTModel, "set_dropout", lambda self, seed, first_row=0: set_dropout(self, seed)
    )
    assert curves.main([*TINY, str(tmp_path)]) == 1
    assert not any(map(first_steps_agree, losses_of(tmp_path)))


def test_losses_that_are_not_finite_fail() -> None:
    for run in curves.RUNS:
        losses = {name: [5.0, 4.0] for name in curves.RUNS} | {run: [5.0, math.nan]}
        assert not any(curves._judge(lr, losses)["holds"] for lr in (curves.CALM, curves.STEEP))


def test_preparing_is_measured_against_the_tokenizer_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare.corpus, "SAMPLE", 100_000)
    out = tmp_path / "made" / "here"
    status = prepare.main(["--megabytes", "0.3", "0.1", "--rounds", "1", "2", "--out", str(out)])
    record = json.loads((out / "prepare.json").read_text())
    assert [size["bytes"] for size in record["sizes"]] == [100_000, 300_000]
    for size, rounds in zip(record["sizes"], (2, 1), strict=True):
        for way in prepare.WAYS:
            assert len(size[way]) == rounds
            assert all(value > 0 for found in size[way] for value in found.values())
    assert {"tokenizers", "platform", "cores", "date"} <= record["environment"].keys()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record["claims"]
    assert status == (not record["claims"]["hold"])
    assert sorted(path.name for path in out.iterdir()) == ["prepare.json"]


@pytest.mark.parametrize(
    ("seconds", "peak_mb", "holds"), [(1.2, 210, True), (1.3, 200, False), (1.0, 230, False)]
)
def test_claims_about_preparing_can_fail(seconds: float, peak_mb: float, holds: bool) -> None:
    raw = [{"seconds": 1.0, "cpu_seconds": 2.0, "peak_mb": 100.0}]
    small = {"raw": raw, "prepare": [{"seconds": 1.0, "cpu_seconds": 2.0, "peak_mb": 200.0}]}
    made = [{"seconds": seconds, "cpu_seconds": 2.2, "peak_mb": peak_mb}]
    claims = prepare._judge([small, {"raw": raw, "prepare": made}])
    assert claims["hold"] is holds
    assert claims["time_ratios"] == [1.0, seconds] and claims["cpu_ratios"] == [1.0, 1.1]


def test_the_trainers_cost_is_measured_against_the_bare_step(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overhead, "VOCAB_SIZE", 300)
    small = "--preset tiny --rows 1 --steps 5 --rounds 2 --warmup 1 --checkpoint-every 2"
    folders = ["--source", str(text), "--out", str(tmp_path / "out")]
    assert overhead.main([*small.split(), *folders]) == 0
    record = json.loads((tmp_path / "out" / "overhead.json").read_text())
    seconds = record["seconds_per_step"]
    assert len(seconds["bare"]) == len(seconds["trainer"]) == 2
    middle = {name: sum(values) / 2 for name, values in seconds.items()}
    assert record["cost"] == pytest.approx(middle["trainer"] / middle["bare"] - 1)
    assert 0 < record["data_share"] < 1 and record["mfu"] is None
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["cost"] == record["cost"]


def test_the_chapter_on_training_says_what_the_trainer_cost() -> None:
    root = Path(overhead.__file__).parents[1]
    record = json.loads((root / "benchmarks" / "overhead" / "overhead.json").read_text())
    page = " ".join((root / "docs" / "training.md").read_text().split())
    bare = sum(record["seconds_per_step"]["bare"]) / 2
    device = sum(record["device_seconds_per_step"]) / 2
    first, second = record["seconds_per_step"]["trainer"]
    assert f"takes {device / bare - 1:.1%}".replace("%", " %") in page
    assert f"waiting for data {record['data_share']:.1%}".replace("%", " %") in page
    assert f"took {1e3 * second:.1f} ms a step against {1e3 * bare:.1f} bare" in page
    assert f"and {1e3 * first:.1f} where it was not" in page
    pinning = (first - record["device_seconds_per_step"][0]) * record["options"]["steps"]
    assert f"pinning took {pinning:.1f} s" in page


def test_the_chapter_on_training_says_what_muon_won() -> None:
    root = Path(overhead.__file__).parents[1]
    record = json.loads((root / "benchmarks" / "optimizers" / "optimizers.json").read_text())
    page = " ".join((root / "docs" / "training.md").read_text().split())
    rows = {row["variant"]: row for row in record["variants"]}
    adamw, three, one = (rows[name] for name in ("adamw", "muon-three", "muon-one"))
    middle = statistics.median
    assert f"at step {middle(three['steps_to_adamw']):.0f}, and in" in page
    seconds = [middle(row["seconds_to_adamw"]) for row in (three, adamw)]
    assert f"in {seconds[0]:.1f} s instead of {seconds[1]:.1f}" in page
    losses = [middle(row["final_loss"]) for row in (one, three)]
    assert f"({losses[0]:.3f} against {losses[1]:.3f})" in page
