"""The picture of `bench generate`. Loads matplotlib only when it is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashgpt.measure.plots import COLOURS, MARKERS, STANDARD_COLOUR, write


def draw_generate(found: dict[str, Any], path: Path, title: str) -> None:
    """Tokens per second against the batch, one line per way, and the memory's limit above.

    Args:
        found: the content of generate.json.
        path: the PNG to write; appears complete or not at all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = found["rows"]
    limits = {row["batch"]: row["limit_tokens_per_second"] for row in rows}
    for i, (way, name) in enumerate(found["ways"].items()):
        own = [row for row in rows if row["way"] == way]
        if own:
            axes.plot(
                [row["batch"] for row in own],
                [row["tokens_per_second"] for row in own],
                color=COLOURS[i],
                marker=MARKERS[i],
                label=name,
            )
    axes.set_title(title, fontsize=11)
    if not rows:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#888888")
        write(figure, path)
        return
    axes.plot(
        list(limits),
        list(limits.values()),
        color=STANDARD_COLOUR,
        linestyle="--",
        marker="_",
        label="limit of the memory",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(list(limits), [f"{batch:,}" for batch in limits])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("texts side by side")
    axes.set_ylabel("tokens per second, all texts together")
    axes.grid(alpha=0.3)
    axes.legend()
    write(figure, path)
