"""The lines of `bench generate`. pytest tests/measure/test_plots_generate.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from flashgpt.measure.generate_ways import DYNAMIC, OURS, WAYS
from flashgpt.measure.plots_generate import draw_generate


def _row(way: str, batch: int, speed: float) -> dict[str, Any]:
    limit = 1000.0 * batch
    row = {"way": way, "batch": batch, "tokens_per_second": speed}
    return {**row, "limit_tokens_per_second": limit}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))
    )
    return figures


def test_a_line_for_each_way_and_the_limit(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [_row(OURS, 1, 500), _row(DYNAMIC, 1, 100), _row(OURS, 8, 3000), _row(DYNAMIC, 32, 900)]
    draw_generate({"rows": rows, "ways": WAYS}, tmp_path / "generate.png", "a title")
    content = (tmp_path / "generate.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    assert [path.name for path in tmp_path.iterdir()] == ["generate.png"]
    (axes,) = drawn[0].axes
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_title()) == ("log", "log", "a title")
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines == {
        WAYS[OURS]: [[1, 500], [8, 3000]],
        WAYS[DYNAMIC]: [[1, 100], [32, 900]],
        "limit of the memory": [[1, 1000], [8, 8000], [32, 32000]],
    }


def test_without_rows_it_says_so(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_generate({"rows": [], "ways": WAYS}, tmp_path / "generate.png", "a title")
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["not measured"]
