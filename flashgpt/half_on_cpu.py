"""Whether bf16 products are of use on this machine's CPU.

With AMX they are several times as fast as fp32's. Some virtual machines announce AMX and end the
process that uses it, and processors without bf16 compute it slowly. So a process of its own tries,
which runs this file.
"""

from __future__ import annotations

import functools
import os
import signal
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

MOST_SECONDS = 120  # for the trial, with the start of PyTorch
SLOWEST = 0.5  # times the speed of fp32, below which bf16 is refused
ROUNDS = 5
TALKATIVE = ("ONEDNN_VERBOSE", "DNNL_VERBOSE", "MKL_VERBOSE")  # print in each product


@functools.cache
def refusal() -> str | None:
    """What is wrong with bf16 products on this CPU; None where they work."""
    # -P: no module of this file's folder in the place of one that PyTorch imports.
    command = [sys.executable, "-P", __file__]
    quiet = {name: value for name, value in os.environ.items() if name not in TALKATIVE}
    try:
        trial = subprocess.run(
            command, capture_output=True, text=True, timeout=MOST_SECONDS, check=False, env=quiet
        )
    except subprocess.TimeoutExpired:
        return f"a trial of bf16 products took more than {MOST_SECONDS} s"
    if trial.returncode < 0:
        return f"bf16 products end the process ({signal.Signals(-trial.returncode).name})"
    if trial.returncode or not trial.stdout.strip():
        last = trial.stderr.strip().rpartition("\n")[2]
        return f"a trial of bf16 products failed ({last or 'without a word'})"
    speed = float(trial.stdout.split()[-1])
    return None if speed >= SLOWEST else f"bf16 products have {speed:.2g} times the speed of fp32's"


def _layer(dtype: torch.dtype) -> tuple[torch.nn.Linear, torch.Tensor]:
    """A layer and its input, after attention of its output, forward and backward."""
    x, layer = torch.ones(2048, 512, dtype=dtype), torch.nn.Linear(512, 512, dtype=dtype)
    heads = layer(x).view(8, 256, 8, 64).transpose(1, 2)
    F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).sum().backward()
    return layer, x


def _trial() -> float:
    """The speed of a layer's products, forward and backward, in bf16 over that in fp32."""
    layers = [_layer(dtype) for dtype in (torch.float32, torch.bfloat16)]
    ratios = []
    for _ in range(ROUNDS):
        seconds = []
        for layer, x in layers:
            began = time.perf_counter()
            layer(x).sum().backward()
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


if __name__ == "__main__":
    print(_trial())
