"""The bars of `bench train`. pytest tests/measure/test_plots_train.py"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from flashgpt.measure.plots_train import draw_train
from flashgpt.measure.step_parts import PARTS


def _row(model: str, compiled: bool, ms: float) -> dict[str, Any]:
    parts = {part: ms * (i + 1) / 28 for i, part in enumerate(PARTS)}
    what = {"model": model, "compiled": compiled, "dropout": 0.1, "parts": parts}
    return {**what, "ms": ms, "tokens_per_second": 1e6 / ms, "mfu": 0.5}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))
    )
    return figures


def test_a_bar_is_a_step_and_its_parts(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [_row("use_flash on", True, 50.0), _row("Hugging Face", False, 200.0)]
    draw_train(rows, tmp_path / "train.png", "a title")
    content = (tmp_path / "train.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    assert [path.name for path in tmp_path.iterdir()] == ["train.png"]
    (axes,) = drawn[0].axes
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == list(PARTS) and axes.get_title() == "a title"
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["use_flash on, compiled, dropout 0.1", "Hugging Face, eager, dropout 0.1"]
    for i, row in enumerate(rows):
        bars = [container.patches[i] for container in axes.containers]
        widths = [bar.get_width() for bar in bars]
        assert widths == pytest.approx(list(row["parts"].values()))
        for bar, behind in itertools.pairwise(bars):
            assert behind.get_x() == pytest.approx(bar.get_x() + bar.get_width())
        assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(row["ms"])
        assert f"{row['tokens_per_second']:,.0f} tokens/s" in axes.texts[i].get_text()


def test_without_rows_it_says_so(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_train([], tmp_path / "train.png", "a title")
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["not measured"]
