"""What a kernel must survive on a GPU before it may serve a training step.

nan      10,000 forward and backward passes of sdpa:cudnn on odd sizes and hard values, whose exact
         results are finite: which results hold a value that is not.
repeats  forward and backward of every kernel on the same inputs, 1,000 times, while another stream
         keeps the GPU busy: how many results differ from the first in any bit, tensor by tensor.

python -m benchmarks.trials                          # on a GPU; about two minutes
python -m benchmarks.trials --steps 100 --repeats 10
"""

from __future__ import annotations

import argparse
import datetime
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashgpt.attention import verify
from flashgpt.attention.kernels import KERNELS
from flashgpt.attention.measured import device_name
from flashgpt.attention.standard import NAME as STANDARD
from flashgpt.attention.verify import Case
from flashgpt.train.checkpoint import write_json
from flashgpt.train.record import versions

OUT = Path(__file__).with_suffix("")
SUSPECT = "sdpa:cudnn"
# Few shapes, because cuDNN builds a plan for each; most are odd, some leave 64 of 128.
LENGTHS = (2, 17, 63, 64, 65, 127, 129, 192, 320, 577, 704, 1023)
HEAD_DIMS = (64, 128)
VALUES = ("normal", *verify.VALUES, *verify.SAME_KEYS.values())
LOOK_EVERY = 250  # steps
BATCH, HEADS, LENGTH, HEAD_DIM = 8, 12, 1024, 64  # of the repeats
SECONDS = 8.0  # for the repeats of one kernel, at most


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000, help="of nan")
    parser.add_argument("--repeats", type=int, default=1_000, help="of each kernel")
    parser.add_argument("--out", default=str(OUT), help="folder of the result")
    return parser.parse_args(argv)


def draw(case: Case, generator: torch.Generator) -> list[Tensor]:
    """q, k, v and the upstream gradient on the GPU; `verify.inputs_of` draws on the CPU."""
    shape = (case.batch, case.heads, case.queries, case.head_dim)
    found = [
        torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
        for _ in range(4)
    ]
    verify.change(case.values, *found[:3])
    return [x.to(case.dtype) for x in found]


def nan(steps: int, device: torch.device) -> dict[str, Any]:
    """Forward and backward of the suspect, many times."""
    choice, generator = random.Random(0), torch.Generator(device).manual_seed(0)
    kinds, bad, flags = set(), [], []
    for step in range(steps):
        length = choice.choice(LENGTHS)
        head_dim, dtype = choice.choice(HEAD_DIMS), choice.choice((torch.bfloat16, torch.float16))
        case = Case(2, 3, length, length, head_dim, dtype=dtype, values=choice.choice(VALUES))
        kinds.add(str(case))
        flags.append((case, not_finite(verify.run_case(SUSPECT, case, 0, draw(case, generator)))))
        if len(flags) == LOOK_EVERY or step == steps - 1:
            bad += [str(judged) for judged, flag in flags if flag.item()]
            flags.clear()
    cudnn = torch.backends.cudnn.version()
    found = {"kernel": SUSPECT, "cudnn": cudnn, "steps": steps, "kinds of calls": len(kinds)}
    return {**found, "not finite": bad}


def not_finite(found: dict[str, Tensor]) -> Tensor:
    """Whether any result holds NaN or infinity (0-d, on the device)."""
    return torch.stack([~torch.isfinite(x).all() for x in found.values()]).any()


def repeats(times: int, device: torch.device) -> list[dict[str, Any]]:
    """How often each kernel gives other bits than the first time."""
    found = []
    for p in (0.0, 0.1):
        case = Case(BATCH, HEADS, LENGTH, LENGTH, HEAD_DIM, p, dtype=torch.bfloat16)
        for name, kernel in KERNELS.items():
            reason = kernel.supports(case.request(device))
            if reason is None and name != STANDARD:
                found.append({"kernel": name, "dropout": p, **repeat(name, case, times, device)})
    return found


def repeat(name: str, case: Case, times: int, device: torch.device) -> dict[str, Any]:
    """One kernel, while another stream multiplies matrices."""
    inputs = draw(case, torch.Generator(device).manual_seed(1))
    first = verify.run_case(name, case, 0, inputs)
    differ = {x: torch.zeros((), dtype=torch.int64, device=device) for x in first}
    load = background(device)
    start, done = time.monotonic(), 0
    while done < times and time.monotonic() - start < SECONDS:
        load()
        again = verify.run_case(name, case, 0, inputs)
        for x, same in first.items():
            differ[x] += (again[x] != same).any()
        done += 1
        if done % 20 == 0:  # the host must not run ahead by more than the memory holds
            torch.cuda.current_stream(device).synchronize()
    torch.cuda.synchronize(device)
    return {"repeats": done, "differ": {x: int(count) for x, count in differ.items()}}


def background(device: torch.device) -> Callable[[], None]:
    """A call that gives another stream some work, of changing length."""
    stream = torch.cuda.Stream(device)
    a = torch.randn(2048, 2048, dtype=torch.bfloat16, device=device)
    sizes = random.Random(1)

    def load() -> None:
        size = sizes.choice((256, 512, 1024, 2048))
        with torch.cuda.stream(stream):
            for _ in range(4):
                torch.mm(a[:size, :size], a[:size, :size])

    return load


def main(argv: Sequence[str] | None = None) -> int:
    """Runs both trials and writes trials.json."""
    args = options(argv)
    if not torch.cuda.is_available():
        print("trials needs a GPU, and there is none")
        return 1
    device = torch.device("cuda")
    found = {
        "environment": {
            "device": device_name("cuda"),
            **versions(),
            "date": datetime.date.today().isoformat(),
        },
        "nan": nan(args.steps, device),
        "repeats": repeats(args.repeats, device),
    }
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "trials.json", found)
    print(found["nan"])
    for row in found["repeats"]:
        print(row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
