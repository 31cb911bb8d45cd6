"""What happens to a run when the worst happens: kills, flipped bytes, a disk that fails.

Kills: a training process is killed (SIGKILL) at a random moment after its first step, saves
included, and started again with --resume, until `--kills` are done. After each kill a good
checkpoint must load, once there has been one; each run that gets to its end must equal the run that
was never interrupted, bit for bit, in weights, optimizer, guard and log.

Flips: single bytes of one checkpoint, its files in turn, are changed at random; each must be found.

Disks (needs root, to mount a small one): full, read-only, and a folder that vanishes. The run must
end with one line that names the place, and what was saved must be good.

python -m benchmarks.faults                          # about 8 minutes
python -m benchmarks.faults --kills 3 --flips 20 --no-disks
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from flashgpt.train.checkpoint import Checkpoint, DamagedError, check, good, steps, write_json
from flashgpt.train.record import versions

OUT = Path(__file__).with_suffix("")
LAST = 150
EVERY = 3
# A kill falls this long after the first step of its process at most: about 25 steps and 8 saves.
KILL_WITHIN = 0.7
MEASURED = ("tokens_per_second", "data_seconds", "peak_memory_bytes")
TRAIN = (
    "--data.tokenizer bytes --model.n-layers 2 --model.emb-dim 64 --model.n-heads 2 "
    "--model.context-length 32 --model.drop-rate 0.1 --train.tokens-per-step 128 --train.lr 1e-2 "
    f"--train.steps {LAST} --train.checkpoint-every {EVERY} --train.eval-every 10 "
    "--train.eval-tokens 64 --train.final-eval-tokens 64 --sample.max-new-tokens 1"
).split()


class Fault(AssertionError):
    """A promise that was not kept."""


class Runs:
    """Training processes over one text, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        lines = (f"line {i % 13} says {i * i % 17} and {i % 7}" for i in range(800))
        (folder / "text.txt").write_text("\n".join(lines))

    def start(self, out: Path) -> subprocess.Popen[str]:
        """Trains in `out`, from its newest good checkpoint if there is one."""
        data = ["--data.source", self.folder / "text.txt", "--data.cache", self.folder / "cache"]
        command = [sys.executable, "-m", "flashgpt", "train", *TRAIN, *map(str, data)]
        if (out / "config.toml").exists():
            command = [*command[:4], "--resume"]
        return subprocess.Popen(
            [*command, "--out", str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def finish(self, out: Path) -> tuple[int, str]:
        """Status and error of a process that is left alone."""
        with self.start(out) as process:
            _, error = process.communicate()
        return process.returncode, error

    def whole(self) -> Path:
        """The run that is never interrupted."""
        out = self.folder / "whole"
        require(self.finish(out) == (0, ""), "the reference run ends well")
        return out


def require(kept: bool, promise: str) -> None:
    """Raises Fault unless a promise is kept."""
    if not kept:
        raise Fault(promise)


def wait_for_a_step(process: subprocess.Popen[str], out: Path) -> bool:
    """Waits until the process has logged a step; False when it ended first."""
    log, size = out / "metrics.jsonl", None
    while process.poll() is None:
        with contextlib.suppress(OSError):
            now = (log.stat().st_ino, log.stat().st_size)
            size = size or now
            if now[0] == size[0] and now[1] > size[1]:
                return True
            size = now
        time.sleep(0.002)
    return False


def kills(runs: Runs, wanted: int, rng: random.Random, tell: Callable[[str], None]) -> Any:
    """Kills and resumes until `wanted` kills are done; counts what they hit."""
    reference = contents(runs.whole())
    found = {"kills": 0, "while_saving": 0, "runs_finished": 0, "resumed_from": []}
    out = runs.folder / "run-0"
    while found["kills"] < wanted:
        with runs.start(out) as process:
            if wait_for_a_step(process, out):
                time.sleep(rng.uniform(0, KILL_WITHIN))
            process.send_signal(signal.SIGKILL)
            _, error = process.communicate()
        if process.returncode == 0:
            out = finished(runs, out, reference, found)
            continue
        require(process.returncode == -signal.SIGKILL, f"only the kill ends a run, not: {error}")
        best = next((c for c in good(out) if isinstance(c, Checkpoint)), None)
        require(best is not None or not steps(out), "a good checkpoint loads once there is one")
        if best is not None and best.step == LAST:  # nothing was left to lose
            continue
        found["kills"] += 1
        found["while_saving"] += any((out / "checkpoints").glob(".*"))
        found["resumed_from"].append(best.step if best else 0)
        tell(f"kill {found['kills']}/{wanted}: goes on from step {found['resumed_from'][-1]}")
    require(runs.finish(out)[0] == 0, "the run ends well after the last kill")
    finished(runs, out, reference, found)
    return found


def finished(runs: Runs, out: Path, reference: Any, found: dict[str, Any]) -> Path:
    """Compares a finished run with the reference; the folder of the next one."""
    require(same(contents(out), reference), "a killed run ends as the one that was left alone")
    require(not any((out / "checkpoints").glob(".*")), "no temporary stays")
    found["runs_finished"] += 1
    return runs.folder / f"run-{found['runs_finished']}"


def contents(out: Path) -> Any:
    """Weights, optimizer, guard, and the log without what is measured."""
    last = steps(out)[0]
    files = ("model", "trainer/optimizer", "trainer/guard")
    tensors = {
        f"{f}:{n}": t for f in files for n, t in load_file(last / f"{f}.safetensors").items()
    }
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return tensors, [{k: v for k, v in x.items() if k not in MEASURED} for x in lines]


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    tensors, others = one[0], other[0]
    equal = all(torch.equal(tensors[name], others[name]) for name in tensors | others)
    return equal and len(one[1]) == LAST and one[1] == other[1]


def flips(checkpoint: Path, wanted: int, rng: random.Random) -> Any:
    """Changes one byte at a time; each must be found, and gone once it is put back."""
    check(checkpoint)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    for number in range(wanted):
        file = files[number % len(files)]
        before = file.read_bytes()
        at = rng.randrange(len(before))
        changed = bytes([before[at] ^ rng.randrange(1, 256)])
        file.write_bytes(before[:at] + changed + before[at + 1 :])
        try:
            check(checkpoint)
            raise Fault(f"byte {at} of {file.name} ({before[at]:#x} -> {changed[0]:#x}) is found")
        except DamagedError:
            file.write_bytes(before)
    check(checkpoint)
    return {"flips": wanted, "files": [p.relative_to(checkpoint).as_posix() for p in files]}


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 64 MB of its own; needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def disks(runs: Runs) -> Any:
    """The three ways a disk fails under a run: what the run says, what is left."""
    found = {}
    for name in ("full", "read-only", "vanished"):
        with small_disk(runs.folder / name) as disk:
            out = disk / "run"
            with runs.start(out) as process:
                while process.poll() is None and not steps(out):
                    time.sleep(0.002)
                break_disk(name, disk, out)
                _, error = process.communicate()
            require(process.returncode == 1, f"{name}: the run ends with status 1")
            require(error.count("\n") == 1 and str(out) in error, f"{name}: one line names it")
            if name == "read-only":
                subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
            left = list(good(out))
            if name != "vanished":
                require(bool(left), f"{name}: the checkpoints before are there")
            require(all(isinstance(c, Checkpoint) for c in left), f"{name}: and good")
            found[name] = {"error": error.strip().replace(str(disk), "DISK"), "good": len(left)}
    return found


def break_disk(name: str, disk: Path, out: Path) -> None:
    """Makes a disk fail under a run."""
    if name == "full":
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
    elif name == "read-only":
        # The log is open for a moment only; until then the disk is busy.
        command = ["mount", "-o", "remount,ro", str(disk)]
        while subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode:
            pass
    else:
        shutil.rmtree(out, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Injects all faults, prints what was found and a last line of JSON, writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--disks", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the result")
    wanted = parser.parse_args(argv)
    rng = random.Random(wanted.seed)
    with tempfile.TemporaryDirectory() as scratch:
        runs = Runs(Path(scratch))
        found: dict[str, Any] = {"kills": kills(runs, wanted.kills, rng, print)}
        found["flips"] = flips(steps(runs.folder / "whole")[0], wanted.flips, rng)
        found["disks"] = disks(runs) if wanted.disks else "left out"
    found["versions"] = {
        **versions(),
        "platform": "Linux x86_64" if sys.platform == "linux" else sys.platform,
    }
    wanted.out.mkdir(parents=True, exist_ok=True)
    write_json(wanted.out / "faults.json", found)
    print(
        f"{found['kills']['kills']} kills ({found['kills']['while_saving']} while saving), "
        f"{found['kills']['runs_finished']} runs equal to the one left alone; "
        f"{wanted.flips} flipped bytes found; disks: {found['disks']}"
    )
    print(json.dumps({"kills": found["kills"]["kills"], "flips": wanted.flips, "kept": True}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
