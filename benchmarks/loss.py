"""The training loss from hidden states to gradients: ours against PyTorch's and Liger's.

    ours          flashgpt.model.loss: chunks of logits, one Triton kernel between the products
    operators     the same without Triton: PyTorch's operators on each chunk
    eager         F.cross_entropy on all logits
    compiled      the same, through torch.compile
    liger         LigerFusedLinearCrossEntropyLoss, where it is installed

Each does what a training step does: fp32 hidden states and weight, bf16 products by autocast (fp32
on the CPU), forward and backward. Loss, the gradient of 64 rows and that of 256 tokens' weights are
held to float64: a relative error (of the norm) above 2^-6, or a loss off by more than 0.01 nats,
ends with status 1. Inputs are bf16 numbers, so that only the computation errs.

Predicted for D 768, V 50257 on an H100 (650 TFLOP/s, 3.0 TB/s; L = all logits in bf16, 6.6 GB at
65536 rows), ms:

    rows                             8192     65536
    products, 6 M V D                 2.9      23.4
    ours: the kernel, 2 L             0.6       4.4
      weight's gradient in fp32       0.05      0.4    154 MB written, read again by later chunks
      casts, scaling in backward      0.3       0.5
      together                        3.8      28.7
    operators: + about 14 L           6.8      54      each operator reads and writes fp32
    eager: + about 20 L               8.4      67      casts to fp32 and back, softmax, its gradient
    compiled: + 3 to 4 L              3.9      31
    liger: chunks of 1024             5        40      64 times through the weight and its gradient

The kernel alone is timed on one chunk; --sweep adds other sizes of it and of the chunk. Prints a
table last; writes loss.json. From the root of the checkout, a few minutes on an H100:

    python -m benchmarks.loss --sweep
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import math
import statistics
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashgpt.attention.measured import device_name
from flashgpt.measure.clock import milliseconds
from flashgpt.measure.memory import peak_bytes
from flashgpt.model import loss as loss_module
from flashgpt.model.loss import IGNORE, linear_cross_entropy
from flashgpt.train.checkpoint import write_json
from flashgpt.train.record import versions

WAYS = ("ours", "operators", "eager", "compiled", "liger")
WARM_UP, CALLS = 2, 5
CHECKED_ROWS, CHECKED_TOKENS, EXACT_ROWS = 64, 256, 1024
MAX_ERROR, MAX_LOSS_ERROR = 2.0**-6, 0.01
SWEPT_PIECES, SWEPT_WARPS = (128, 256, 512, 1024, 2048), (4, 8, 16, 32)
SWEPT_CHUNKS = (4096, 8192, 16384, 32768)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Row = dict[str, Any]


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=about)
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[8192, 65536], help="tokens of a step")
    add("--emb-dim", type=int, default=768, help="model width")
    add("--vocab-size", type=int, default=50257, help="tokens of the vocabulary")
    add("--ways", nargs="+", choices=WAYS, default=WAYS, help="what is measured")
    add("--rounds", type=int, default=3, help=f"rounds of {CALLS} measurements of each way")
    add("--sweep", action="store_true", help="also other sizes of the kernel and of a chunk")
    add("--out", type=Path, default=Path(__file__).with_suffix(""), help="folder of the result")
    wanted = parser.parse_args(argv)
    if wanted.sweep and not torch.cuda.is_available():
        parser.error("--sweep is of the kernel, which needs a CUDA device")
    return wanted


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition, with all logits; autocast computes the loss in fp32."""
    return F.cross_entropy(x @ weight.T, targets, ignore_index=IGNORE)


def operators(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Ours where Triton is not installed."""
    installed = loss_module._triton_is_installed
    loss_module._triton_is_installed = lambda: False
    try:
        return linear_cross_entropy(x, weight, targets)
    finally:
        loss_module._triton_is_installed = installed


def loss_of(way: str) -> Loss | None:
    """None where the way cannot go."""
    if way == "ours":
        return linear_cross_entropy
    if way == "operators":
        return operators
    if way == "eager":
        return plain
    if way == "compiled":
        return torch.compile(plain, dynamic=False)
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    liger = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE)
    return lambda x, weight, targets: liger(weight, x, targets)


class Bench:
    """The inputs of one number of rows, and their exact results.

    Args:
        rows, width, vocab: M, D and V.
    """

    def __init__(self, rows: int, width: int, vocab: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        random = functools.partial(torch.randn, generator=generator, device=device)
        self.device = device
        self.x = random(rows, width).bfloat16().float().requires_grad_()
        weight = random(vocab, width) * (3 / math.sqrt(width))  # logits of about N(0, 9)
        self.weight = weight.bfloat16().float().requires_grad_()
        self.targets = torch.randint(vocab, (rows,), generator=generator, device=device)
        self.exact = self._exact()

    @torch.no_grad()
    def _exact(self) -> list[Tensor]:
        """Loss, gradient of the first rows, of the first tokens' weights: all in float64."""
        weight, rows = self.weight.double(), len(self.x)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        dx, dweight = [], torch.zeros_like(weight[:CHECKED_TOKENS])
        for start in range(0, rows, EXACT_ROWS):
            x = self.x[start : start + EXACT_ROWS].double()
            target = self.targets[start : start + EXACT_ROWS, None]
            dlogits = (x @ weight.T).log_softmax(1)
            loss -= dlogits.gather(1, target).sum() / rows
            dlogits = dlogits.exp_().scatter_add_(1, target, -torch.ones_like(x[:, :1])) / rows
            dweight += dlogits[:, :CHECKED_TOKENS].T @ x
            if start < CHECKED_ROWS:
                dx.append(dlogits @ weight)
        return [loss, torch.cat(dx)[:CHECKED_ROWS], dweight]

    def step(self, loss: Loss) -> list[Tensor]:
        """Loss and gradients by x and by the weight."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            value = loss(self.x, self.weight, self.targets)
        return [value.detach(), *torch.autograd.grad(value, (self.x, self.weight))]

    def errors(self, loss: Loss) -> dict[str, float]:
        """Off by how much: nats, and parts of the norm."""
        value, dx, dweight = self.step(loss)
        found = value, dx[:CHECKED_ROWS], dweight[:CHECKED_TOKENS]
        off = [float((a - b).norm()) for a, b in zip(found, self.exact, strict=True)]
        sizes = [1.0, *(float(b.norm()) for b in self.exact[1:])]
        names = ("loss", "dx", "dweight")
        return {name: a / b for name, a, b in zip(names, off, sizes, strict=True)}

    def times(self, loss: Loss, calls: int) -> list[float]:
        """Milliseconds of a step, of each of several measurements."""
        for _ in range(WARM_UP):
            self.step(loss)
        return [milliseconds(lambda: self.step(loss), self.device) for _ in range(calls)]


def measure(wanted: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """A row for each number of rows and way; all ways in turn, round after round."""
    for rows in wanted.rows:
        bench = Bench(rows, wanted.emb_dim, wanted.vocab_size, device)
        losses = {way: loss for way in wanted.ways if (loss := loss_of(way)) is not None}
        found: dict[str, Row] = {way: {"rows": rows, "way": way, "ms": []} for way in losses}
        for _ in range(wanted.rounds):
            for way, loss in losses.items():
                row = found[way]
                if "failed" in row:
                    continue
                try:
                    if not row["ms"]:
                        row["errors"] = bench.errors(loss)
                        step = functools.partial(bench.step, loss)
                        row["peak_bytes"] = peak_bytes(step, device)
                    row["ms"] += bench.times(loss, CALLS)
                except Exception as error:  # out of memory, or a library: the others go on
                    traceback.print_exc()
                    row["failed"] = f"{type(error).__name__}: {error}"[:500]
                _release(device)
        yield from found.values()


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def kernel(
    rows: int, vocab: int, dtype: torch.dtype, device: torch.device, sweep: bool
) -> list[Row]:
    """The kernel alone on one chunk: at its own size, and at the swept ones."""
    from flashgpt.model import triton_loss

    columns = -(-vocab // loss_module.COLUMNS_MULTIPLE) * loss_module.COLUMNS_MULTIPLE
    logits = 3 * torch.randn(rows, columns, dtype=dtype, device=device)
    targets = torch.randint(vocab, (rows,), device=device)
    losses = torch.empty(rows, device=device)

    def call() -> None:
        triton_loss.cross_entropy_(logits, targets, losses, vocab, IGNORE, True)

    own = triton_loss.PIECES, triton_loss.WARPS
    sizes = [own]
    if sweep:
        sizes += [(p, w) for p in SWEPT_PIECES for w in SWEPT_WARPS if 32 * w <= p <= 256 * w]
    found = []
    for pieces, warps in sizes:
        triton_loss.PIECES, triton_loss.WARPS = pieces, warps
        for _ in range(WARM_UP):
            call()
        ms = statistics.median(milliseconds(call, device) for _ in range(CALLS))
        rate = 2 * logits.nbytes / ms / 1e9
        found.append({"pieces": pieces, "warps": warps, "ms": ms, "terabytes_per_second": rate})
    triton_loss.PIECES, triton_loss.WARPS = own
    return found


def chunks(wanted: argparse.Namespace, device: torch.device) -> list[Row]:
    """The whole loss at the largest number of rows, by the rows of a chunk."""
    bench = Bench(max(wanted.rows), wanted.emb_dim, wanted.vocab_size, device)
    own, found = loss_module.CHUNK_ROWS_TRITON, []
    for rows in SWEPT_CHUNKS:
        loss_module.CHUNK_ROWS_TRITON = rows
        ms = statistics.median(bench.times(linear_cross_entropy, CALLS))
        found.append({"chunk_rows": rows, "ms": ms})
        _release(device)
    loss_module.CHUNK_ROWS_TRITON = own
    return found


def holds(row: Row) -> bool:
    """Whether a way is right; one that is not there or not possible here is no fault of ours."""
    if "failed" in row:
        return bool(row["way"] != "ours")
    errors = row["errors"]
    gradients = all(errors[name] <= MAX_ERROR for name in ("dx", "dweight"))
    return bool(errors["loss"] <= MAX_LOSS_ERROR and gradients)


def show(record: dict[str, Any]) -> None:
    """The tables."""
    for row in record["kernel"]:
        print(
            f"kernel, pieces {row['pieces']:>5}, warps {row['warps']:>3}: {row['ms']:7.3f} ms, "
            f"{row['terabytes_per_second']:.2f} TB/s"
        )
    for row in record["chunks"]:
        print(f"ours, chunks of {row['chunk_rows']:>6} rows: {row['ms']:8.2f} ms")
    print(
        f"\n{'rows':>7} {'way':<9} {'ms':>9} {'range':>19} {'peak MB':>9} "
        f"{'loss off':>9} {'dx off':>8} {'dW off':>8}"
    )
    for row in record["ways"]:
        if "failed" in row:
            print(f"{row['rows']:>7} {row['way']:<9} failed: {row['failed'][:60]!r}")
            continue
        errors = row["errors"]
        spread = f"{min(row['ms']):.2f} .. {max(row['ms']):.2f}"
        print(
            f"{row['rows']:>7} {row['way']:<9} {statistics.median(row['ms']):>9.2f} {spread:>19} "
            f"{row['peak_bytes'] / 1e6:>9.0f} {errors['loss']:>9.1e} {errors['dx']:>8.1e} "
            f"{errors['dweight']:>8.1e}{'' if holds(row) else '  WRONG'}"
        )
    print(f"{record['machine']['device']}, torch {record['machine']['torch']}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the result, prints the tables."""
    wanted = options(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ways = list(measure(wanted, device))
    alone: list[Row] = []
    if device.type == "cuda":
        rows = loss_module.CHUNK_ROWS_TRITON
        alone = kernel(rows, wanted.vocab_size, torch.bfloat16, device, wanted.sweep)
    record: dict[str, Any] = {
        "ways": ways,
        "kernel": alone,
        "chunks": chunks(wanted, device) if wanted.sweep else [],
        "options": {k: v for k, v in vars(wanted).items() if k != "out"},
        "constants": {
            "chunk_rows": loss_module.CHUNK_ROWS_TRITON,
            "products": "bf16" if device.type == "cuda" else "fp32",
        },
        "machine": {"device": device_name(device.type), **versions()},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    wanted.out.mkdir(parents=True, exist_ok=True)
    write_json(wanted.out / "loss.json", record)
    show(record)
    return int(not all(map(holds, ways)))


if __name__ == "__main__":
    raise SystemExit(main())
