"""Time and memory on this machine: of attention kernels, of the training step, of writing.

  attention  every kernel, forward and backward, over sequence lengths, beside PyTorch's own doors
  train      a full training step, switch on and off, beside Hugging Face's GPT-2
  generate   time to the first token and tokens per second, beside Hugging Face's GPT-2

Each prints a table, writes raw JSON and pictures into a folder, and ends with one line of JSON.
flashgpt bench attention --help (train, generate) shows the options.

examples:
  flashgpt bench attention
  flashgpt bench train
  flashgpt bench generate
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashgpt.cli import UsageError

if TYPE_CHECKING:
    import torch

SUBJECTS = ("attention", "train", "generate")


def main(argv: Sequence[str]) -> int:
    """Runs `flashgpt bench`."""
    subject, *rest = argv or [""]
    if subject in ("-h", "--help"):
        print(f"usage: flashgpt bench {{{','.join(SUBJECTS)}}} [options]\n\n{__doc__}", end="")
        return 0
    if subject not in SUBJECTS:
        got = repr(subject) if subject else "nothing"
        raise UsageError(f"bench measures one of {', '.join(SUBJECTS)}, got {got}")
    module = importlib.import_module(f"flashgpt.verbs.bench_{subject}")
    return int(module.main(rest))


def check_writable(folder: Path) -> None:
    """Fails now rather than after minutes of measuring."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def environment(device: torch.device) -> dict[str, Any]:
    """What a measurement was made on, and when."""
    import datetime

    import torch

    from flashgpt.attention.measured import device_name
    from flashgpt.train.record import versions

    return {
        "device": device_name(device.type),
        **versions(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }


def spread(low: float, middle: float, high: float) -> str:
    """Median (least to greatest), in milliseconds."""
    digits = 3 if middle < 1 else 1 if middle < 1000 else 0
    least, median, most = (f"{ms:,.{digits}f}" for ms in (low, middle, high))
    return f"{median} ({least} to {most})"


def flop_unit(flop_per_second: float) -> tuple[str, float]:
    """A unit for a speed, and its size."""
    return ("TFLOP/s", 1e12) if flop_per_second >= 1e13 else ("GFLOP/s", 1e9)
