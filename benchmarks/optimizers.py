"""Muon against AdamW: steps and seconds to AdamW's final validation loss.

    adamw         AdamW for every parameter
    muon-three    Muon for the blocks' matrices, query, key and value as three; AdamW for the rest
    muon-one      the same, query, key and value as the one matrix that holds them

Every run has the same text, model, batch, schedule (warmup, then a cosine over all steps), decay
and clipping; each variant trains once per learning rate of its grid, and at its best one with
further seeds, which change weights and order of the text. The target of a seed is the validation
loss of AdamW's best rate after all steps. A variant reaches it at the step where its own curve,
linear between evaluations, first is as low; its rate has not fallen there as far as AdamW's at the
end, so that is later than with a schedule of its own. Seconds are steps times the median seconds
of a step, evaluations and the steps up to the first one (compiler, caches) apart.

A best rate at the edge of its grid is marked: the grid was too narrow to call the variant tuned.

Prints a table and, last, one line of JSON; writes optimizers.json, after every run, and
optimizers.png. From the root of the checkout, about 6 minutes on an H100:

    python -m benchmarks.optimizers
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flashgpt import __version__
from flashgpt.attention.measured import device_name
from flashgpt.config import GPTConfig
from flashgpt.data.batches import Batches
from flashgpt.data.prepare import prepare
from flashgpt.data.shards import TokenData
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import DataConfig, TrainConfig
from flashgpt.train import optimizer, runtime
from flashgpt.train.evaluate import evaluate
from flashgpt.train.muon import Muon
from flashgpt.train.schedule import learning_rate

VARIANTS = {"adamw": "#555555", "muon-three": "#1f5a93", "muon-one": "#c4501b"}  # and its colour
SEED = 1337


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        curve: (step, validation loss in nats per token) of each evaluation.
        seconds: seconds per step, one mean for each stretch between evaluations.
    """

    variant: str
    lr: float
    seed: int
    curve: list[tuple[int, float]]
    seconds: list[float]

    @property
    def final_loss(self) -> float:
        """The validation loss after the last step."""
        return self.curve[-1][1]

    @property
    def seconds_per_step(self) -> float:
        """The median, of all stretches but the first."""
        return statistics.median(self.seconds[1:] or self.seconds)


class Bench:
    """One model, compiled once and set back before every run, and the text."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.data = TokenData.open(prepare(_data_config(options)))
        self.config = TrainConfig(
            steps=options.steps,
            tokens_per_step=options.tokens_per_step,
            compile=options.compile,
        )
        self.cfg = GPTConfig(
            vocab_size=self.data.vocab_size,
            context_length=options.context_length,
            emb_dim=options.emb_dim,
            n_heads=max(1, options.emb_dim // 64),
            n_layers=options.layers,
            drop_rate=0.0,
        )
        self.device = runtime.device("auto")
        self.autocast = runtime.autocast_dtype("auto", self.device)
        self.model = GPTModel(self.cfg).to(self.device)
        self.forward = runtime.compiled(self.model, self.config, print)

    def run(self, variant: str, lr: float, seed: int) -> Run:
        """Trains from fresh weights to the end of the schedule."""
        kind: Literal["adamw", "muon"] = "adamw" if variant == "adamw" else "muon"
        config = dataclasses.replace(self.config, optimizer=kind, lr=lr, seed=seed)
        torch.manual_seed(seed)
        self.model.load_state_dict(GPTModel(self.cfg).state_dict())
        made = optimizer.build(self.model, config)
        if variant == "muon-one":
            for part in made.parts:
                for group in part.param_groups if isinstance(part, Muon) else ():
                    group["split"] = 1
        rows = config.rows(self.cfg.context_length)
        batches = Batches(self.data.train, self.cfg.context_length, rows, seed)
        found = Run(variant, lr, seed, [], [])
        for first in range(0, config.steps, self.options.every):
            last = min(first + self.options.every, config.steps)
            started = time.perf_counter()
            self._train(range(first, last), batches, made, config)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            found.seconds.append((time.perf_counter() - started) / (last - first))
            found.curve.append((last, self._validation_loss()))
        print(
            f"{variant} lr {lr:g} seed {seed}: last loss {found.final_loss:.4f}, "
            f"{1e3 * found.seconds_per_step:.1f} ms a step",
            flush=True,
        )
        return found

    def _train(
        self, steps: range, batches: Batches, made: optimizer.Optimizer, config: TrainConfig
    ) -> None:
        self.model.train()
        for step in steps:
            ids_BT, targets_BT = (torch.from_numpy(x).to(self.device) for x in batches.batch(step))
            with runtime.casting(self.device, self.autocast):
                loss: Tensor = self.forward(ids_BT, targets_BT)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
            made.set_rate(learning_rate(step, config))
            made.step()
            made.zero_grad()

    def _validation_loss(self) -> float:
        return evaluate(
            self.model,
            self.data.val,
            self.data.tokenizer.byte_lengths,
            max_tokens=self.options.eval_tokens,
            autocast=self.autocast,
        ).loss


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison."""
    options = _options(argv)
    bench = Bench(options)
    options.out.mkdir(parents=True, exist_ok=True)
    runs = _earlier(options.out / "optimizers.json", bench)

    def train(variant: str, lr: float, seed: int) -> None:
        if any((run.variant, run.lr, run.seed) == (variant, lr, seed) for run in runs):
            return
        runs.append(bench.run(variant, lr, seed))
        _write(options.out / "optimizers.json", _record(bench, runs))

    for variant in VARIANTS:
        for lr in options.adamw_lr if variant == "adamw" else options.muon_lr:
            train(variant, lr, SEED)
    best = {variant: best_rate(runs, variant) for variant in VARIANTS}
    for seed in range(SEED + 1, SEED + options.seeds):
        for variant, lr in best.items():
            train(variant, lr, seed)
    record = _record(bench, runs)
    draw(record, options.out / "optimizers.png")
    _print_table(record["variants"])
    print(json.dumps({"variants": record["variants"]}))
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.optimizers",
        description=about,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--source", nargs="+", default=["stdlib"], help="text, as data.source")
    add("--vocab-size", type=int, default=8192, help="token ids of the bpe trained on it")
    add("--cache", type=Path, default=Path("data"), help="folder for the prepared text")
    add("--layers", type=int, default=6, help="transformer blocks")
    add("--emb-dim", type=int, default=512, help="model width; heads have 64")
    add("--context-length", type=int, default=512, help="tokens of a row")
    add("--tokens-per-step", type=int, default=32768, help="tokens of an optimizer step")
    add("--steps", type=int, default=600, help="optimizer steps of a run")
    add("--every", type=int, default=50, help="steps between evaluations")
    add("--eval-tokens", type=int, default=131072, help="validation tokens of an evaluation")
    add("--adamw-lr", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3], help="AdamW's grid")
    add("--muon-lr", type=float, nargs="+", default=[4e-3, 8e-3, 1.6e-2], help="Muon's grid")
    add("--seeds", type=int, default=2, help="runs at the best rate of each variant")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="as train.compile")
    out = Path(__file__).with_suffix("")
    add("--out", type=Path, default=out, help="folder of the results")
    return parser.parse_args(argv)


def _data_config(options: argparse.Namespace) -> DataConfig:
    return DataConfig(tuple(options.source), "bpe", options.vocab_size, str(options.cache))


def best_rate(runs: Sequence[Run], variant: str) -> float:
    """The learning rate with the lowest final loss, of the seed that all rates have."""
    grid = [run for run in runs if run.variant == variant and run.seed == SEED]
    return min(grid, key=lambda run: (math.isnan(run.final_loss), run.final_loss)).lr


def steps_to(target: float, curve: Sequence[tuple[int, float]]) -> float | None:
    """The step where a curve, linear between evaluations, first is at the target; None: never."""
    for i, (step, loss) in enumerate(curve):
        if loss <= target:
            if i == 0:
                return float(step)
            before, higher = curve[i - 1]
            return before + (step - before) * (higher - target) / (higher - loss)
    return None


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each variant that has trained, at its best rate."""
    rows = []
    adamw = [run for run in runs if run.variant == "adamw"]
    target = {run.seed: run.final_loss for run in adamw if run.lr == best_rate(runs, "adamw")}
    for variant in dict.fromkeys(run.variant for run in runs):
        lr = best_rate(runs, variant)
        grid = sorted({run.lr for run in runs if run.variant == variant})
        best = [run for run in runs if run.variant == variant and run.lr == lr]
        steps = [steps_to(target[run.seed], run.curve) for run in best]
        per_step = statistics.median(run.seconds_per_step for run in best)
        reached = [found for found in steps if found is not None]
        rows.append(
            {
                "variant": variant,
                "best_lr": lr,
                "at_the_edge_of_the_grid": lr in (grid[0], grid[-1]),
                "final_loss": [run.final_loss for run in best],
                "steps_to_adamw": steps,
                "seconds_per_step": per_step,
                "seconds_to_adamw": [per_step * found for found in reached],
            }
        )
    return rows


def _earlier(path: Path, bench: Bench) -> list[Run]:
    """The runs that stand in a result of the same device, text, model and schedule.

    They are not repeated: a grid can be widened, and a measurement that was cut off goes on.
    """
    if not path.exists():
        return []
    there, here = json.loads(path.read_text(encoding="utf-8")), _record(bench, [])
    for record in (there, here):
        record["environment"].pop("date")
    if any(there[key] != here[key] for key in ("environment", "model", "training", "data")):
        raise ValueError(f"{path} is of another device, text, model or schedule; choose --out")
    return [
        Run(**{**run, "curve": [(int(step), loss) for step, loss in run["curve"]]})
        for run in there["runs"]
    ]


def _record(bench: Bench, runs: Sequence[Run]) -> dict[str, Any]:
    """The object of optimizers.json."""
    return {
        "environment": {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "flashgpt": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": device_name(bench.device.type),
            "products": str(bench.autocast or torch.float32).removeprefix("torch."),
            "compiled": bench.forward is not bench.model,
        },
        "model": bench.cfg.to_dict() | {"parameters": bench.model.n_parameters},
        "training": dataclasses.asdict(bench.config)
        | {"optimizer": "per run", "lr": "per run", "seed": "per run"},
        "data": {
            "text": bench.data.describe(),
            "fingerprint": bench.data.fingerprint,
            "epochs": bench.options.steps
            * bench.options.tokens_per_step
            / bench.data.train.n_tokens,
            "validation_tokens": bench.options.eval_tokens,
        },
        "variants": summarise(runs),
        "runs": [dataclasses.asdict(run) for run in runs],
    }


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8", newline="\n")


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    print(
        f"\n{'variant':<12} {'best lr':>9} {'last loss':>10} {'steps':>7} {'s':>7} {'ms/step':>8}"
    )
    for row in rows:
        reached = [step for step in row["steps_to_adamw"] if step is not None]
        steps = f"{statistics.median(reached):.0f}" if reached else "never"
        seconds = f"{statistics.median(row['seconds_to_adamw']):.1f}" if reached else "never"
        edge = "*" if row["at_the_edge_of_the_grid"] else " "
        print(
            f"{row['variant']:<12} {row['best_lr']:>8g}{edge} "
            f"{statistics.median(row['final_loss']):>10.4f} {steps:>7} {seconds:>7} "
            f"{1e3 * row['seconds_per_step']:>8.2f}"
        )
    print("steps and seconds (s) to AdamW's last loss, medians over seeds; * edge of the grid")


def draw(record: dict[str, Any], path: Path) -> None:
    """Validation loss against the step, and the last one against the learning rate, as a PNG.

    Args:
        record: the object of optimizers.json.
        path: the PNG to write; appears complete or not at all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for row in record["variants"]:
        name, lr, color = row["variant"], row["best_lr"], VARIANTS[row["variant"]]
        mine = [run for run in record["runs"] if run["variant"] == name]
        for i, run in enumerate(run for run in mine if run["lr"] == lr):
            label = f"{name}, lr {lr:g}, {1e3 * row['seconds_per_step']:.1f} ms a step"
            steps, losses = zip(*run["curve"], strict=True)
            left.plot(steps, losses, color=color, linewidth=1.2, label=None if i else label)
        grid = sorted((run["lr"], run["curve"][-1][1]) for run in mine if run["seed"] == SEED)
        right.plot(*zip(*grid, strict=True), "o-", color=color, linewidth=1.2)
    for loss in record["variants"][0]["final_loss"]:
        left.axhline(loss, color=VARIANTS["adamw"], linewidth=0.8, linestyle=":")
    left.set_xlabel("optimizer step")
    left.set_ylabel("validation loss (nats per token)")
    left.legend(fontsize=8)
    rates = sorted({run["lr"] for run in record["runs"]})
    right.set_xscale("log")
    right.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=30)
    right.minorticks_off()
    right.set_xlabel("learning rate")
    right.set_ylabel("validation loss after the last step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    model, made, training = record["model"], record["environment"], record["training"]
    figure.suptitle(
        f"{model['n_layers']} layers, width {model['emb_dim']}, {training['tokens_per_step']:,} "
        f"tokens a step, {training['steps']} steps, {made['products']}\n"
        f"torch {made['torch']}, {made['device']}, {made['date']}",
        fontsize=10,
    )
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
