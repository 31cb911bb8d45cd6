"""All matrix products of a decoding step on the CPU: which way is fastest, and what reading costs.

    read       the sum of each weight: memory's own speed
    linear     F.linear, what modules call
    onednn     oneDNN's product with the weight as it is (flashgpt/generation/forward.py)
    packed     the same from a copy of the weight in oneDNN's own order

GPT-2 124M in fp32 with random weights: four products in each of 12 layers, and the output head. A
round is one pass through all of them; ways take turns. Milliseconds are medians over rounds, GB/s
the weights' bytes over them.

Writes rows.json, prints a table and, last, one line of JSON. From the root of the checkout, about a
minute on two cores:

    python -m benchmarks.rows_cpu
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashgpt.attention.measured import device_name
from flashgpt.generation.forward import OneDNNProduct, PackedProduct
from flashgpt.measure.clock import Call, alternate, milliseconds
from flashgpt.train.checkpoint import write_json
from flashgpt.train.record import versions

CPU = torch.device("cpu")


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows_cpu", description=about)
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[1, 2, 8, 128, 1000], help="rows at a time")
    add("--layers", type=int, default=12, help="of the model (12)")
    add("--width", type=int, default=768, help="of the model (768)")
    add("--vocab-size", type=int, default=50257, help="tokens of the vocabulary (50257)")
    add("--rounds", type=int, default=7, help="rounds of each way (7)")
    out = Path(__file__).with_name("rows-cpu")
    add("--out", type=Path, default=out, help="folder of the result")
    wanted = parser.parse_args(argv)
    if min(wanted.rounds, *wanted.rows) < 1:
        parser.error("--rows and --rounds must be at least 1")
    return wanted


def layers(count: int, width: int, vocab: int) -> list[nn.Linear]:
    """The products of a step, in their order."""
    block = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    made = [nn.Linear(*shape) for _ in range(count) for shape in block]
    return [*made, nn.Linear(width, vocab, bias=False)]


def ways(made: Sequence[nn.Linear], rows: int) -> dict[str, Call]:
    """One pass through all products, by way."""
    inputs = [torch.randn(rows, layer.in_features) for layer in made]
    weights = [layer.weight.detach() for layer in made]
    onednn = [OneDNNProduct(layer) for layer in made]
    packed = [PackedProduct(layer) for layer in made]

    def through(product: Callable[[int], Tensor]) -> Call:
        def call() -> None:
            for i in range(len(made)):
                product(i)

        return call

    return {
        "read": through(lambda i: weights[i].sum()),
        "linear": through(lambda i: F.linear(inputs[i], weights[i], made[i].bias)),
        "onednn": through(lambda i: onednn[i](inputs[i])),
        "packed": through(lambda i: packed[i](inputs[i])),
    }


@torch.inference_mode()
def measure(wanted: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of texts and each way."""
    torch.manual_seed(0)
    made = layers(wanted.layers, wanted.width, wanted.vocab_size)
    size = sum(layer.weight.nbytes for layer in made)
    found = []
    for rows in wanted.rows:
        calls = ways(made, rows)
        times = alternate(
            calls, wanted.rounds, lambda call: milliseconds(call, CPU), seconds=math.inf
        )
        for way, ms in times.items():
            median = statistics.median(ms)
            found.append(
                {"rows": rows, "way": way, "ms": median, "all_ms": ms, "gb_s": size / median / 1e6}
            )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes rows.json, prints a table and a last line of JSON."""
    wanted = options(argv)
    rows = measure(wanted)
    sizes = ("layers", "width", "vocab_size", "rounds")
    record = {
        "rows": rows,
        "options": {name: vars(wanted)[name] for name in sizes},
        "machine": {"device": device_name("cpu"), **versions()},
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    wanted.out.mkdir(parents=True, exist_ok=True)
    write_json(wanted.out / "rows.json", record)
    print(f"{'rows':>5}  {'way':<8} {'ms':>7} {'range':>16} {'GB/s':>6}")
    for row in rows:
        spread = f"{min(row['all_ms']):.1f} .. {max(row['all_ms']):.1f}"
        print(
            f"{row['rows']:>5}  {row['way']:<8} {row['ms']:>7.1f} {spread:>16} {row['gb_s']:>6.1f}"
        )
    kept = ("rows", "way", "ms", "gb_s")
    print(json.dumps({"rows": [{key: row[key] for key in kept} for row in rows]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
