"""What `flashgpt prepare` adds to the tokenizers library's own encoding, in time and memory.

For each size a text is made: Python's standard library over and over, the lines of each copy in
another order and its commonest names changed. Then, by turns and each in a process of its own:

    raw        the library's encode_batch_fast alone, on the pieces that prepare gives it; only the
               calls are timed, and their results are dropped
    prepare    all of it: reading and checking the text, encoding, keeping parts, writing shards,
               digests

Both have the same tokenizer (8192 ids, trained beforehand) and as many threads as the library
takes. CPU seconds are those of all threads; they say what the work costs where the cores have other
work too. Peak memory is the process's largest resident size, interpreter and libraries included.

Claims, on the medians:

    prepare takes at most 1.25 times as long as raw
    prepare's peak memory at the largest size is at most 1.1 times that at the smallest

Prints a table and, last, one line of JSON; writes prepare.json; exit status 1 if a claim does not
hold. Linux only (/proc). From the root of the checkout:

    python -m benchmarks.prepare
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from flashgpt import __version__
from flashgpt.data import corpus, encode
from flashgpt.data.files import find_files
from flashgpt.data.prepare import prepare
from flashgpt.runconfig import DataConfig
from flashgpt.tokenizer import Tokenizer

WAYS = ("raw", "prepare")
TIME_LIMIT, MEMORY_LIMIT = 1.25, 1.1
VOCAB_SIZE, SEED, MB = 8192, 1337, 10**6


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison, or as a child one measurement; 0 if the claims hold, else 1."""
    options = _options(argv)
    if options.child:
        print(json.dumps(_measure(options.child, Path(options.child_folder))))
        return 0
    chosen = sorted(zip(options.megabytes, options.rounds, strict=True))
    sizes = [_compare(megabytes, rounds) for megabytes, rounds in chosen]
    claims = _judge(sizes)
    record = {"claims": claims, "environment": _environment(), "sizes": sizes}
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    (options.out / "prepare.json").write_text(text, encoding="utf-8", newline="\n")
    _print_table(sizes)
    print(json.dumps(claims))
    return 0 if claims["hold"] else 1


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare", description=about)
    parser.add_argument(
        "--megabytes", type=float, nargs="+", default=[100, 1000], help="sizes of text (100 1000)"
    )
    parser.add_argument(
        "--rounds", type=int, nargs="+", default=[3, 1], help="measurements of each size (3 1)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).with_suffix(""),
        help="folder of the results (benchmarks/prepare)",
    )
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--child-folder", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _compare(megabytes: float, rounds: int) -> dict[str, Any]:
    """Both ways by turns on one text."""
    measured: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n_bytes = _make(folder, round(megabytes * MB))
        for _ in range(rounds):
            for way in WAYS:
                command = [sys.executable, "-m", "benchmarks.prepare", "--child", way]
                done = subprocess.run(
                    [*command, "--child-folder", name],
                    check=True,
                    stdout=subprocess.PIPE,
                    cwd=Path(__file__).parents[1],
                )
                found = json.loads(done.stdout)
                measured[way].append(found)
                print(
                    f"{megabytes:g} MB, {way}: {found['seconds']:.1f} s, {found['peak_mb']:.0f} MB",
                    flush=True,
                )
    return {"megabytes": megabytes, "bytes": n_bytes, **measured}


def _make(folder: Path, n_bytes: int) -> int:
    """Writes text.txt and a tokenizer into a folder; returns the bytes of the text."""
    found = corpus.survey(find_files(["stdlib"]))
    Tokenizer.train(corpus.sample(found, frozenset()), VOCAB_SIZE).save(folder / "tokenizer")
    source = "".join(piece.text for piece in corpus.documents(found.files))
    rng, left = random.Random(SEED), n_bytes
    with (folder / "text.txt").open("wb") as file:
        while left > 0:
            lines = source.splitlines(keepends=True)
            rng.shuffle(lines)
            text = "".join(lines)
            for name in ("self", "name", "return", "value"):
                text = text.replace(name, f"{name}{rng.randrange(1000)}")
            # A character cut in two is left out at the end.
            left -= file.write(text.encode()[:left].decode(errors="ignore").encode() or b" " * left)
        return file.tell()


def _measure(way: str, folder: Path) -> dict[str, float]:
    """Seconds and peak memory (MB) of one way in this process."""
    seconds, cpu_seconds = _raw(folder) if way == "raw" else _prepare(folder)
    status = Path("/proc/self/status").read_text(encoding="ascii").split()
    peak = int(status[status.index("VmHWM:") + 1]) * 1024
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak / MB}


def _now() -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([time.perf_counter(), time.process_time()])


def _raw(folder: Path) -> list[float]:
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    inner.encode_special_tokens = True
    pieces = corpus.documents(find_files([str(folder / "text.txt")]))
    spent = np.zeros(2)
    for batch in encode.batches(pieces):
        texts = [piece.text for piece in batch]
        started = _now()
        inner.encode_batch_fast(texts, add_special_tokens=False)
        spent += _now() - started
    return spent.tolist()


def _prepare(folder: Path) -> list[float]:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        data = DataConfig((str(folder / "text.txt"),), str(folder / "tokenizer"))
        started = _now()
        prepare(data, out=Path(out) / "tokens")
        return (_now() - started).tolist()


def _judge(sizes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The ratios that the claims are about, and whether they hold."""
    ratios, cpu_ratios = (
        [_median(size, "prepare", name) / _median(size, "raw", name) for size in sizes]
        for name in ("seconds", "cpu_seconds")
    )
    growth = _median(sizes[-1], "prepare", "peak_mb") / _median(sizes[0], "prepare", "peak_mb")
    return {
        "hold": max(ratios) <= TIME_LIMIT and growth <= MEMORY_LIMIT,
        "time_ratios": [round(ratio, 3) for ratio in ratios],
        "cpu_ratios": [round(ratio, 3) for ratio in cpu_ratios],
        "memory_growth": round(growth, 3),
    }


def _median(size: dict[str, Any], way: str, name: str) -> float:
    return statistics.median(found[name] for found in size[way])


def _environment() -> dict[str, Any]:
    """What was measured, and on what."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "flashgpt": __version__,
        "tokenizers": tokenizers.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
    }


def _print_table(sizes: Sequence[dict[str, Any]]) -> None:
    print(f"\n{'MB':>6}  {'way':8}  {'seconds':>8}  {'CPU seconds':>11}  {'peak MB':>7}")
    for size in sizes:
        for way in WAYS:
            seconds, cpu_seconds, peak_mb = (
                _median(size, way, name) for name in ("seconds", "cpu_seconds", "peak_mb")
            )
            print(
                f"{size['megabytes']:>6g}  {way:8}  {seconds:>8.1f}  {cpu_seconds:>11.1f}"
                f"  {peak_mb:>7.0f}"
            )


if __name__ == "__main__":
    sys.exit(main())
