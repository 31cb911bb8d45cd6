"""The picture of `plan`. Loads matplotlib only when it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashgpt.measure.plots import COLOURS, MARKERS, write

GIB = 2**30


def draw_plan(found: dict[str, Any], path: Path, title: str) -> None:
    """Peak memory and tokens per second against the micro-batch, a line for each way.

    Args:
        found: the object of plan.json.
        path: the PNG to write; appears complete or not at all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    ways = list(dict.fromkeys(row["way"] for row in found["rows"]))
    for i, way in enumerate(ways):
        rows = [row for row in found["rows"] if row["way"] == way]
        for axes, key, unit in ((left, "peak_bytes", GIB), (right, "tokens_per_second", 1)):
            _line(axes, rows, key, unit, i)
    highest = max((row["peak_bytes"] for row in found["rows"]), default=0)
    if found["usable_bytes"] < 2 * highest:
        left.axhline(found["usable_bytes"] / GIB, color="#b03030", linestyle=":")
    sizes = sorted({row["micro_batch"] for row in found["rows"]})
    for axes, what in ((left, "peak memory (GiB)"), (right, "tokens per second")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size}" for size in sizes])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("micro-batch (sequences)")
        axes.set_ylabel(what)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{title}\ncrosses: predicted from smaller micro-batches", fontsize=10)
    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    write(figure, path)


def _line(axes: Any, rows: Sequence[dict[str, Any]], key: str, unit: float, number: int) -> None:
    """What was measured of a way, and crosses where it had been predicted."""
    colour = COLOURS[number % len(COLOURS)]
    axes.plot(
        [row["micro_batch"] for row in rows],
        [row[key] / unit for row in rows],
        color=colour,
        marker=MARKERS[number],
        label=rows[0]["way"],
    )
    known = [row for row in rows if row[f"predicted_{key}"] is not None]
    places = [row["micro_batch"] for row in known]
    predicted = [row[f"predicted_{key}"] / unit for row in known]
    axes.plot(places, predicted, "x", color=colour, markersize=10)
