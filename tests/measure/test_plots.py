"""Pictures of a run and a benchmark: whole or not at all. pytest tests/measure/test_plots.py"""

from __future__ import annotations

import math
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from flashgpt.measure.plots import _smooth, draw_attention, draw_loss


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


def test_steps_that_were_left_out_are_marked_and_not_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (drawn.append(self), path.touch()))
    metrics = _metrics(20)
    for at in (4, 9):
        metrics[at] |= {"loss": math.nan, "skipped": "loss is nan"}
    draw_loss(metrics, tmp_path / "loss.png", "run")
    each, smooth, *marks = drawn[0].axes[0].get_lines()
    assert len(each.get_ydata()) == 18 and all(map(math.isfinite, smooth.get_ydata()))
    assert [next(iter(mark.get_xdata())) for mark in marks] == [5, 10]
    assert marks[0].get_label() == "left out by the guard (2)"


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


def _rows(backward: bool = True) -> list[dict[str, Any]]:
    """Two kernels with dropout off, one of them with dropout on too."""
    timed = {"flop_per_second": 2e9}
    return [
        {
            "kernel": kernel,
            "length": length,
            "dropout": dropout,
            "forward": {"flop_per_second": 1e9},
            "forward_backward": timed if backward or kernel == "standard" else None,
            "peak_bytes": length * 2**20,
        }
        for kernel, dropout in (("standard", False), ("fast", False), ("fast", True))
        for length in (64, 128, 256)
    ]


def test_a_benchmark_is_two_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (drawn.append(self), savefig(self, *a, **k))
    )
    draw_attention(_rows(), tmp_path, "a device, fp32, torch 2, 2026-11-22")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.png", "speed.png"]
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    for figure, values in zip(drawn, ([2.0] * 3, [64.0, 128.0, 256.0]), strict=True):
        off, on = figure.axes
        assert (off.get_title(), on.get_title()) == ("dropout off", "dropout on")
        assert figure.get_suptitle().endswith("a device, fp32, torch 2, 2026-11-22")
        standard, fast = off.get_lines()
        assert list(fast.get_xdata()) == [64, 128, 256] and list(fast.get_ydata()) == values
        (alone,) = on.get_lines()
        assert alone.get_color() == fast.get_color() != standard.get_color()
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["standard", "fast"]
        assert off.get_xscale() == "log"
    assert drawn[0].axes[0].get_yscale() == "linear" and drawn[1].axes[0].get_yscale() == "log"
    assert "GFLOP/s" in drawn[0].axes[0].get_ylabel() and "MiB" in drawn[1].axes[0].get_ylabel()


def test_a_kernel_without_backward_is_drawn_by_its_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("flashgpt.measure.plots.write", lambda figure, _: drawn.append(figure))
    rows = [row for row in _rows(backward=False) if not row["dropout"]]
    draw_attention(rows, tmp_path, "title")
    standard, fast = drawn[0].axes[0].get_lines()
    assert list(standard.get_ydata()) == [2.0] * 3 and list(fast.get_ydata()) == [1.0] * 3
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == ["standard", "fast (forward only)"]
    assert [text.get_text() for text in drawn[0].axes[1].texts] == ["not measured"]
