"""Loss curves of the two settings of the switch: training with flash equals training without.

Three runs per learning rate, from the same weights, with the same batches and dropout masks:

    flash      use_flash=True
    standard   use_flash=False
    control    use_flash=False, the rows of each batch in another order

The control says how far two runs of the same mathematics drift apart by rounding alone, since
training amplifies rounding. A dropout mask belongs to a row's place in the global batch, so merely
permuted rows would get each other's masks, which is another step, not the same one. The control
therefore takes the rows one by one in permuted order, each with the mask of its original place, and
adds up their gradients: the same step but for the order, and the grouping, of the sums.

Claims, on the loss of every step (nats per token, fp32):

    lr 6e-4    |flash - standard| <= 1e-5
    lr 3e-3    |flash - standard| <= 3 times the largest |control - standard|, or 1e-5

In the first step, before rounding has had anything to grow on, flash and control must agree with
standard within 1e-5 as well: else a control that is no control would set the limit. Rounding grows
differently on each machine, so the numbers do too.

Prints a table and, last, one line of JSON; writes curves.json and curves.png; exit status 1 if a
claim does not hold. The text is the source of Python's standard library, one id per byte, so the
losses belong to a version of Python. From the root of the checkout:

    python -m benchmarks.curves

Legend: B batch, T positions.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashgpt import __version__
from flashgpt.attention import kernels
from flashgpt.data import corpus, files
from flashgpt.data.batches import Batches
from flashgpt.data.shards import TokenSplit
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import TrainConfig
from flashgpt.train import optimizer
from flashgpt.train.schedule import learning_rate
from flashgpt.train.step import dropout_seed

RUNS = ("flash", "standard", "control")
CALM, STEEP = 6e-4, 3e-3  # learning rates: rounding stays small, rounding is amplified
LIMIT, FACTOR = 1e-5, 3.0
ROWS, HEADS, DROP_RATE, WARMUP, SEED = 8, 4, 0.1, 10, 1337
END = 256  # the id that closes a document
FLOOR = 1e-8  # where the picture's logarithmic axis draws a difference of 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison; 0 if both claims hold, else 1."""
    options = _options(argv)
    split, digest = _stdlib()
    batches = Batches(split, options.context_length, ROWS, SEED)
    curves = [_compare(lr, options, batches) for lr in (CALM, STEEP)]
    record = {
        "claims_hold": all(curve["holds"] for curve in curves),
        "environment": _environment(),
        "model": _model(options, use_flash=True) | {"use_flash": "per run"},
        "training": {
            "steps": options.steps,
            "rows": ROWS,
            "warmup_steps": min(WARMUP, options.steps),
            "seed": SEED,
            "text": f"Python {platform.python_version()} standard library, bytes",
            "tokens": split.n_tokens,
            "tokens_blake2b": digest,
        },
        "curves": curves,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    (options.out / "curves.json").write_text(text, encoding="utf-8", newline="\n")
    draw(record, options.out / "curves.png")
    _print_table(curves)
    kept = ("lr", "flash_standard", "control_standard", "limit", "holds")
    summary = [{name: curve[name] for name in kept} for curve in curves]
    print(json.dumps({"claims_hold": record["claims_hold"], "curves": summary}))
    return 0 if record["claims_hold"] else 1


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=about)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of a run (200)")
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks (4)")
    parser.add_argument("--emb-dim", type=int, default=128, help="model width (128)")
    parser.add_argument("--context-length", type=int, default=256, help="tokens of a row (256)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).with_suffix(""),
        help="folder of the results (benchmarks/curves)",
    )
    return parser.parse_args(argv)


def _stdlib() -> tuple[TokenSplit, str]:
    """Python's standard library as byte ids in a fixed order, and the digest of the ids."""
    parts: list[np.ndarray[Any, np.dtype[np.uint16]]] = []
    starts, size, n_bytes = [0], 0, 0
    for piece in corpus.documents(corpus.survey(files.find_files(["stdlib"])).files):
        content = np.frombuffer(piece.text.encode("utf-8"), np.uint8).astype(np.uint16)
        parts.append(content)
        size, n_bytes = size + len(content), n_bytes + len(content)
        if piece.last:
            parts.append(np.array([END], np.uint16))
            size += 1
            starts.append(size)
    ids = np.concatenate(parts)
    digest = hashlib.blake2b(ids.astype("<u2").tobytes(), digest_size=16).hexdigest()
    return TokenSplit([ids], [np.array(starts[:-1], np.int64)], n_bytes), digest


def _model(options: argparse.Namespace, use_flash: bool) -> dict[str, Any]:
    return {
        "vocab_size": END + 1,
        "context_length": options.context_length,
        "emb_dim": options.emb_dim,
        "n_heads": HEADS,
        "n_layers": options.layers,
        "drop_rate": DROP_RATE,
        "use_flash": use_flash,
    }


def _compare(lr: float, options: argparse.Namespace, batches: Batches) -> dict[str, Any]:
    """The three runs of a learning rate, and whether its claim holds."""
    losses: dict[str, list[float]] = {}
    served: dict[str, list[str]] = {}
    for run in RUNS:
        kernels.clear_receipt()
        started = time.perf_counter()
        losses[run] = _train(run, lr, options, batches)
        seconds = time.perf_counter() - started
        served[run] = sorted({line.split(" served ")[0] for line in kernels.receipt()})
        print(f"lr {lr:g} {run}: {seconds:.1f} s, last loss {losses[run][-1]:.4f}", flush=True)
    return {"lr": lr, **_judge(lr, losses), "kernels": served, "losses": losses}


def _judge(lr: float, losses: dict[str, list[float]]) -> dict[str, Any]:
    """How far the curves are apart, and whether the learning rate's claim holds."""
    flash, control = (_apart(losses[run], losses["standard"]) for run in ("flash", "control"))
    largest, noise = float(flash.max()), float(control.max())  # NaN if a loss is
    limit = LIMIT if lr == CALM else max(LIMIT, FACTOR * noise)
    start = max(flash[0], control[0])
    return {
        "flash_standard": largest,
        "control_standard": noise,
        "limit": limit,
        "holds": bool(start <= LIMIT and largest <= limit and math.isfinite(noise)),
        "first_step_above_1e-5": {"flash": _first(flash), "control": _first(control)},
    }


def _train(run: str, lr: float, options: argparse.Namespace, batches: Batches) -> list[float]:
    """The loss of each step of one run: AdamW, clipped at 1, warm-up and then a constant rate."""
    config = TrainConfig(
        steps=options.steps,
        tokens_per_step=ROWS * options.context_length,
        lr=lr,
        min_lr=1.0,
        warmup_steps=min(WARMUP, options.steps),
        grad_clip=1.0,
        seed=SEED,
    )
    torch.manual_seed(SEED)
    model = GPTModel(_model(options, use_flash=run == "flash")).train()
    adamw = optimizer.build(model, config)
    losses = []
    for step in range(config.steps):
        ids_BT, targets_BT = map(torch.from_numpy, batches.batch(step))
        order = np.random.default_rng([SEED, step]).permutation(ROWS).tolist()
        parts = [slice(row, row + 1) for row in order] if run == "control" else [slice(0, ROWS)]
        total = 0.0
        for rows in parts:
            model.set_dropout(dropout_seed(SEED, step), first_row=rows.start)
            loss = model(ids_BT[rows], targets_BT[rows]) / len(parts)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        adamw.set_rate(learning_rate(step, config))
        adamw.step()
        adamw.zero_grad()
        losses.append(total)
    return losses


def _apart(one: Sequence[float], other: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.abs(np.array(one, np.float64) - np.array(other, np.float64))


def _first(apart: np.ndarray[Any, np.dtype[np.float64]]) -> int | None:
    """The first step, from 1, whose losses are further apart than the limit."""
    above = np.flatnonzero(~(apart <= LIMIT))
    return int(above[0]) + 1 if len(above) else None


def _environment() -> dict[str, Any]:
    """What computed the losses."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "flashgpt": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
    }


def _print_table(curves: Sequence[dict[str, Any]]) -> None:
    print(f"\n{'lr':>6}  {'flash - standard':>16}  {'control - standard':>18}  {'limit':>8}  claim")
    for curve in curves:
        print(
            f"{curve['lr']:>6g}  {curve['flash_standard']:>16.2e}"
            f"  {curve['control_standard']:>18.2e}  {curve['limit']:>8.1e}"
            f"  {'holds' if curve['holds'] else 'FAILS'}"
        )


def draw(record: dict[str, Any], path: Path) -> None:
    """Losses above, differences below, a column for each learning rate, as a PNG.

    Args:
        record: the object of curves.json.
        path: the PNG to write; appears complete or not at all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for curve, top, bottom in zip(record["curves"], *axes, strict=True):
        losses = curve["losses"]
        steps = range(1, len(losses["standard"]) + 1)
        top.plot(steps, losses["standard"], color="#e8a87c", linewidth=4.5, label="standard")
        top.plot(steps, losses["flash"], color="#1f5a93", linewidth=1.0, label="flash")
        top.set_title(f"learning rate {curve['lr']:g}")
        for run, color in (("control", "#999999"), ("flash", "#1f5a93")):
            apart = np.maximum(_apart(losses[run], losses["standard"]), FLOOR)
            label = f"|{run} - standard|, largest {curve[f'{run}_standard']:.1e}"
            bottom.plot(steps, apart, color=color, linewidth=1.0, label=label)
        bottom.axhline(LIMIT, color="#b02a2a", linewidth=1.0, linestyle="--", label="1e-5")
        if curve["limit"] != LIMIT:
            label = f"limit, {FACTOR:g} x the control's largest"
            bottom.axhline(curve["limit"], color="#b02a2a", linewidth=1.0, ls=":", label=label)
        bottom.set_yscale("log")
        bottom.set_xlabel("optimizer step")
        for axis in (top, bottom):
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("loss (nats per token)")
    axes[1, 0].set_ylabel(f"difference of the losses (0 drawn at {FLOOR:g})")
    model, made = record["model"], record["environment"]
    figure.suptitle(
        f"{model['n_layers']} layers, width {model['emb_dim']}, {model['context_length']} tokens x "
        f"{ROWS} rows, dropout {DROP_RATE:g}, fp32\n"
        f"torch {made['torch']}, {made['cpu']}, threads: {made['threads']}, {made['date']}",
        fontsize=10,
    )
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
