"""Which attention kernel is fastest on the user's own device, as measured there.

`flashgpt bench attention --save` writes the measurement, `kernels.choose` reads it instead of its
built-in order. One small JSON file in the user's cache holds all devices: `attention.json`. A
measurement counts on the same device with the same number of threads and the same torch.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import platform
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flashgpt import usercache
from flashgpt.attention.request import Request

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Row:
    """Times of one kind of call.

    Attributes:
        dtype: torch's name, such as "float32".
        length: queries and keys (tokens).
        dropout: the shared dropout was on.
        gradient: times are of forward and backward together, else of forward alone.
        milliseconds: median time by kernel.
    """

    dtype: str
    length: int
    dropout: bool
    gradient: bool
    milliseconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Order:
    """Kernels, the fastest first, and when that was measured."""

    kernels: tuple[str, ...]
    date: str


def path() -> Path:
    """Where the measurements lie."""
    return usercache.folder() / "attention.json"


def device_name(device_type: str) -> str:
    """What the measurement is of: the GPU's name, or the processor's and its threads."""
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*: (.+)", cpuinfo.read_text())):
        name = found[1].strip()
    return f"{name}, {torch.get_num_threads()} threads"


def save(rows: Sequence[Row], device: torch.device) -> Path:
    """Keeps a measurement, in place of an earlier one of this device; processes to come use it.

    Raises:
        OSError: the file cannot be written.
    """
    devices = _load() or {}
    devices[device_name(device.type)] = {
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(json.dumps({"format": FORMAT, "devices": devices}, indent=1))
    temporary.replace(target)
    return target


def order(request: Request) -> Order | None:
    """The kernels by their time in the measured call that is nearest to `request`, or None."""
    found = _here(request.device)
    if found is None:
        return None
    dtype = str(request.dtype).removeprefix("torch.")
    kind = (dtype, request.dropout, request.gradient)
    rows = [row for row in found["rows"] if (row["dtype"], row["dropout"], row["gradient"]) == kind]
    if not rows:
        return None
    near = min(rows, key=lambda row: abs(math.log(row["length"] / request.t_bucket)))
    times = near["milliseconds"]
    return Order(tuple(sorted(times, key=times.__getitem__)), found["date"])


@functools.cache
def _here(device_type: str) -> dict[str, Any] | None:
    """The measurement of this device with this torch; read once in a process."""
    devices = _load()
    if not devices or (device_type == "cuda" and not torch.cuda.is_available()):
        return None
    found: dict[str, Any] | None = devices.get(device_name(device_type))
    return found if found is not None and found["torch"] == torch.__version__ else None


def _load() -> dict[str, Any] | None:
    """All devices of the file; None where there is none, or one that cannot be used."""
    try:
        found = json.loads(path().read_text())
        if found["format"] != FORMAT:
            raise ValueError(f"has format {found['format']}, not {FORMAT}")
        devices: dict[str, Any] = found["devices"]
        for device in devices.values():
            device["torch"], device["date"], [Row(**row) for row in device["rows"]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"{path()} is not used: {error}; flashgpt bench attention --save writes it anew",
            stacklevel=2,
        )
        return None
    return devices
