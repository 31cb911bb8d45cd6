"""Whether bf16 products are of use on this machine's CPU.

With AMX they are several times as fast as fp32's. Some virtual machines announce AMX and end the
process that uses it, and processors without bf16 compute it slowly. So a process of its own tries,
which runs this file.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

MOST_SECONDS = 120  # for the trial, with the start of PyTorch
SLOWEST = 0.5  # times the speed of fp32, below which bf16 is refused


@functools.cache
def refusal() -> str | None:
    """What is wrong with bf16 products on this CPU; None where they work."""
    command = [sys.executable, __file__]
    try:
        trial = subprocess.run(
            command, capture_output=True, text=True, timeout=MOST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"a trial of bf16 products took more than {MOST_SECONDS} s"
    if trial.returncode:
        return "bf16 products end the process"
    speed = float(trial.stdout)
    return None if speed >= SLOWEST else f"bf16 products have {speed:.2g} times the speed of fp32's"


def _train(dtype: torch.dtype) -> float:
    """Seconds of a layer's products forward and backward, after attention of its output."""
    x, layer = torch.ones(2048, 512, dtype=dtype), torch.nn.Linear(512, 512, dtype=dtype)
    heads = layer(x).view(8, 256, 8, 64).transpose(1, 2)
    F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).sum().backward()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        layer(x).sum().backward()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    print(_train(torch.float32) / _train(torch.bfloat16))
