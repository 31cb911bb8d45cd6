"""The training step in several processes: speed, memory, what communication costs, and its losses.

    single   one process
    blocks   one process, compiled block by block, as FSDP2's are
    ddp      one process per device, DDP
    fsdp     one process per device, FSDP2

A step is the trainer's own, with guard and clipping, on random tokens that lie on the device: on
CUDA GPT-2 124M, 64 x 1024 tokens a device, bf16, compiled. All ways are measured in one call, each
in processes of its own, which torchrun starts. For each:

- losses of some steps on one global batch, the same for all. In one process it is as many
  micro-batches as there are processes elsewhere. The control is one process with the rows of the
  batch in reversed order; a way agrees if its largest drift is at most three times the control's,
  or two roundings. FSDP2 is held to `blocks`: other code rounds elsewhere.
- time: the median over rounds of several steps each. Speed is tokens per second of all devices.
- memory: the most that torch has allocated in the first process, weights and optimizer included.
- communication, on CUDA, by PyTorch's profiler: the time of NCCL's kernels in a step, and the part
  of it that stands beside computing kernels.

Writes scaling.json, prints a table and, last, one line of JSON. Status 1 if a way failed or its
losses disagree. From the root of the checkout, not under torchrun:

    python -m benchmarks.scaling
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.scaling_ways import BLOCKS, SINGLE, Row, Worker, size
from flashgpt.attention.measured import device_name
from flashgpt.train import runtime
from flashgpt.train.checkpoint import write_json
from flashgpt.train.parallel import started
from flashgpt.train.record import versions

ROOT = Path(__file__).parents[1]
FLOORS = {"ddp": (1.9, 1.96), "fsdp": (1.8, 1.9)}  # of two devices: at least, and aimed at
LIMIT = 3.0  # controls
SECONDS = 300  # of a launch, before it is given up


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=about)
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="CUDA if there is any")
    add("--tiny", action="store_true", help="a model that a CPU trains in a moment, not compiled")
    add("--processes", type=int, default=2, help="devices, a process each (2)")
    add("--out", type=Path, default=ROOT / "benchmarks" / "scaling", help="folder of the result")
    add("--ways", nargs="+", choices=FLOORS, default=list(FLOORS), help="beside one process (all)")
    add("--worker", choices=(SINGLE, BLOCKS, *FLOORS), help=argparse.SUPPRESS)
    wanted = parser.parse_args(argv)
    if wanted.processes < 2:
        parser.error(f"--processes must be at least 2, got {wanted.processes}")
    return wanted


def work(wanted: argparse.Namespace) -> None:
    """Measures a way in the processes that there are; the first one writes what it found."""
    way, device = wanted.worker, runtime.device(wanted.device)
    with started("fsdp" if way == "fsdp" else "ddp", device) as parallel:
        row = Worker(way, size(wanted.tiny), wanted.device, wanted.processes, parallel).measure()
        if parallel.is_first:
            write_json(wanted.out / f"{way}.json", row)


def launch(way: str, wanted: argparse.Namespace, out: Path) -> Row:
    """Measures a way in processes of its own."""
    count = wanted.processes if way in FLOORS else 1
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"]
    command = [sys.executable, "-m", *(torchrun if count > 1 else []), "benchmarks.scaling"]
    command += ["--worker", way, "--out", str(out), "--processes", str(wanted.processes)]
    command += ["--device", wanted.device, *(["--tiny"] if wanted.tiny else [])]
    print(" ".join(command[1:]), flush=True)
    env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    begin = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, env=env) as running:
        try:
            reason = f"ended with status {running.wait(SECONDS)}"
        except subprocess.TimeoutExpired:
            running.terminate()  # torchrun passes it on
            reason = f"took more than {SECONDS} seconds"
    path = out / f"{way}.json"
    row: Row = {"way": way, "failed": reason}
    if path.exists():
        row = json.loads(path.read_text())
    return row | {"launch_seconds": time.perf_counter() - begin}


def compare(rows: list[Row]) -> None:
    """Adds speedup against one process, and drift from one that is compiled in the same way."""
    found = {row["way"]: row for row in rows if "ms" in row}
    if SINGLE not in found:
        return
    for way, row in found.items():
        if way != SINGLE:
            row["speedup"] = row["tokens_per_second"] / found[SINGLE]["tokens_per_second"]
        if way in FLOORS:
            alike = found.get(BLOCKS if way == "fsdp" else SINGLE, found[SINGLE])
            control = drift(alike["losses"], alike["control"])
            row["drift"], row["control"] = drift(row["losses"], alike["losses"]), control
            row["agrees"] = row["drift"] <= max(LIMIT * control, 2**-22 * alike["losses"][0])
    if BLOCKS in found:
        found[BLOCKS]["drift"] = drift(found[BLOCKS]["losses"], found[SINGLE]["losses"])


def drift(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def show(record: Row) -> None:
    """The table."""
    print(
        f"\n{'way':<8} {'processes':>9} {'ms/step':>9} {'tokens/s':>11} {'GiB':>6} {'speedup':>8}"
    )
    for row in record["rows"]:
        if "failed" in row:
            print(f"{row['way']:<8} failed: {row['failed']}")
            continue
        print(
            f"{row['way']:<8} {row['processes']:>9} {statistics.median(row['ms']):>9.2f} "
            f"{row['tokens_per_second']:>11,.0f} {row['peak_bytes'] / 2**30:>6.2f} "
            f"{row.get('speedup', 1.0):>8.3f}"
        )
    for row in record["rows"]:
        if row["way"] == BLOCKS and "drift" in row:
            print(f"{BLOCKS}: drift {row['drift']:.2e} from one process compiled whole")
        if "agrees" in row:
            floor, aim = FLOORS[row["way"]]
            wanted = f"; of two, at least {floor}, aim {aim}" if row["processes"] == 2 else ""
            print(
                f"{row['way']}: drift {row['drift']:.2e}, control {row['control']:.2e} "
                f"({'agrees' if row['agrees'] else 'DISAGREES'}){wanted}"
            )
        if found := row.get("communication"):
            print(
                f"{row['way']}: NCCL {found['nccl_ms']:.2f} ms a step, {found['overlapped']:.0%} "
                f"of it beside {found['compute_ms']:.2f} ms of computing"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures all ways, writes the result, prints the table."""
    wanted = options(argv)
    if wanted.worker:
        work(wanted)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        alone = (SINGLE, BLOCKS) if "fsdp" in wanted.ways else (SINGLE,)
        rows = [launch(way, wanted, Path(folder)) for way in (*alone, *wanted.ways)]
    compare(rows)
    record = {
        "rows": rows,
        "model": size(wanted.tiny).cfg.to_dict(),
        "of_two": {way: dict(zip(("floor", "aim"), FLOORS[way], strict=True)) for way in FLOORS},
        "rows_per_device": size(wanted.tiny).rows,
        "machine": {"device": device_name(runtime.device(wanted.device).type), **versions()},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    wanted.out.mkdir(parents=True, exist_ok=True)
    write_json(wanted.out / "scaling.json", record)
    show(record)
    kept = ("way", "processes", "tokens_per_second", "peak_bytes", "speedup", "agrees", "failed")
    print(json.dumps([{key: row[key] for key in kept if key in row} for row in rows]))
    return int(any("failed" in row or not row.get("agrees", True) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
