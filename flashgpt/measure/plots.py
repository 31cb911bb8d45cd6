"""Pictures of a run. Loads matplotlib only when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


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
    trained = [m for m in metrics if "loss" in m]
    steps, losses = [m["step"] for m in trained], [m["loss"] for m in trained]
    top.plot(steps, losses, color="#9bb8d3", linewidth=0.8, label="training, each step")
    top.plot(steps, _smooth(losses), color="#1f5a93", linewidth=1.6, label="training, smoothed")
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
