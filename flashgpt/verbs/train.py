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
  torchrun --nproc-per-node 2 -m flashgpt train runs/mine/config.toml --out runs/two
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typing_extensions import Doc

from flashgpt.cli import UsageError
from flashgpt.launch import Launch
from flashgpt.runconfig import DataConfig, ModelConfig, RunConfig, SampleConfig, TrainConfig
from flashgpt.toml import load_toml, to_toml
from flashgpt.verbs.parse import Flag, Valued, parse, typed, usage

if TYPE_CHECKING:
    from flashgpt.train.parallel import Parallel


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
        base = load(argv.pop(0))
    elif "--resume" in argv:
        folder = Path(parse(Args, "train", argv, __doc__).out)
        found, has_checkpoints = folder / "config.toml", any(folder.glob("checkpoints/step_*"))
        if has_checkpoints and not found.exists():
            raise UsageError(
                f"{found} is missing; name the TOML file to go on with before --resume"
            )
        if not (has_checkpoints or found.exists() or _names(argv, "--data.source")):
            raise UsageError(
                f"{folder} holds no run to go on with; choose another --out, or name the TOML file "
                "to start one with before --resume"
            )
        if found.exists():
            base = load_toml(found)
            # Where the run was to stop that time; now it goes on.
            base = dataclasses.replace(base, train=dataclasses.replace(base.train, stop_at=None))
    elif _names(argv, "--replay"):
        from flashgpt.train.incident import Incident

        base = Incident.load(Path(str(parse(Args, "train", argv, __doc__).replay))).config
    base = without_other_preset(base, argv)
    default = Args(model=base.model, data=base.data, train=base.train, sample=base.sample)
    args = parse(Args, "train", argv, __doc__, default)
    if args.resume and has_checkpoints and args.model.init_from != base.model.init_from:
        raise UsageError(
            "--model.init-from is for a new run; this one goes on from its own checkpoints"
        )
    return args


def without_other_preset(base: RunConfig, argv: Sequence[str]) -> RunConfig:
    """A file's config without its model, where the command line names a preset: the model's other
    keys belong to the preset of the file."""
    if _names(argv, "--model.preset"):
        return dataclasses.replace(base, model=ModelConfig())
    return base


def _names(argv: Sequence[str], option: str) -> bool:
    return any(argument.split("=")[0] == option for argument in argv)


def load(name: str) -> RunConfig:
    """The config in a TOML file that stands first on a command line.

    Raises:
        UsageError: it is none, or cannot be read.
    """
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
    launch = Launch.here()
    args = read(argv)
    with usage():
        launch.check()
        args.run.check(launch.size)
    if (args.print_config or args.replay) and launch.size > 1:
        raise UsageError("--print-config and --replay are for one process; leave torchrun out")
    if args.print_config:
        print(to_toml(args.run), end="")
        return 0
    if args.replay:
        return _replay(Path(args.replay), args.run)
    from flashgpt.train import runtime
    from flashgpt.train.parallel import started
    from flashgpt.train.resume import is_of

    config = args.run.train
    with started(config.parallel, runtime.device(config.device)) as parallel:
        # torchrun counts on each machine by itself.
        restarted = parallel.largest(launch.restarts) > 0
        if parallel.lead(lambda: is_of(Path(args.out), launch.name, restarted)):
            args = _restarted(args)
        return _train(args, parallel)


def _restarted(args: Args) -> Args:
    """A run that torchrun starts again goes on, whatever the command line says of that.

    A run that started from other weights has them, and its tokenizer, as its own config says.
    """
    folder = Path(args.out)
    if args.model.init_from is not None and any(folder.glob("checkpoints/step_*")):
        base = load_toml(folder / "config.toml")
        args = dataclasses.replace(args, model=base.model, data=base.data)
    return dataclasses.replace(args, resume=True)


def _train(args: Args, parallel: Parallel) -> int:
    """Trains in one of the processes; the first one says what happens."""
    from flashgpt import orchestrator
    from flashgpt.data.prepare import prepare
    from flashgpt.data.shards import TokenData
    from flashgpt.train.checkpoint import steps
    from flashgpt.train.initial import pinned
    from flashgpt.train.resume import check_start
    from flashgpt.verbs.console import console, counting, training

    out, folder = console(quiet=not parallel.is_first), Path(args.out)

    def begin() -> tuple[RunConfig, Path]:
        config = args.run
        check_start(config.train, folder, args.resume)
        if not (args.resume and steps(folder)):  # what goes on has its weights and its tokenizer
            config = pinned(config, folder)
        with counting(out) as progress:
            return config, prepare(config.data, progress=progress)

    config, prepared = parallel.lead(begin)
    data = TokenData.open(prepared)
    out.print(data.describe())
    last = config.train.stop_at or config.train.steps
    with training(out, 0, last) as listener:
        _, result = orchestrator.train(
            config, data, folder, resume=args.resume, listener=listener, parallel=parallel
        )
    out.print(f"checkpoint {result.checkpoint}, plot {folder / 'loss.png'}")
    if result.interrupted is not None:
        again = f"flashgpt train --resume --out {typed(folder)}"
        out.print(f"interrupted at step {result.step}; go on: {again}")
        return 128 + result.interrupted
    out.print(f'write with it: flashgpt generate {typed(folder)} --prompt "..."')
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
