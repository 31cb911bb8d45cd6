"""Which cut of the Triton attention kernels is fastest: what HALF_TILES of triton_flash.py holds.

Each kernel alone, forward, backward_q and backward_kv, bf16, 65,536 tokens a call, 768 features,
dropout off and on. Cuts compile in parallel processes first (two for each of 15 processors, about
30 s on 16), then all are timed in one process: medians of 5 rounds.

python -m benchmarks.tiles           # on a GPU; about a minute
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from flashgpt.attention.dropout import Dropout, attention_keys
from flashgpt.attention.measured import device_name
from flashgpt.attention.packed import split
from flashgpt.measure.clock import milliseconds
from flashgpt.train.checkpoint import write_json
from flashgpt.train.record import versions

OUT = Path(__file__).with_suffix("")
TOKENS, FEATURES, ROUNDS = 65536, 768, 5
CASES = ((64, 1024), (64, 4096), (128, 1024))  # H, T
# Queries and keys of a tile, warps, stages, and the registers of a thread where they are limited.
CUTS: dict[str, dict[int, list[tuple[int, ...]]]] = {
    "forward": {
        64: [(64, 128, 4, 2), (64, 128, 4, 3), (64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3)],
        128: [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2)],
    },
    "backward_q": {
        64: [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3), (64, 32, 4, 4), (128, 64, 4, 2)],
        128: [(64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 8, 2)],
    },
    "backward_kv": {
        64: [
            *((64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2, 168), (128, 64, 4, 2)),
            *((32, 128, 4, 3), (32, 64, 4, 2), (64, 128, 8, 2)),
        ],
        128: [(64, 64, 4, 2), (64, 128, 8, 2), (32, 64, 4, 2)],
    },
}


def jobs() -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Kernel, H and cut of everything that is measured."""
    for kernel, by_h in CUTS.items():
        for head_dim, cuts in by_h.items():
            yield from ((kernel, head_dim, cut) for cut in cuts)


def launch(
    kernel: str, batch: int, length: int, head_dim: int, p: float
) -> Callable[[tuple[int, ...]], Callable[[], None]]:
    """cut -> a call that runs that kernel alone, on views of one packed tensor."""
    from flashgpt.attention import triton_flash

    heads, device = FEATURES // head_dim, torch.device("cuda")
    random = functools.partial(torch.randn, device=device, dtype=torch.bfloat16)
    q, k, v = split(random(batch, length, 3, heads, head_dim))
    dout = random(batch, length, heads, head_dim).transpose(1, 2)
    masks = triton_flash.Masks()
    if p:
        zero = torch.zeros((), dtype=torch.int64, device=device)
        draw = Dropout(p, zero, zero)
        keys = attention_keys(draw, batch, heads, length, length)
        masks = triton_flash.Masks(*keys, draw.threshold)
    out, lse, low = triton_flash.forward(q, k, v, masks, need_low=True)
    into = split(torch.empty(batch, length, 3, heads, head_dim, device=device, dtype=q.dtype))
    run, kernels = triton_flash._launch, (triton_flash._forward, triton_flash._backward_q)
    wanted = dict(zip(CUTS, (*kernels, triton_flash._backward_kv), strict=True))[kernel]

    def at(cut: tuple[int, ...]) -> Callable[[], None]:
        changed = mock.patch.multiple(
            triton_flash,
            tiles=lambda *_: triton_flash.Tiles(*cut),
            _launch=lambda k, *args, **flags: run(k, *args, **flags) if k is wanted else None,
        )

        def call() -> None:
            with changed:
                if kernel == "forward":
                    triton_flash.forward(q, k, v, masks, need_low=True)
                else:
                    triton_flash.backward(dout, q, k, v, out, lse, low, masks, into)

        return call

    return at


def compile_share(share: int, shares: int) -> None:
    """Compiles every `shares`-th job, dropout off and on, into Triton's cache."""
    for kernel, head_dim, cut in itertools.islice(jobs(), share, None, shares):
        for p in (0.0, 0.1):
            launch(kernel, 1, 1024, head_dim, p)(cut)()
    torch.cuda.synchronize()


def measure() -> list[dict[str, Any]]:
    """A row for each cut of each case, dropout off and on."""
    device, rows = torch.device("cuda"), []
    for (head_dim, length), p, kernel in itertools.product(CASES, (0.0, 0.1), CUTS):
        at = launch(kernel, TOKENS // length, length, head_dim, p)
        for cut in CUTS[kernel][head_dim]:
            call = at(cut)
            call()
            times = [milliseconds(call, device) for _ in range(ROUNDS)]
            where = {"kernel": kernel, "head_dim": head_dim, "length": length, "dropout": p}
            rows.append({**where, "cut": cut, "ms": statistics.median(times), "all_ms": times})
        torch.cuda.empty_cache()
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, measures, writes tiles.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default=str(OUT), help="folder of the result")
    parser.add_argument("--compile", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tiles needs a GPU, and there is none")
        return 1
    if args.compile:
        compile_share(*args.compile)
        return 0
    shares = max(1, (os.cpu_count() or 1) - 1)
    command = [sys.executable, "-m", "benchmarks.tiles", "--compile"]
    workers = [subprocess.Popen([*command, str(i), str(shares)]) for i in range(shares)]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        print("a cut does not compile; see above")
        return 1
    rows = measure()
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    environment = {"device": device_name("cuda"), **versions(), "date": date}
    write_json(folder / "tiles.json", {"environment": environment, "rows": rows})
    key = ("head_dim", "length", "dropout", "kernel")
    for (head_dim, length, p, kernel), group in itertools.groupby(
        rows, lambda row: tuple(row[name] for name in key)
    ):
        best = sorted(group, key=lambda row: row["ms"])[:3]
        cuts = "; ".join(f"{row['ms']:.3f} ms {row['cut']}" for row in best)
        print(f"H {head_dim} T {length} dropout {p:g} {kernel}: {cuts}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
