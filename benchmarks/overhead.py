"""What the trainer costs around the bare step: guard, log, data, checkpoints in the background.

Bare: forward, backward, clipping and update, over batches that lie on the device; nothing is read
back. Trainer: `Trainer.fit` on prepared tokens, guard on, every step logged, a checkpoint every
`--checkpoint-every` steps. Both run the same compiled model in one process, in turn.

python -m benchmarks.overhead                        # on a GPU: GPT-2 124M, 64 x 1024 tokens a step
python -m benchmarks.overhead --preset tiny --rows 4 --steps 20 --checkpoint-every 10
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flashgpt.attention.measured import device_name
from flashgpt.config import preset
from flashgpt.data.batches import Batches
from flashgpt.data.prepare import prepare
from flashgpt.data.shards import TokenData
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import DataConfig, ModelConfig, RunConfig, SampleConfig, TrainConfig
from flashgpt.train import runtime
from flashgpt.train.bare import BareStep
from flashgpt.train.checkpoint import write_json
from flashgpt.train.feed import Feed
from flashgpt.train.loop import Listener
from flashgpt.train.parts import Parts
from flashgpt.train.record import versions
from flashgpt.train.schedule import learning_rate
from flashgpt.train.step import Forward, dropout_seed, pays_as_graph
from flashgpt.train.trainer import Trainer

OUT = Path(__file__).with_suffix("")
VOCAB_SIZE = 50304


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="gpt2", help="shape of the model")
    parser.add_argument("--rows", type=int, default=64, help="sequences in one step")
    parser.add_argument("--steps", type=int, default=100, help="measured steps of a round")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each kind")
    parser.add_argument("--warmup", type=int, default=10, help="steps before the clock starts")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--source", nargs="+", default=["stdlib"], help="text")
    parser.add_argument("--out", default=str(OUT), help="folder of the result")
    return parser.parse_args(argv)


def run_config(wanted: argparse.Namespace, cache: str) -> RunConfig:
    """The run of the trainer; dropout off, so that attention is PyTorch's fused kernel."""
    context = preset(wanted.preset).context_length
    steps = wanted.warmup + wanted.steps
    return RunConfig(
        ModelConfig(preset=wanted.preset, drop_rate=0.0, vocab_size=VOCAB_SIZE),
        DataConfig(tuple(wanted.source), "bytes", cache=cache),
        TrainConfig(
            steps=steps + 1,  # the last step evaluates
            stop_at=None,
            tokens_per_step=wanted.rows * context,
            lr=3e-4,
            eval_every=0,
            eval_tokens=1,
            final_eval_tokens=1,
            checkpoint_every=wanted.checkpoint_every,
            keep_checkpoints=1,
            compile=wanted.compile,
        ),
        SampleConfig(max_new_tokens=1),
    )


def bare(parts: Parts, forward: Forward, data: TokenData, wanted: argparse.Namespace) -> float:
    """Seconds per step of what a step cannot do without."""
    context = parts.model.cfg.context_length
    batches = Batches(data.train, context, parts.rows, parts.config.seed)
    with Feed(batches, parts.rows, parts.rows, parts.device) as feed:
        micros = [feed.take(step)[0] for step in range(4)]
    parts.model.train()
    limit, autocast = parts.config.grad_clip, parts.autocast
    bare_step = BareStep(forward, parts.model, parts.optimizer, limit, parts.device, autocast)
    call = bare_step.graphed(print) if pays_as_graph(parts) else bare_step
    for step in range(wanted.warmup + wanted.steps):
        if step == wanted.warmup:
            _wait(parts.device)
            start = time.perf_counter()
        micro = micros[step % len(micros)]
        parts.model.set_dropout(dropout_seed(parts.config.seed, step), 0)
        parts.optimizer.set_rate(learning_rate(step, parts.config))
        call(micro.ids_BT, micro.targets_BT)
    _wait(parts.device)
    return (time.perf_counter() - start) / wanted.steps


def whole(
    trainer: Trainer, data: TokenData, run: RunConfig, wanted: argparse.Namespace
) -> tuple[float, list[dict[str, Any]]]:
    """Seconds per step of the trainer, checkpoints included, and its log."""
    log: list[dict[str, Any]] = []

    def step(entry: dict[str, Any]) -> None:
        log.append({**entry, "seen": time.perf_counter()})

    with tempfile.TemporaryDirectory() as out:
        trainer.fit(data, Path(out), run, listener=Listener(step=step))
    # From the end of the warm-up to the step before the last, which evaluates.
    seconds = (log[-2]["seen"] - log[wanted.warmup - 1]["seen"]) / wanted.steps
    return seconds, log[wanted.warmup : -1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table and a last line of JSON, writes the result."""
    wanted = options(argv)
    with tempfile.TemporaryDirectory() as cache:
        run = run_config(wanted, cache)
        data = TokenData.open(prepare(run.data))
        torch.manual_seed(0)
        model = GPTModel(run.model.resolve(data.vocab_size))
        trainer = Trainer(model, data.tokenizer, run.train)
        forward = runtime.compiled(model, run.train, print)
        rounds: dict[str, list[float]] = {"bare": [], "trainer": []}
        logs: list[list[dict[str, Any]]] = []
        for _ in range(wanted.rounds):
            rounds["bare"].append(bare(trainer.parts, forward, data, wanted))
            seconds, entries = whole(trainer, data, run, wanted)
            rounds["trainer"].append(seconds)
            logs.append(entries)
    log = [entry for entries in logs for entry in entries]
    waited = statistics.mean(entry["data_seconds"] for entry in log)
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    found = {
        "seconds_per_step": rounds,
        "cost": medians["trainer"] / medians["bare"] - 1,
        "data_share": waited / medians["trainer"],
        "tokens_per_second": run.train.tokens_per_step / medians["trainer"],
        "mfu": log[-1].get("mfu"),
        "device_seconds_per_step": [
            statistics.mean(
                run.train.tokens_per_step / entry["tokens_per_second"] for entry in entries
            )
            for entries in logs
        ],
        "peak_memory_bytes": log[-1]["peak_memory_bytes"],
        "options": vars(wanted) | {"out": None},
        "parameters": model.n_parameters,
        "train": dataclasses.asdict(run.train),
        "machine": {"device": device_name(trainer.parts.device.type), **versions()},
    }
    for name, values in rounds.items():
        shown = ", ".join(f"{1e3 * value:.2f}" for value in values)
        print(f"{name:8} {1e3 * medians[name]:8.2f} ms a step ({shown})")
    print(f"cost {found['cost']:+.2%}, waiting for data {found['data_share']:.2%}")
    Path(wanted.out).mkdir(parents=True, exist_ok=True)
    write_json(Path(wanted.out) / "overhead.json", found)
    print(json.dumps({key: found[key] for key in ("cost", "data_share", "tokens_per_second")}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
