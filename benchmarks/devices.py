"""One run.toml on a CPU, on a GPU, and on two devices by DDP and by FSDP2: the same curve.

    cpu        flashgpt train run.toml, where no GPU is seen
    control    the same in micro-batches of a quarter: sums in another order
    gpu        flashgpt train run.toml, on one GPU
    ddp        torchrun --nproc-per-node 2 -m flashgpt train run.toml
    fsdp       the same with --train.parallel fsdp

Everything is what a user types; the file has no word of devices. Its precision is fp32, for the
question is whether batches, masks and arithmetic are the same; with dropout. The text is this
project's own source and docs, as bytes. Without a GPU `gpu` is left out and the others are on the
CPU; with one GPU `ddp` and `fsdp` are.

Claim, for each way but the control: in the first step the losses agree within 1e-5 (nats per byte),
and in no step are they further from `cpu` than three times what the control ever is, or 1e-5.

Writes run.toml, devices.json and devices.png; prints a table and, last, one line of JSON; status 1
if a way fails or its claim does. From the root of the checkout, not under torchrun:

    python -m benchmarks.devices
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flashgpt.attention.measured import device_name
from flashgpt.train.checkpoint import write_json
from flashgpt.train.record import versions

ROOT = Path(__file__).parents[1]
CPU, CONTROL, GPU = "cpu", "control", "gpu"
PAIRS = ("ddp", "fsdp")
LIMIT, FACTOR = 1e-5, 3.0
ROWS, TOKENS = 16, 128  # sequences of a step, and their length
FLOOR = 1e-8  # where the picture's logarithmic axis draws a difference of 0
RUN = """\
[data]
source = {source}
tokenizer = "bytes"
cache = {cache}

[model]
context_length = {tokens}
emb_dim = 128
n_heads = 4
n_layers = 4
drop_rate = 0.1

[train]
steps = {steps}
tokens_per_step = {tokens_per_step}
lr = 1e-3
warmup_steps = 10
eval_every = {steps}
precision = "fp32"
"""

Row = dict[str, Any]


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.devices", description=about)
    add = parser.add_argument
    add("--steps", type=int, default=200, help="of each run (200)")
    add("--source", nargs="+", default=["flashgpt", "docs"], help="text (flashgpt docs)")
    out = Path(__file__).with_suffix("")
    add("--out", type=Path, default=out, help="folder of the result")
    wanted = parser.parse_args(argv)
    if wanted.steps < 10:
        parser.error(f"--steps must be at least 10, got {wanted.steps}")
    return wanted


def ways(gpus: int) -> tuple[str, ...]:
    """Those that so many GPUs allow."""
    found = (CPU, CONTROL, *((GPU,) if gpus else ()))
    return found if gpus == 1 else (*found, *PAIRS)


def run_file(wanted: argparse.Namespace, folder: Path) -> str:
    """The content of run.toml."""
    return RUN.format(
        source=json.dumps(wanted.source),
        cache=json.dumps(str(folder / "tokens")),
        steps=wanted.steps,
        tokens=TOKENS,
        tokens_per_step=ROWS * TOKENS,
    )


def train(way: str, file: Path) -> Row:
    """Trains in processes of its own: the losses, or why there are none."""
    out = file.parent / way
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command = ["-m", *(torchrun if way in PAIRS else []), "flashgpt", "train", str(file)]
    command += ["--out", str(out)]
    if way == CONTROL:
        command += ["--train.micro-batch", str(ROWS // 4)]
    if way == "fsdp":
        command += ["--train.parallel", "fsdp"]
    print(f"{way}: python {' '.join(command)}", flush=True)
    unseen = {"CUDA_VISIBLE_DEVICES": ""} if way in (CPU, CONTROL) else {}
    ran = subprocess.run([sys.executable, *command], cwd=ROOT, env={**os.environ, **unseen})
    if ran.returncode:
        return {"way": way, "failed": f"ended with status {ran.returncode}"}
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [record for record in map(json.loads, lines) if "loss" in record]
    held_out = [record["val_loss"] for record in map(json.loads, lines) if "val_loss" in record]
    state = json.loads((out / "state.json").read_text(encoding="utf-8"))
    return {
        "way": way,
        "losses": [record["loss"] for record in found],
        "val_loss": held_out[-1],
        "receipt": state["receipt"],
    }


def judge(rows: Sequence[Row]) -> None:
    """Adds to each row how far it is from `cpu`, and whether its claim holds."""
    by_way = {row["way"]: row for row in rows if "losses" in row}
    if CPU not in by_way or CONTROL not in by_way:
        return
    for row in by_way.values():
        row["apart"] = [
            abs(a - b) for a, b in zip(row["losses"], by_way[CPU]["losses"], strict=True)
        ]
    limit = max(LIMIT, FACTOR * max(by_way[CONTROL]["apart"]))
    for way, row in by_way.items():
        if way not in (CPU, CONTROL):
            row["limit"] = limit
            row["holds"] = row["apart"][0] <= LIMIT and max(row["apart"]) <= limit


def show(rows: Sequence[Row]) -> None:
    """The table."""
    print(f"\n{'way':<8} {'last loss':>9} {'held out':>9} {'first apart':>11} {'most':>8}  claim")
    for row in rows:
        if "failed" in row:
            print(f"{row['way']:<8} failed: {row['failed']}")
            continue
        apart = row.get("apart", [float("nan")])
        claim = {True: "holds", False: "FAILS"}.get(row.get("holds"), "-")
        print(
            f"{row['way']:<8} {row['losses'][-1]:>9.4f} {row['val_loss']:>9.4f} "
            f"{apart[0]:>11.1e} {max(apart):>8.1e}  {claim}"
        )


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Losses, and below how far each is from that of the CPU, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    colors = {CPU: "#c9a227", CONTROL: "#999999", GPU: "#2f8f5b", "ddp": "#1f5a93"}
    done = [row for row in rows if "apart" in row]
    for width, row in zip((5.0, 4.0, 3.0, 2.0, 1.0), done, strict=False):
        way, steps = row["way"], range(1, len(row["losses"]) + 1)
        color = colors.get(way, "#c4501b")
        top.plot(steps, row["losses"], color=color, linewidth=width, label=way)
        if way != CPU:
            apart = [max(x, FLOOR) for x in row["apart"]]
            bottom.plot(steps, apart, color=color, linewidth=1.0, label=f"|{way} - cpu|")
    bottom.set_yscale("log")
    bottom.set_xlabel("optimizer step")
    top.set_ylabel("loss (nats per byte)")
    bottom.set_ylabel("difference")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains every way, writes the result, prints the table."""
    wanted = options(argv)
    gpus = torch.cuda.device_count()
    wanted.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.toml"
        file.write_text(run_file(wanted, Path(folder)), encoding="utf-8")
        rows = [train(way, file) for way in ways(gpus)]
    (wanted.out / "run.toml").write_text(run_file(wanted, Path("data")), encoding="utf-8")
    judge(rows)
    machine = {"device": device_name("cuda" if gpus else "cpu"), **versions()}
    record = {
        "rows": rows,
        "machine": {**machine, "gpus": gpus},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    write_json(wanted.out / "devices.json", record)
    made = f"{machine['device']}, torch {machine['torch']}"
    if any("apart" in row for row in rows):
        draw(rows, wanted.out / "devices.png", f"one run.toml, fp32, dropout 0.1\n{made}")
    show(rows)
    kept = ("way", "failed", "holds", "limit")
    print(json.dumps([{key: row[key] for key in kept if key in row} for row in rows]))
    return int(any("failed" in row or not row.get("holds", True) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
