"""The picture of a run: a PNG, whole or not at all. pytest tests/measure/test_plots.py"""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from flashgpt.measure.plots import _smooth, draw_loss


def _metrics(count: int, judged: int = 0) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = [
        {"step": step, "loss": 5 / step, "lr": 1e-3} for step in range(1, count + 1)
    ]
    for entry in entries[len(entries) - judged :]:
        entry |= {"val_loss": entry["loss"] + 0.1, "bits_per_byte": 2.0}
    return entries


@pytest.mark.parametrize(("count", "judged"), [(0, 0), (1, 0), (1, 1), (500, 3)])
def test_a_png_is_drawn(
    tmp_path: Path, count: int, judged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (drawn.append(self), savefig(self, *a, **k))
    )
    draw_loss(_metrics(count, judged), tmp_path / "loss.png", "my [run] $x$")
    content = (tmp_path / "loss.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    assert struct.unpack(">II", content[16:24]) == (960, 600)
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    top, bottom = drawn[0].axes
    lines = top.get_lines()
    assert len(lines) == (3 if judged else 2)
    assert list(lines[0].get_ydata()) == [5 / step for step in range(1, count + 1)]
    if judged:
        assert list(lines[2].get_xdata()) == list(range(count - judged + 1, count + 1))
        assert f"{5 / count + 0.1:.3f} (2.000 bits" in str(lines[2].get_label())
    assert list(bottom.get_lines()[0].get_ydata()) == [1e-3] * count


def test_a_picture_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "loss.png"
    draw_loss(_metrics(2), path, "run")
    before = path.read_bytes()

    def broken(self: Figure, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="no space"):
        draw_loss(_metrics(3), path, "run")
    assert path.read_bytes() == before


def test_no_global_state_of_matplotlib_is_touched(tmp_path: Path) -> None:
    draw_loss(_metrics(2), tmp_path / "loss.png", "run")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_the_smooth_curve_starts_without_bias() -> None:
    assert _smooth([]) == []
    assert _smooth([3.0]) == [3.0]
    assert _smooth([2.0] * 100) == pytest.approx([2.0] * 100)
    falling = _smooth([float(x) for x in range(200, 0, -1)])
    assert falling[0] == pytest.approx(200) and 1 < falling[-1] < 15
