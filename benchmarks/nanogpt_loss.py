"""nanoGPT's model and ours reach the same loss: same weights, same batches, same schedule.

For each seed nanoGPT's model is initialised as it comes, and ours starts from its weights. Both
then train on the same batches: warm-up and a cosine, each side's own AdamW with betas 0.9 and 0.95
and decay 0.1 of matrices and embeddings, clipping at 1, no dropout, bf16 autocast on CUDA (fp32 on
the CPU). Each side is compiled once and set back before each seed, which also decides the order of
the text. Final loss is the mean of the last 20 steps' training losses; afterwards both predict the
held-out text, not compiled. nanoGPT's spread is the range of its own losses over the seeds: the
largest less the smallest.

Training amplifies rounding, up to hundredths of a nat at the end. So nanoGPT also runs a second
time with the rows of each batch in reverse order, which changes nothing but the order of sums: the
control. And ours and the control also run beside nanoGPT: every 10 steps their weights and moments
are made nanoGPT's, before rounding has grown. What their losses are apart in the last of those
steps, added up over the run, is their drift: about how far off the end would be if nothing were
amplified.

Claims, on differences ours - nanoGPT in nats per token:

    first step    at most 1e-3 (1e-5 in fp32) for every seed: the same weights and the same batch
    drift         mean over the seeds at most 0.005
    final         mean over the seeds at most 0.005, and at most nanoGPT's spread
    held out      the same

Text is prepared beforehand from Python sources that are installed (see benchmarks.nanogpt_text),
on a machine of any kind. Prints a table and, last, one line of JSON; writes loss.json, with every
step's losses, after each seed, and curves.png; exit status 1 if a claim does not hold. From the
root of the checkout; the second needs a GPU at its size:

    python -m benchmarks.nanogpt_loss --prepare data/nanogpt
    python -m benchmarks.nanogpt_loss --nanogpt DIR --text data/nanogpt

Legend: B rows, T positions.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import nanogpt, nanogpt_text
from benchmarks.nanogpt_claims import (
    CONTROL,
    CONTROL_BESIDE,
    FIRST_LIMIT,
    LAST,
    OWN,
    OWN_BESIDE,
    PEER,
    SPAN,
    Run,
    draw,
    judge,
    show,
)
from benchmarks.nanogpt_trainee import Side, Trainee
from flashgpt.attention.measured import device_name
from flashgpt.config import GPTConfig
from flashgpt.data.batches import Batches
from flashgpt.data.shards import TokenSplit
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import TrainConfig
from flashgpt.train import runtime
from flashgpt.train.checkpoint import write_json
from flashgpt.train.optimizer import Optimizer
from flashgpt.train.record import versions


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `module`, `cfg`, `train` and `loaded` are what it names, made or read."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.nanogpt_loss",
        description=about,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    nanogpt.add_folder(parser)
    add("--text", type=Path, metavar="FOLDER", help="text that --prepare made")
    add("--layers", type=int, default=12, help="transformer blocks")
    add("--heads", type=int, default=12, help="attention heads")
    add("--width", type=int, default=768, help="model width")
    add("--length", type=int, default=1024, help="tokens of a row")
    add("--vocab-size", type=int, default=50304, help="tokens of the models' vocabulary")
    add("--batch", type=int, default=32, help="rows of a step")
    add("--steps", type=int, default=500, help="optimizer steps")
    add("--lr", type=float, default=3e-4, help="peak learning rate; the last is a tenth of it")
    add("--warm-up", type=int, default=100, help="steps until the peak learning rate")
    add("--seeds", type=int, nargs="+", default=[1337, 1338, 1339], help="at least 2")
    add("--compile", choices=("on", "off"), default="on", help="both models")
    out = Path(__file__).parent / "nanogpt-loss"
    add("--out", type=Path, default=out, help="folder of the results")
    add("--prepare", type=Path, metavar="FOLDER", help="make the text there, and end")
    add("--packages", nargs="*", default=["torch", "transformers"], help="installed: their text")
    add("--tokenizer-size", type=int, default=50257, help="tokens of the bpe trained on the text")
    add("--tokens", type=int, default=500 * 32 * 1024 + 1, help="ids of text to prepare")
    add("--held-out", type=int, default=500_000, help="ids held out, besides")
    wanted = parser.parse_args(argv)
    if wanted.prepare is not None:
        return wanted
    try:
        _check(wanted)
    except ValueError as error:
        parser.error(str(error))
    return wanted


def _check(wanted: argparse.Namespace) -> None:
    """Loads what the options name."""
    wanted.module = nanogpt.load(wanted.nanogpt)
    if wanted.text is None:
        raise ValueError("--text must name a folder made by --prepare, got none")
    wanted.loaded = nanogpt_text.read(wanted.text)
    if wanted.vocab_size < wanted.loaded.vocab_size:
        raise ValueError(
            f"--vocab-size must be at least the text's {wanted.loaded.vocab_size}, "
            f"got {wanted.vocab_size}"
        )
    if len(set(wanted.seeds)) < 2:
        raise ValueError(f"--seeds must be at least 2 different ones, got {wanted.seeds}")
    wanted.cfg = GPTConfig(
        vocab_size=wanted.vocab_size,
        context_length=wanted.length,
        emb_dim=wanted.width,
        n_heads=wanted.heads,
        n_layers=wanted.layers,
        drop_rate=0.0,
        qkv_bias=True,
        activation="gelu",
    )
    wanted.train = TrainConfig(
        steps=wanted.steps,
        tokens_per_step=wanted.batch * wanted.length,
        lr=wanted.lr,
        min_lr=0.1,
        warmup_steps=wanted.warm_up,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.95,
        grad_clip=1.0,
    )
    for ids, name in ((wanted.loaded.train, "--batch"), (wanted.loaded.held_out, "--length")):
        if len(ids) <= wanted.batch * wanted.length:
            raise ValueError(
                f"{name} must leave a batch of {wanted.batch} x {wanted.length} in each part of "
                f"the text, got one of {len(ids)} tokens"
            )


class Bench:
    """The models and the text on one device."""

    def __init__(self, wanted: argparse.Namespace) -> None:
        self.wanted, self.config = wanted, wanted.train
        self.device = runtime.device("auto")
        self.autocast = runtime.autocast_dtype("auto", self.device)
        compiled = wanted.compile == "on"
        peers = [nanogpt.peer(wanted.module, wanted.cfg).to(self.device) for _ in range(2)]
        self.peer, self.control = (
            Side(peer, nanogpt.peer_forward(peer, compiled=compiled)) for peer in peers
        )
        own = GPTModel(wanted.cfg).to(self.device).train()
        self.own = Side(own, nanogpt.own_forward(own, self.config, compiled=compiled))
        nanogpt.check_decays(self._optimizer(self.peer), self._optimizer(self.own))
        text = wanted.loaded
        self.train_ids = torch.from_numpy(text.train.astype(np.int64)).to(self.device)
        self.held_out_ids = torch.from_numpy(text.held_out.astype(np.int64)).to(self.device)
        self.position = torch.arange(wanted.length + 1, device=self.device)

    def _optimizer(self, side: Side) -> Optimizer:
        """A new one."""
        if isinstance(side.model, GPTModel):
            return nanogpt.own_optimizer(side.model, self.config)
        return nanogpt.peer_optimizer(side.model, self.config, self.device)

    def runs(self, seed: int) -> list[Run]:
        """From nanoGPT's initial weights of a seed: nanoGPT and, beside it, the control and ours;
        then both of them on their own."""
        torch.manual_seed(seed)
        weights = nanogpt.peer(self.wanted.module, self.wanted.cfg).state_dict()
        batches = self._batches(self.wanted.loaded.train, seed)
        steps = range(self.config.steps)
        starts = np.array([[at for _, at in batches.windows(step)] for step in steps])
        places = torch.from_numpy(starts).to(self.device)

        def begin(name: str, side: Side) -> Trainee:
            order = places.flip(1) if name.startswith(CONTROL) else places
            ours = isinstance(side.model, GPTModel)
            side.model.load_state_dict(nanogpt.own_names(weights) if ours else weights)
            return Trainee(
                side,
                self._optimizer(side),
                lambda step: self._windows(self.train_ids, order[step]),
                self.config,
                self.autocast,
            )

        beside = {CONTROL_BESIDE: self.control, OWN_BESIDE: self.own}
        made = {name: begin(name, side) for name, side in {PEER: self.peer, **beside}.items()}
        for first in steps[::SPAN]:
            if first % (10 * SPAN) == 0:
                print(f"seed {seed}, three side by side: step {first} of {len(steps)}", flush=True)
            for name in beside:
                made[name].become(made[PEER])
            for trainee in made.values():
                trainee.train(first, min(first + SPAN, len(steps)))
        found = [self._run(name, seed, trainee) for name, trainee in made.items()]
        for name, side in ((CONTROL, self.control), (OWN, self.own)):
            trainee = begin(name, side)
            trainee.train(0, len(steps))
            found.append(self._run(name, seed, trainee))
        return found

    def _run(self, name: str, seed: int, trainee: Trainee) -> Run:
        """What came of it."""
        losses = trainee.losses()
        run = {
            "side": name,
            "seed": seed,
            "final": statistics.fmean(losses[-LAST:]),
            "held_out": self._held_out(trainee.side),
            "seconds": trainee.seconds,
            "losses": [round(value, 6) for value in losses],
        }
        told = f"final {run['final']:.4f}, held out {run['held_out']:.4f}"
        print(f"{name}, seed {seed}: {told}, {trainee.seconds:.0f} s", flush=True)
        return run

    def _batches(self, ids: nanogpt_text.Ids, seed: int) -> Batches:
        split = TokenSplit([ids], [np.zeros(1, np.int64)], 0)
        return Batches(split, self.wanted.length, self.wanted.batch, seed)

    def _windows(self, ids: Tensor, starts_B: Tensor) -> tuple[Tensor, Tensor]:
        rows = ids[starts_B[:, None] + self.position]
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    @torch.no_grad()
    def _held_out(self, side: Side) -> float:
        """Mean loss over the complete batches of the held-out text; not compiled."""
        batches = self._batches(self.wanted.loaded.held_out, 0)
        losses = []
        for step in range(batches.n_windows // self.wanted.batch):
            starts_B = torch.tensor([at for _, at in batches.windows(step)], device=self.device)
            ids_BT, targets_BT = self._windows(self.held_out_ids, starts_B)
            with runtime.casting(self.device, self.autocast):
                found = side.model(ids_BT, targets_BT)
            losses.append(found if side is self.own else found[1])
        return float(torch.stack(losses).mean())


def _record(bench: Bench, runs: Sequence[Run]) -> dict[str, Any]:
    """The object of loss.json."""
    wanted = bench.wanted
    products = "fp32" if bench.autocast is None else "bf16"
    claims = judge(runs, FIRST_LIMIT[products])
    return {
        "claims_hold": all(claim["holds"] for claim in claims.values()),
        "claims": claims,
        "model": wanted.cfg.to_dict(),
        "training": {**dataclasses.asdict(wanted.train), "seed": "per run"}
        | {"batch": wanted.batch, "compile": wanted.compile},
        "text": wanted.loaded.record,
        "nanogpt": {"model.py sha256": nanogpt.digest(wanted.nanogpt)},
        "products": products,
        "machine": {"device": device_name(bench.device.type), **versions()},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "runs": runs,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prepares text, or runs the comparison: 0 if all claims hold, else 1."""
    wanted = options(argv)
    if wanted.prepare is not None:
        asked = (wanted.tokenizer_size, wanted.tokens, wanted.held_out)
        print(json.dumps(nanogpt_text.make(wanted.prepare, wanted.packages, *asked)))
        return 0
    bench = Bench(wanted)
    if bench.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    wanted.out.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    for seed in wanted.seeds:
        runs += bench.runs(seed)
        record = _record(bench, runs)
        write_json(wanted.out / "loss.json", record)
    draw(record, wanted.out / "curves.png")
    show(record)
    print(json.dumps({name: record[name] for name in ("claims_hold", "claims")}))
    return 0 if record["claims_hold"] else 1


if __name__ == "__main__":
    sys.exit(main())
