"""The picture of `bench train`. Loads matplotlib only when it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashgpt.measure.plots import COLOURS, write

OTHER_COLOUR = "#bbbbbb"


def draw_train(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """One bar per variant: the milliseconds of a step by part, and its tokens per second.

    Args:
        rows: the rows of train.json (`flashgpt.measure.bench_train.Row` as objects).
        path: the PNG to write; appears complete or not at all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2 + 0.4 * len(rows)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = range(len(rows))
    left = [0.0] * len(rows)
    for i, part in enumerate(rows[0]["parts"] if rows else ()):
        widths = [row["parts"][part] for row in rows]
        colour = OTHER_COLOUR if part == "other" else COLOURS[i % len(COLOURS)]
        axes.barh(places, widths, left=left, height=0.7, color=colour, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, row in zip(places, rows, strict=True):
        text = f" {row['tokens_per_second']:,.0f} tokens/s, MFU {row['mfu']:.0%}"
        axes.text(row["ms"], place, text, va="center", fontsize=9)
    axes.set_yticks(places, [_label(row) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max((row["ms"] for row in rows), default=1.0))
    axes.set_xlabel("milliseconds of a training step")
    axes.set_title(title, fontsize=11)
    axes.grid(axis="x", alpha=0.3)
    if rows:
        figure.legend(loc="outside lower center", ncols=7, frameon=False)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#888888")
    write(figure, path)


def _label(row: dict[str, Any]) -> str:
    how = "compiled" if row["compiled"] else "eager"
    return f"{row['model']}, {how}, dropout {row['dropout']:g}"
