"""Trains a model on text and keeps everything in one run folder.

Values come from the preset, then the TOML file, then the command line.

examples:
  flashgpt train --data.source my.txt --out runs/mine
  flashgpt train --data.source books/ --model.preset gpt2 --train.steps 5000 --out runs/books
  flashgpt train runs/mine/config.toml --out runs/again
  flashgpt train --resume --out runs/mine
  flashgpt train --model.init-from runs/mine --data.source more.txt --out runs/tuned
  flashgpt train --model.use-flash False --print-config
  flashgpt train --replay runs/mine/incidents/step_00000124 --model.use-flash False
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from typing_extensions import Doc

from flashgpt.cli import UsageError
from flashgpt.runconfig import DataConfig, ModelConfig, RunConfig, SampleConfig, TrainConfig
from flashgpt.toml import load_toml, to_toml
from flashgpt.verbs.parse import Flag, Valued, parse, usage


@dataclasses.dataclass(frozen=True)
class Args:
    """Options of `train`."""

    out: Annotated[str, Doc("folder of the run")] = "runs/train"
    resume: Annotated[bool, Flag, Doc("go on from the newest good checkpoint in --out")] = False
    print_config: Annotated[bool, Flag, Doc("print the config as commented TOML, and stop")] = False
    replay: Annotated[
        str | None, Doc("do the refused step of this incident's folder again, and stop")
    ] = None
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: Annotated[TrainConfig, Valued] = dataclasses.field(default_factory=TrainConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)

    @property
    def run(self) -> RunConfig:
        """The config of the run."""
        return RunConfig(self.model, self.data, self.train, self.sample)


def read(argv: Sequence[str]) -> Args:
    """The options, with the TOML file that may stand first.

    `--resume` without a file takes the config of the run that is there, `--replay` that of the
    incident. A preset on the command line replaces the whole model section of the file.
    """
    argv = list(argv)
    base, has_checkpoints = RunConfig(), False
    if argv and not argv[0].startswith("-"):
        base = _load(argv.pop(0))
    elif "--resume" in argv:
        folder = Path(parse(Args, "train", argv, __doc__).out)
        found, has_checkpoints = folder / "config.toml", any(folder.glob("checkpoints/step_*"))
        if has_checkpoints and not found.exists():
            raise UsageError(
                f"{found} is missing; name the TOML file to go on with before --resume"
            )
        if found.exists():
            base = load_toml(found)
            # Where the run was to stop that time; now it goes on.
            base = dataclasses.replace(base, train=dataclasses.replace(base.train, stop_at=None))
    elif any(argument.split("=")[0] == "--replay" for argument in argv):
        from flashgpt.train.incident import Incident

        base = Incident.load(Path(str(parse(Args, "train", argv, __doc__).replay))).config
    if any(argument.split("=")[0] == "--model.preset" for argument in argv):
        # The file's other model keys belong to its own preset.
        base = dataclasses.replace(base, model=ModelConfig())
    default = Args(model=base.model, data=base.data, train=base.train, sample=base.sample)
    args = parse(Args, "train", argv, __doc__, default)
    if args.resume and has_checkpoints and args.model.init_from != base.model.init_from:
        raise UsageError(
            "--model.init-from is for a new run; this one goes on from its own checkpoints"
        )
    return args


def _load(name: str) -> RunConfig:
    path = Path(name)
    if path.suffix != ".toml":
        raise UsageError(f"{name} is no TOML file; text goes behind --data.source {name}")
    try:
        return load_toml(path)
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error


def main(argv: Sequence[str]) -> int:
    """Runs `flashgpt train`."""
    args = read(argv)
    with usage():
        args.run.check()
    if args.print_config:
        print(to_toml(args.run), end="")
        return 0
    if args.replay:
        return _replay(Path(args.replay), args.run)
    from flashgpt import orchestrator
    from flashgpt.data.prepare import prepare
    from flashgpt.data.shards import TokenData
    from flashgpt.train.checkpoint import steps
    from flashgpt.train.initial import pinned
    from flashgpt.train.resume import check_start
    from flashgpt.verbs.console import console, counting, training

    out, folder, config = console(), Path(args.out), args.run
    check_start(config.train, folder, args.resume)
    if not (args.resume and steps(folder)):  # what goes on has its weights and its tokenizer
        config = pinned(config, folder)
    with counting(out) as progress:
        data = TokenData.open(prepare(config.data, progress=progress))
    out.print(data.describe())
    last = config.train.stop_at or config.train.steps
    with training(out, 0, last) as listener:
        _, result = orchestrator.train(config, data, folder, resume=args.resume, listener=listener)
    out.print(f"checkpoint {result.checkpoint}, plot {folder / 'loss.png'}")
    if result.interrupted is not None:
        out.print(
            f"interrupted at step {result.step}; go on: flashgpt train --resume --out {folder}"
        )
        return 128 + result.interrupted
    out.print(f'write with it: flashgpt generate {folder} --prompt "..."')
    return 0


def _replay(folder: Path, config: RunConfig) -> int:
    """Does a refused step again, and shows its numbers per layer beside those of that time."""
    from flashgpt.train.replay import replay
    from flashgpt.verbs.console import console, table

    out = console()
    incident, now, receipt = replay(folder, config)
    then = incident.findings
    out.print(f"step {incident.step + 1} was left out: {incident.reason}")
    for line in receipt:
        out.print(f"attention: {line}")
    rows = [
        ("loss", f"{then.loss:.6g}", f"{now.loss:.6g}"),
        ("gradient norm", f"{then.norm:.6g}", f"{now.norm:.6g}"),
        ("first not finite", then.first_non_finite or "none", now.first_non_finite or "none"),
    ]
    for name in now.gradient_norms:
        for what, a, b in (
            ("largest output", then.largest_output, now.largest_output),
            ("gradient norm", then.gradient_norms, now.gradient_norms),
        ):
            if name in a and name in b:
                rows.append((f"{name} {what}", f"{a[name]:.4g}", f"{b[name]:.4g}"))
    out.print(table("the step, done again", ("", "that time", "now"), rows))
    return 0
