"""Products of the feed-forward layer with GELU at their end: which way, and which cut, is fastest.

    backward    (dout W) * gelu'(pre), and its column sums: the gradient of a bias
    forward     gelu(x W^T + b), and what GELU is taken of

    product     the matrix product alone, by cuBLAS: the floor
    apart       then GELU or its derivative, then the sums, as torch.compile fuses them
    triton ...  all in one kernel (flashgpt/model/triton_mlp.py), for the cut that it has and each
                of OTHER_CUTS: rows, columns and depth of a tile, warps, stages
    gluon ...   the same (flashgpt/model/gluon_mlp.py), on Hopper

bf16 on a GPU, in turns, medians over rounds. Each result is held to fp32: an error above what bf16
rounds, of the norm or of the largest value, is WRONG and ends with status 1. A cut that fails is
listed with the reason, and the others go on. Without a GPU the kernels run in Triton's interpreter
(TRITON_INTERPRET=1), in fp16: that shows that the script runs, and nothing about speed.

Writes mlp.json after each of four tables; the last line is one of JSON. From the root of the
checkout, about two minutes on an H100, most of it compiling:

    python -m benchmarks.mlp --rows 65536 --width 768
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from flashgpt.attention.measured import device_name
from flashgpt.measure import failure
from flashgpt.measure.clock import alternate, milliseconds
from flashgpt.model import mlp, triton_mlp
from flashgpt.model.triton_mlp import Cut
from flashgpt.train.checkpoint import write_json
from flashgpt.train.record import versions

OTHER_CUTS = {
    "triton": (Cut(128, 128, 64, 8, 3), Cut(128, 256, 64, 8, 3)),
    "gluon": (Cut(128, 128, 64, 4, 4),),
}
FORMS = {"gelu": "none", "gelu_new": "tanh"}  # by our name of the activation
PARTS = ("backward", "forward")
ROUNDING = 2.0**-8  # of bf16, at most

Row = dict[str, Any]
Way = Callable[[], dict[str, Tensor]]


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mlp",
        description=(__doc__ or "").partition("\n")[0],
        epilog="example: python -m benchmarks.mlp --rows 65536 --width 768",
    )
    add = parser.add_argument
    add("--rows", type=int, default=65536, help="tokens (65536)")
    add("--width", type=int, default=768, help="of the model; the inner one is four times that")
    add("--rounds", type=int, default=5, help="rounds of each way (5)")
    add("--out", type=Path, default=Path(__file__).with_suffix(""), help="folder of the result")
    wanted = parser.parse_args(argv)
    for name in ("rows", "width", "rounds"):
        if vars(wanted)[name] < 1:
            parser.error(f"--{name} must be at least 1, got {vars(wanted)[name]}")
    if wanted.width % mlp.WIDTH_MULTIPLE:
        parser.error(f"--width must be a multiple of {mlp.WIDTH_MULTIPLE}, got {wanted.width}")
    return wanted


def languages(device: torch.device) -> dict[str, ModuleType]:
    """The kernels that can run here, by language."""
    found = {"triton": triton_mlp}
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == mlp.HOPPER
    if hopper and triton.__version__.startswith(mlp.GLUON):
        found["gluon"] = importlib.import_module("flashgpt.model.gluon_mlp")
    return found


def way(language: str, cut: Cut) -> str:
    return f"{language} {' '.join(map(str, cut))}"


class Case:
    """Inputs of one shape, and the ways that compute from them.

    Args:
        rows, width: M and D.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float16

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device).to(dtype)

        self.device, inner = device, 4 * width
        self.x, self.dout = random(rows, width), random(rows, width)
        self.w1, self.w2 = (
            random(*size) * width**-0.5 for size in ((inner, width), (width, inner))
        )
        self.b = random(inner)
        self.pre = torch.addmm(self.b, self.x, self.w1.t())

    def exact(self, part: str, form: str) -> dict[str, Tensor]:
        """The results in fp32."""
        if part == "forward":
            pre = torch.addmm(self.b.float(), self.x.float(), self.w1.float().t())
            return {"act": F.gelu(pre, approximate=FORMS[form]), "pre": pre}
        dact = self.dout.float() @ self.w2.float()
        dpre = torch.ops.aten.gelu_backward(dact, self.pre.float(), approximate=FORMS[form])
        return {"dpre": dpre, "db": dpre.sum(0)}

    def ways(self, part: str, form: str) -> dict[str, Way]:
        """All ways of a part and form of GELU, by name."""
        tanh = form == "gelu_new"
        forward = part == "forward"
        names = ("act", "pre") if forward else ("dpre", "db")
        inputs = (self.x, self.w1, self.b) if forward else (self.dout, self.w2, self.pre)

        def product(a: Tensor, w: Tensor, last: Tensor) -> tuple[Tensor, ...]:
            return (torch.addmm(last, a, w.t()) if forward else a @ w,)

        def apart(a: Tensor, w: Tensor, last: Tensor) -> tuple[Tensor, ...]:
            (out,) = product(a, w, last)
            if forward:
                return F.gelu(out, approximate=FORMS[form]), out
            dpre = torch.ops.aten.gelu_backward(out, last, approximate=FORMS[form])
            return dpre, dpre.sum(0)

        def named(call: Callable[..., tuple[Tensor, ...]], *more: object) -> Way:
            return lambda: dict(zip(names, call(*inputs, *more), strict=True))

        compiled = torch.compile if self.device.type == "cuda" else lambda call: call
        found: dict[str, Way] = {"product": lambda: {"": product(*inputs)[0]}}
        found["apart"] = named(compiled(apart))
        for name, kernels in languages(self.device).items():
            kernel = kernels.linear_gelu if forward else kernels.matmul_dgelu
            for cut in (kernels.CUT, *OTHER_CUTS[name]):
                found[way(name, cut)] = named(kernel, tanh, cut)
        return found

    def measure(self, part: str, form: str, rounds: int) -> list[Row]:
        """A row for each way."""
        rows: dict[str, Row] = {}
        exact, calls = self.exact(part, form), {}
        for name, way in self.ways(part, form).items():
            rows[name] = {"part": part, "gelu": form, "way": name}
            try:
                found = way()
                errors = [error(found[key], exact[key]) for key in exact if key in found]
                rows[name]["error"] = max(errors, default=0.0)
                calls[name] = way
            except Exception as reason:  # a cut that does not fit, say: the others go on
                rows[name]["failed"] = failure.reason(reason)
        times = alternate(
            calls, rounds, lambda call: milliseconds(call, self.device), seconds=math.inf
        )
        for name, ms in times.items():
            rows[name] |= {"ms": statistics.median(ms), "all_ms": ms}
        return list(rows.values())


def error(found: Tensor, exact: Tensor) -> float:
    """The larger one of two: of the norm, and of the largest value."""
    off = found.float() - exact
    ratios = (off.norm() / exact.norm(), off.abs().max() / exact.abs().max())
    return max(float(ratio.nan_to_num(math.inf)) for ratio in ratios)


def holds(row: Row, device: torch.device) -> bool:
    """Whether a row is right, or of a cut that nothing else uses."""
    ours = row["way"] in (way(name, kernels.CUT) for name, kernels in languages(device).items())
    roundings = 2 if row["way"] == "apart" else 1  # the product is rounded, then the result
    return row["error"] <= roundings * ROUNDING if "ms" in row else not ours


def show(rows: Sequence[Row], flop: float, device: torch.device) -> None:
    """One table."""
    print(f"\n{rows[0]['part']}, {rows[0]['gelu']}")
    print(f"{'way':<24} {'ms':>8} {'range':>17} {'TFLOP/s':>8} {'error':>8}")
    for row in rows:
        if "failed" in row:
            print(f"{row['way']:<24} failed: {row['failed'][:60]}")
            continue
        spread = f"{min(row['all_ms']):.3f} .. {max(row['all_ms']):.3f}"
        print(
            f"{row['way']:<24} {row['ms']:>8.3f} {spread:>17} {flop / row['ms'] / 1e9:>8.0f} "
            f"{row['error']:>8.5f}{'' if holds(row, device) else ' WRONG'}",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes mlp.json, prints the tables."""
    wanted = options(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = Case(wanted.rows, wanted.width, device)
    record: dict[str, Any] = {
        "rows": [],
        "options": {name: vars(wanted)[name] for name in ("rows", "width", "rounds")},
        "machine": {"device": device_name(device.type), **versions()},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    wanted.out.mkdir(parents=True, exist_ok=True)
    for form, part in itertools.product(FORMS, PARTS):
        rows = case.measure(part, form, wanted.rounds)
        record["rows"] += rows
        write_json(wanted.out / "mlp.json", record)
        show(rows, 8.0 * wanted.rows * wanted.width**2, device)
    right = all(holds(row, device) for row in record["rows"])
    kept = ("part", "gelu", "way", "ms", "error", "failed")
    brief = [{key: row[key] for key in kept if key in row} for row in record["rows"]]
    print(json.dumps({"right": right, "rows": brief}))
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
