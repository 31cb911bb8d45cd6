"""The whole way, from text to a trained GPT that writes: tokens, training, a sample, the proof.

Without sources it reads the source code of Python's standard library, so nothing is downloaded. The
number of steps comes from a short calibration and is written into config.toml, so that
`flashgpt train RUN/config.toml --out ELSEWHERE` repeats the run.

examples:
  flashgpt demo
  flashgpt demo my.txt notes/
  flashgpt demo --seconds 300 --out runs/longer
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typing_extensions import Doc

from flashgpt.cli import UsageError
from flashgpt.runconfig import DataConfig, ModelConfig, RunConfig, SampleConfig, TrainConfig
from flashgpt.verbs.parse import Positional, parse, typed

if TYPE_CHECKING:
    from rich.console import Console

    from flashgpt.data.shards import TokenData
    from flashgpt.train.loop import Result

CALIBRATION_SECONDS = 3.0
TRIGRAM_PIECES = 32  # at most 32 Mi tokens are counted


@dataclasses.dataclass(frozen=True)
class Args:
    """Options of `demo`."""

    source: Annotated[
        tuple[str, ...], Positional, Doc("text files, folders or globs; Python's own when left out")
    ] = ()
    seconds: Annotated[float, Doc("training time (seconds)")] = 90.0
    out: Annotated[
        str | None, Doc("folder of the run; runs/demo or the next free name when left out")
    ] = None


def recipe(source: tuple[str, ...]) -> RunConfig:
    """The demo's config; the number of steps is still open."""
    return RunConfig(
        ModelConfig(preset="tiny"),
        DataConfig(source or ("stdlib",), vocab_size=2048),
        TrainConfig(
            tokens_per_step=1024,
            lr=2e-3,
            eval_every=250,
            eval_tokens=16384,
            final_eval_tokens=400_000,
            checkpoint_every=500,
        ),
        SampleConfig(prompt="\n" if source else "def "),
    )


def main(argv: Sequence[str]) -> int:
    """Runs `flashgpt demo`."""
    args = parse(Args, "demo", argv, __doc__)
    if not 0 < args.seconds < math.inf:
        raise UsageError(f"--seconds must be positive, got {args.seconds}")
    from flashgpt import orchestrator
    from flashgpt.train.resume import check_start
    from flashgpt.verbs.console import console, training
    from flashgpt.verbs.verify import audit

    started = time.monotonic()
    out, run = console(), recipe(args.source)
    folder = Path(args.out) if args.out else free_name(Path("runs/demo"))
    check_start(run.train, folder, resume=False)
    data = _prepare(out, run.data)
    run = _with_steps(out, run, data, args.seconds)
    with training(out, 0, run.train.steps) as listener:
        system, result = orchestrator.train(run, data, folder, listener=listener)
    if result.interrupted is not None:
        out.print(f"interrupted; go on: flashgpt train --resume --out {typed(folder)}")
        return 128 + result.interrupted
    verdict = audit(out, system.model).passed
    _summary(out, folder, data, result, verdict, time.monotonic() - started)
    return 0 if verdict else 1


def free_name(wanted: Path) -> Path:
    """`wanted`, or `wanted`-2, -3, ...: the first that does not exist."""
    others = (wanted.with_name(f"{wanted.name}-{i}") for i in itertools.count(2))
    return next(name for name in itertools.chain([wanted], others) if not name.exists())


def _prepare(out: Console, config: DataConfig) -> TokenData:
    from flashgpt.data.prepare import prepare
    from flashgpt.data.shards import TokenData
    from flashgpt.verbs.console import counting

    with counting(out) as progress:
        data = TokenData.open(prepare(config, progress=progress))
    out.print(data.describe())
    return data


def _with_steps(out: Console, run: RunConfig, data: TokenData, seconds: float) -> RunConfig:
    """Measures a step on a model to throw away, and fills the time with steps."""
    from flashgpt import orchestrator

    cfg = run.model.resolve(data.tokenizer.vocab_size)
    trainer = orchestrator.assemble(cfg, data.tokenizer, run.train).trainer
    step_seconds = trainer.time_step(data, min(CALIBRATION_SECONDS, seconds / 5))
    steps = max(10, int(seconds / step_seconds))
    out.print(
        f"{trainer.parts.model.n_parameters:,} parameters, {step_seconds * 1e3:.0f} ms a step: "
        f"{steps} steps in about {seconds:.0f} s"
    )
    return dataclasses.replace(run, train=dataclasses.replace(run.train, steps=steps))


def _summary(
    out: Console, folder: Path, data: TokenData, result: Result, verdict: bool, seconds: float
) -> None:
    from flashgpt.measure.ngram import bits_per_byte, text_of

    found = result.evaluation
    assert found is not None, "a run that was not interrupted ends with an evaluation"
    texts = (
        itertools.islice(text_of(split, data.tokenizer), TRIGRAM_PIECES)
        for split in (data.train, data.val)
    )
    trigram = bits_per_byte(*texts)
    rows = {
        "held-out text": f"{found.bits_per_byte:.3f} bits per byte "
        f"(a byte 3-gram model: {trigram:.3f}), perplexity {found.perplexity:.1f}",
        "use_flash proven": "both settings agree" if verdict else "FAILED, see the table above",
        "loss plot": str(folder / "loss.png"),
        "sample": str(folder / "samples.txt"),
        "checkpoint": f"{result.checkpoint} (transformers loads it as it is)",
        "config": f"{folder / 'config.toml'} repeats the run",
        "time": f"{seconds:.0f} s",
    }
    out.print()
    for name, value in rows.items():
        out.print(f"  {name:17} {value}")
    out.print("\nnext:")
    for command in (
        f'flashgpt generate {typed(folder)} --prompt "def "',
        "flashgpt demo your.txt",
        f"flashgpt train --resume --out {typed(folder)} --train.steps {2 * result.step}",
        f"flashgpt verify --checkpoint {typed(folder)}",
    ):
        out.print(f"  {command}")
