"""Pictures of a run and of a benchmark. Loads matplotlib only when one is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STANDARD_COLOUR = "#555555"
COLOURS = (
    *("#c4501b", "#1f5a93", "#2f8f5b", "#8a4fa3", "#c9a227", "#3aa6b9", "#d4679a", "#7a5230"),
    *("#9aa23a", "#5566cc", "#b04a4a", "#3f7f7f", "#a0785a"),
)
MARKERS = "osD^vPX*<>hp8d"


def draw_loss(metrics: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Training and validation loss against the step, with the learning rate below, as a PNG.

    Args:
        metrics: the objects of metrics.jsonl.
        path: the PNG to write; appears complete or not at all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    trained = [m for m in metrics if "loss" in m and "skipped" not in m]
    steps, losses = [m["step"] for m in trained], [m["loss"] for m in trained]
    top.plot(steps, losses, color="#9bb8d3", linewidth=0.8, label="training, each step")
    top.plot(steps, _smooth(losses), color="#1f5a93", linewidth=1.6, label="training, smoothed")
    skipped = [m["step"] for m in metrics if "skipped" in m]
    for number, step in enumerate(skipped):
        label = "" if number else f"left out by the guard ({len(skipped)})"
        top.axvline(step, color="#b03030", linewidth=0.8, linestyle=":", label=label)
    judged = [m for m in metrics if "val_loss" in m]
    if judged:
        last, bits = judged[-1]["val_loss"], judged[-1]["bits_per_byte"]
        top.plot(
            [m["step"] for m in judged],
            [m["val_loss"] for m in judged],
            "o-",
            color="#c4501b",
            markersize=4,
            label=f"validation, last {last:.3f} ({bits:.3f} bits per byte)",
        )
    top.set_ylabel("loss (nats per token)")
    top.set_title(title)
    top.grid(alpha=0.3)
    top.legend()
    bottom.plot(steps, [m["lr"] for m in trained], color="#555555", linewidth=1.2)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    bottom.grid(alpha=0.3)
    write(figure, path)


def draw_attention(rows: Sequence[dict[str, Any]], folder: Path, title: str) -> None:
    """Speed and peak memory of attention kernels against the length, dropout off and on.

    Args:
        rows: the rows of attention.json (`flashgpt.measure.bench_attention.Timing` as objects).
        folder: gets speed.png and memory.png; each appears complete or not at all.
    """
    fastest = max(_passed(row)["flop_per_second"] for row in rows)
    unit, scale = ("TFLOP/s", 1e12) if fastest >= 1e12 else ("GFLOP/s", 1e9)
    speed = _against_length(rows, lambda row: _passed(row)["flop_per_second"] / scale)
    for axes in speed.axes:
        axes.set_ylim(bottom=0)
    speed.axes[0].set_ylabel(f"speed ({unit})")
    speed.suptitle(f"causal attention, forward + backward\n{title}", fontsize=11)
    write(speed, folder / "speed.png")
    memory = _against_length(rows, lambda row: row["peak_bytes"] / 2**20)
    for axes in memory.axes:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.{0 if value >= 1 else 3}f}")
    memory.axes[0].set_ylabel("peak memory beside q, k, v (MiB)")
    memory.suptitle(f"causal attention, forward + backward\n{title}", fontsize=11)
    write(memory, folder / "memory.png")


def _passed(row: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward, or forward where there is no backward."""
    found: dict[str, Any] = row["forward_backward"] or row["forward"]
    return found


def _against_length(
    rows: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]
) -> Figure:
    """Two panels, dropout off and on, with one line per kernel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    lengths = sorted({row["length"] for row in rows})
    lines: dict[str, Any] = {}
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, dropout in zip(panels, (False, True), strict=True):
        _panel(axes, [row for row in rows if row["dropout"] == dropout], value, lines, rows)
        axes.set_title(f"dropout {'on' if dropout else 'off'}", fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.set_xlabel("sequence length T (tokens)")
        axes.grid(alpha=0.3)
    figure.legend(
        list(lines.values()), list(lines), loc="outside lower center", ncols=5, frameon=False
    )
    return figure


def _panel(
    axes: Axes,
    rows: Sequence[dict[str, Any]],
    value: Callable[[dict[str, Any]], float],
    lines: dict[str, Any],
    every: Sequence[dict[str, Any]],
) -> None:
    """Draws one line per kernel; `lines` gets those of names that are new."""
    names = [name for name in dict.fromkeys(row["kernel"] for row in every) if name != "standard"]
    for name in dict.fromkeys(row["kernel"] for row in rows):
        own = [row for row in rows if row["kernel"] == name]
        mine = [row for row in own if row["forward_backward"]] or own
        i = -1 if name == "standard" else names.index(name)
        label = name if mine[0]["forward_backward"] else f"{name} (forward only)"
        (line,) = axes.plot(
            [row["length"] for row in mine],
            [value(row) for row in mine],
            color=STANDARD_COLOUR if i < 0 else COLOURS[i % len(COLOURS)],
            marker=MARKERS[(i + 1) % len(MARKERS)],
            linestyle="--" if i < 0 else "-",
            # Ever thinner, so that a line on top of another one does not hide it.
            markersize=max(4.0, 8.0 - 0.6 * (i + 1)),
            linewidth=max(1.0, 2.8 - 0.3 * (i + 1)),
        )
        lines.setdefault(label, line)
    if not rows:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#888888")


def write(figure: Figure, path: Path) -> None:
    """A PNG that appears complete or not at all."""
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary)
    temporary.replace(path)


def _smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Exponential average over about `share` of the curve, started without bias."""
    decay = 1 - 1 / max(1.0, share * len(values))
    smooth: list[float] = []
    total = weight = 0.0
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smooth.append(total / weight if weight else value)
    return smooth
