"""What benchmarks.nanogpt_loss claims of its runs, its table and its picture.

A run is an object of `runs` in loss.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PEER, CONTROL, OWN = "nanogpt", "control", "ours"
CONTROL_BESIDE, OWN_BESIDE = f"{CONTROL} beside", f"{OWN} beside"
SPAN = 10  # steps, behind which what runs beside nanoGPT is made equal to it
COLOURS = {PEER: "#e8a87c", OWN: "#1f5a93", CONTROL: "#8f8f8f"}
LIMIT = 0.005
FIRST_LIMIT = {"bf16": 1e-3, "fp32": 1e-5}
LAST = 20  # steps whose mean is the final loss
JUDGED = ("final", "held_out")

Run = dict[str, Any]


def of_side(runs: Sequence[Run], side: str) -> list[Run]:
    """The runs of one side, by seed as they were made."""
    return [run for run in runs if run["side"] == side]


def judge(runs: Sequence[Run], first_limit: float) -> dict[str, Any]:
    """Differences, the control's and nanoGPT's spread beside them, and whether the claims hold."""
    peer, control, own = (of_side(runs, side) for side in (PEER, CONTROL, OWN))
    pairs = list(zip(peer, own, strict=True))
    first = [ours["losses"][0] - theirs["losses"][0] for theirs, ours in pairs]
    claims: dict[str, Any] = {
        "first_step": {
            "differences": first,
            "limit": first_limit,
            "holds": all(abs(value) <= first_limit for value in first),
        }
    }
    claims["drift"] = _drift(runs)
    for name in JUDGED:
        apart = [ours[name] - theirs[name] for theirs, ours in pairs]
        values = [run[name] for run in peer]
        mean, spread = statistics.fmean(apart), max(values) - min(values)
        claims[name] = {
            "differences": apart,
            "mean_difference": mean,
            "control_differences": [
                other[name] - theirs[name] for theirs, other in zip(peer, control, strict=True)
            ],
            "nanogpt_spread": spread,
            "limit": LIMIT,
            "holds": bool(abs(mean) <= LIMIT and abs(mean) <= spread),
        }
    return claims


def _ends(steps: int) -> list[int]:
    """The last step of each span."""
    return [min(first + SPAN, steps) - 1 for first in range(0, steps, SPAN)]


def _drift(runs: Sequence[Run]) -> dict[str, Any]:
    """What is apart before each time that it is made equal, added up over a run."""

    def drifts(side: str) -> list[float]:
        pairs = zip(of_side(runs, PEER), of_side(runs, side), strict=True)
        apart = [np.subtract(other["losses"], theirs["losses"]) for theirs, other in pairs]
        return [float(values[_ends(len(values))].sum()) for values in apart]

    found = drifts(OWN_BESIDE)
    mean = statistics.fmean(found)
    return {
        "differences": found,
        "mean_difference": mean,
        "control_differences": drifts(CONTROL_BESIDE),
        "limit": LIMIT,
        "holds": bool(abs(mean) <= LIMIT),
    }


def show(record: dict[str, Any]) -> None:
    """The table; differences are from nanoGPT's."""
    columns = f"{'seed':>6} {'loss':<9} {'nanogpt':>9} {'ours':>9} {'difference':>11}"
    print(f"\n{columns} {'of the control':>15}")
    runs = record["runs"]
    for at, (theirs, ours) in enumerate(zip(of_side(runs, PEER), of_side(runs, OWN), strict=True)):
        for name in JUDGED:
            claim = record["claims"][name]
            print(
                f"{ours['seed']:>6} {name:<9} {theirs[name]:>9.4f} {ours[name]:>9.4f} "
                f"{claim['differences'][at]:>+11.5f} {claim['control_differences'][at]:>+15.5f}"
            )
    first = record["claims"]["first_step"]
    largest = max(map(abs, first["differences"]))
    verdict = {True: "holds", False: "FAILS"}
    print(f"first step: largest difference {largest:.1e}, limit {first['limit']:.0e}: ", end="")
    print(verdict[first["holds"]])
    claim = record["claims"]["drift"]
    told = " ".join(f"{value:+.5f}" for value in claim["differences"])
    controls = " ".join(f"{value:+.5f}" for value in claim["control_differences"])
    print(
        f"drift: {told} (of the control {controls}), mean {claim['mean_difference']:+.5f}, "
        f"limit {claim['limit']:g}: {verdict[claim['holds']]}"
    )
    for name in JUDGED:
        claim = record["claims"][name]
        print(
            f"{name}: mean difference {claim['mean_difference']:+.5f}, limit {claim['limit']:g} "
            f"and nanogpt's spread {claim['nanogpt_spread']:.5f}: {verdict[claim['holds']]}"
        )


def draw(record: dict[str, Any], path: Path) -> None:
    """Losses of all seeds, below them the differences and the drift, as a PNG.

    Args:
        record: the object of loss.json.
        path: the PNG to write; appears complete or not at all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 10), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    peers, own = (of_side(record["runs"], side) for side in (PEER, OWN))
    for index, (theirs, ours) in enumerate(zip(peers, own, strict=True)):
        steps = range(1, len(ours["losses"]) + 1)
        for run, width in ((theirs, 3.5), (ours, 0.9)):
            label = None if index else run["side"]
            top.plot(steps, run["losses"], color=COLOURS[run["side"]], linewidth=width, label=label)
    for axis, sides in ((middle, (CONTROL, OWN)), (bottom, (CONTROL_BESIDE, OWN_BESIDE))):
        for side, colour in zip(sides, (COLOURS[CONTROL], COLOURS[OWN]), strict=True):
            for index, run in enumerate(of_side(record["runs"], side)):
                apart = np.subtract(run["losses"], peers[index]["losses"])
                at = np.arange(len(apart))
                if axis is bottom:
                    at = np.array(_ends(len(apart)))
                    apart = apart[at].cumsum()
                label = None if index else f"{side} - {PEER}"
                axis.plot(at + 1, apart, color=colour, linewidth=0.9, label=label)
        for limit in (-LIMIT, LIMIT):
            label = f"{LIMIT:g}, limit at the end" if limit > 0 else None
            axis.axhline(limit, color="#b02a2a", linewidth=1.0, linestyle="--", label=label)
    top.set_ylabel("training loss (nats per token)")
    middle.set_ylabel("difference of the losses")
    bottom.set_ylabel("drift")
    bottom.set_xlabel("optimizer step")
    for axis in (top, middle, bottom):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    model, made = record["model"], record["machine"]
    figure.suptitle(
        f"{model['n_layers']} layers, width {model['emb_dim']}, {model['context_length']} tokens x "
        f"{record['training']['batch']} rows, {record['products']}, {len(own)} seeds\n"
        f"torch {made['torch']}, {made['device']}, {record['date']}",
        fontsize=10,
    )
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary)
    temporary.replace(path)
