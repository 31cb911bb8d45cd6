"""Speed of writing with GPT-2 beside Hugging Face's: `flashgpt bench generate` without its command.

For a machine that has torch, and transformers for the comparison, but not the libraries of the
command line. What is measured is described in flashgpt/measure/bench_generate.py and by
`flashgpt bench generate --help`. Writes generate.json, prints a line for each row and, last, one
line of JSON. From the root of the checkout:

    python -m benchmarks.generate --batches 1 8 32 128 --compiled-batches 1 32
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flashgpt.attention.measured import device_name
from flashgpt.config import PRESETS, preset
from flashgpt.measure.bench_generate import measure
from flashgpt.measure.generate_record import Setup, record
from flashgpt.measure.generate_ways import WAYS
from flashgpt.train.checkpoint import write_json
from flashgpt.train.runtime import device
from flashgpt.verbs.bench import environment

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `setup` is what is to be measured."""
    here = device("auto")
    on_gpu = here.type == "cuda"
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=about)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="gpt2", help="shape of the model (gpt2)")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="who writes (all)")
    batches = [1, 8, 32, 128] if on_gpu else [1, 8]
    add("--batches", nargs="+", type=int, default=batches, help="texts side by side")
    add("--compiled-batches", nargs="*", type=int, default=[1, 32], help="those of static (1 32)")
    add("--prompt", type=int, default=128 if on_gpu else 16, help="tokens before each text")
    add("--new-tokens", type=int, default=128 if on_gpu else 16, help="tokens of each text")
    add("--dtype", choices=DTYPES, default="bf16" if on_gpu else "fp32", help="of the weights")
    add("--rounds", type=int, default=3, help="rounds of each way (3)")
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(here.type).lower()).strip("-")
    out = Path(__file__).parent / f"generate-{slug}"
    add("--out", type=Path, default=out, help="folder of the result (generate-DEVICE)")
    wanted = parser.parse_args(argv)
    try:
        wanted.setup = Setup(
            cfg=preset(wanted.preset, drop_rate=0.0),
            dtype=DTYPES[wanted.dtype],
            ways=tuple(wanted.ways),
            batches=tuple(wanted.batches),
            compiled_batches=tuple(wanted.compiled_batches),
            prompt=wanted.prompt,
            new_tokens=wanted.new_tokens,
            rounds=wanted.rounds,
            device=here,
        )
    except ValueError as error:
        parser.error(str(error))
    return wanted


def show(found: dict[str, Any]) -> None:
    """A line for each row."""
    for row in found["rows"]:
        same = "" if row["differing"] is None else f", {row['differing']} texts differ"
        print(
            f"{WAYS[row['way']]}, batch {row['batch']}: {row['tokens_per_second']:,.0f} tokens/s, "
            f"{row['ms']:.2f} ms a step ({row['ms_min']:.2f} to {row['ms_max']:.2f}), "
            f"{row['share']:.1%} of the memory's limit{same}"
        )
    for first in found["first"]:
        print(
            f"{WAYS[first['way']]}, first token after {first['prompt']:,}: {first['ms']:.2f} ms "
            f"({first['ms_min']:.2f} to {first['ms_max']:.2f})"
        )
    for refused in found["refused"]:
        print(f"{WAYS[refused['way']]}, batch {refused['batch']}: {refused['reason']}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes generate.json, prints it."""
    wanted = options(argv)
    wanted.out.mkdir(parents=True, exist_ok=True)
    result = measure(wanted.setup, lambda text: print(text, flush=True))
    found = record(wanted.setup, result, environment(wanted.setup.device))
    write_json(wanted.out / "generate.json", found)
    show(found)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
