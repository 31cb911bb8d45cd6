"""Which micro-batch to train with: measures memory and speed here, writes the config, looks ahead.

Takes what `flashgpt train` takes. Measures training steps over micro-batches, with use_flash on and
off and with blocks recomputed or not, in --seconds; recommends the fastest that leaves a margin of
memory free, and writes it as a new TOML file. Each size is predicted from smaller ones before it is
measured. Then predicts, by arithmetic that docs/planning.md explains, what GPT-2's sizes take on
GPUs that are not here. OUT gets plan.json and plan.png; the last line printed is the content of
plan.json.

examples:
  flashgpt plan runs/mine/config.toml
  flashgpt plan --model.preset gpt2 --data.tokenizer gpt2 --train.tokens-per-step 65536
  flashgpt plan runs/mine/config.toml --memory 24 --margin 0.2 --seconds 300
  flashgpt plan runs/mine/config.toml --cluster.memory-gib 40 --cluster.tflops 312
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typing_extensions import Doc

from flashgpt.config import GPTConfig
from flashgpt.measure.scaling_model import Cluster, Prediction, table
from flashgpt.runconfig import DataConfig, ModelConfig, RunConfig, SampleConfig, TrainConfig
from flashgpt.toml import to_toml
from flashgpt.verbs.bench import check_writable, environment
from flashgpt.verbs.parse import Flag, Valued, parse, typed, usage
from flashgpt.verbs.train import load, without_other_preset

if TYPE_CHECKING:
    from rich.console import Console

    from flashgpt.measure.plan import Missing, Result, Row, Setup

GIB, MIB = 2**30, 2**20


@dataclasses.dataclass(frozen=True)
class Args:
    """Options of `plan`."""

    out: Annotated[str, Doc("folder for plan.json, the picture and the config")] = "plan"
    seconds: Annotated[float, Doc("for all measurements; one that was begun is finished")] = 100.0
    margin: Annotated[float, Doc("share of the memory that stays free, [0, 1)")] = 0.1
    memory: Annotated[
        float | None, Doc("memory that training may take (GiB); what is free here if left out")
    ] = None
    json: Annotated[bool, Flag, Doc("print nothing but the line of JSON")] = False
    cluster: Cluster = dataclasses.field(default_factory=Cluster)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: Annotated[TrainConfig, Valued] = dataclasses.field(default_factory=TrainConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)

    @property
    def run(self) -> RunConfig:
        """The config of the run that is planned."""
        return RunConfig(self.model, self.data, self.train, self.sample)


def main(argv: Sequence[str]) -> int:
    """Runs `flashgpt plan`."""
    args = read(argv)
    from flashgpt.measure.plots_plan import draw_plan
    from flashgpt.train.checkpoint import write_json
    from flashgpt.verbs.console import console

    with usage():
        args.run.check()
        setup = _setup(args)
    folder = Path(args.out)
    check_writable(folder)
    out = None if args.json else console()
    result = _measure(setup, out)
    ahead = table(args.cluster, args.margin)
    found = _found(setup, result, args.cluster, ahead)
    written = _write_config(args.run, result, folder)
    found["config"] = None if written is None else str(written)
    draw_plan(found, folder / "plan.png", _title(found))
    write_json(folder / "plan.json", found)
    if out is not None:
        _show(out, setup, result)
        _show_ahead(out, args.cluster, ahead)
        _show_choice(out, args.run, result, written)
        out.print(f"written to {folder}: plan.json, plan.png")
    print(json.dumps(found))
    return 0


def read(argv: Sequence[str]) -> Args:
    """The options, with the TOML file that may stand first, as `train` reads them."""
    argv = list(argv)
    base = load(argv.pop(0)) if argv and not argv[0].startswith("-") else RunConfig()
    base = without_other_preset(base, argv)
    default = Args(model=base.model, data=base.data, train=base.train, sample=base.sample)
    return parse(Args, "plan", argv, __doc__, default)


def _setup(args: Args) -> Setup:
    from flashgpt.measure.memory import free_bytes
    from flashgpt.measure.plan import Setup
    from flashgpt.train.runtime import device

    if args.memory is not None and not 0 < args.memory < math.inf:
        raise ValueError(f"memory must be positive and finite (GiB), got {args.memory:g}")
    here = device(args.train.device)
    limit = free_bytes(here) if args.memory is None else round(args.memory * GIB)
    return Setup(_shape(args.run), args.train, here, limit, args.margin, args.seconds)


def _shape(run: RunConfig) -> GPTConfig:
    """The model of a run, before its text is read."""
    from flashgpt.data.prepare import expected_vocab_size
    from flashgpt.train import initial

    if run.model.init_from is not None:
        base = initial.shape(run.model.init_from)
        return run.model.resolve(base.vocab_size, base)
    return run.model.resolve(expected_vocab_size(run.data))


def _measure(setup: Setup, out: Console | None) -> Result:
    from flashgpt.measure.plan import measure
    from flashgpt.verbs.console import counting

    if out is None:
        return measure(setup)
    with counting(out) as progress:
        return measure(setup, out.print, lambda now, end: progress(now, end, "seconds"))


def _found(
    setup: Setup, result: Result, cluster: Cluster, ahead: Sequence[Prediction]
) -> dict[str, Any]:
    """The content of plan.json."""

    def plain(row: Row | Missing) -> dict[str, Any]:
        return {**dataclasses.asdict(row), "way": str(row.way), **dataclasses.asdict(row.way)}

    return {
        "environment": environment(setup.device),
        "setup": {**dataclasses.asdict(setup), "device": setup.device.type},
        "usable_bytes": setup.usable_bytes,
        "rows": [plain(row) for row in result.rows],
        "missing": [plain(row) for row in result.missing],
        "best": None if result.best is None else plain(result.best),
        "cluster": dataclasses.asdict(cluster),
        "predictions": [
            {**dataclasses.asdict(p), "memory_bytes": p.memory.total, "efficiency": p.efficiency}
            for p in ahead
        ],
    }


def _write_config(run: RunConfig, result: Result, folder: Path) -> Path | None:
    """Writes the config of the best row under a name that is free."""
    if result.best is None:
        return None
    names = itertools.chain(["run.toml"], (f"run-{i}.toml" for i in itertools.count(2)))
    path = next(folder / name for name in names if not (folder / name).exists())
    path.write_text(to_toml(_chosen(run, result.best)), encoding="utf-8", newline="\n")
    return path


def _chosen(run: RunConfig, best: Row) -> RunConfig:
    model, use_flash = run.model, best.way.use_flash
    if use_flash != (GPTConfig.use_flash if model.use_flash is None else model.use_flash):
        model = dataclasses.replace(model, use_flash=use_flash)
    train = dataclasses.replace(
        run.train,
        micro_batch=best.micro_batch,
        activation_checkpointing=best.way.activation_checkpointing,
    )
    return dataclasses.replace(run, model=model, train=train)


def _title(found: dict[str, Any]) -> str:
    cfg, where = found["setup"]["cfg"], found["environment"]
    return (
        f"{cfg['n_layers']} layers of {cfg['emb_dim']}, {cfg['context_length']} tokens\n"
        f"{where['device']}, torch {where['torch']}, {where['date']}"
    )


def _show(out: Console, setup: Setup, result: Result) -> None:
    from flashgpt.verbs.console import table as drawn

    columns = (
        *("", "micro-batch", "tokens/s", "predicted", "off", "peak MiB", "predicted", "off"),
        "fits",
    )
    rows = [_cells(row) for row in result.rows]
    rows += [_cells_of_missing(m) for m in result.missing if m.predicted_peak_bytes is not None]
    out.print(drawn("\nmeasured here, each predicted first from smaller ones", columns, rows))
    others: dict[tuple[str, str], list[str]] = {}
    for m in result.missing:
        if m.predicted_peak_bytes is None:
            others.setdefault((str(m.way), m.reason), []).append(f"{m.micro_batch}")
    for (way, reason), sizes in others.items():
        out.print(f"{way}, micro-batch {', '.join(sizes)}: {reason}")
    what = (
        "memory is what torch allocates on the GPU"
        if setup.device.type == "cuda"
        else "memory is what torch allocates; interpreter and libraries take some 0.5 GiB more"
    )
    out.print(
        f"{what}; fits: in {setup.usable_bytes / GIB:,.1f} GiB, {setup.margin:.0%} of "
        f"{setup.limit_bytes / GIB:,.1f} being left free"
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        *(str(row.way), f"{row.micro_batch}"),
        *_beside(row.tokens_per_second, row.predicted_tokens_per_second, 1),
        *_beside(row.peak_bytes, row.predicted_peak_bytes, MIB),
        "yes" if row.fits else "no",
    )


def _cells_of_missing(row: Missing) -> tuple[str, ...]:
    predicted = (row.predicted_tokens_per_second, 1), (row.predicted_peak_bytes, MIB)
    cells = [("-", "-" if x is None else f"{x / unit:,.0f}", "-") for x, unit in predicted]
    return (str(row.way), f"{row.micro_batch}", *cells[0], *cells[1], row.reason)


def _beside(measured: float, predicted: float | None, unit: float) -> tuple[str, str, str]:
    """Measured, predicted, and by how much the prediction is off."""
    if predicted is None:
        return f"{measured / unit:,.0f}", "-", "-"
    off = f"{predicted / measured - 1:+.1%}"
    return f"{measured / unit:,.0f}", f"{predicted / unit:,.0f}", off


def _show_ahead(out: Console, cluster: Cluster, ahead: Sequence[Prediction]) -> None:
    from flashgpt.verbs.console import table as drawn

    columns = (
        *("model", "engine", "GPUs", "sequences each", "GiB each", "GB sent"),
        *("step ms", "of it waiting", "tokens/s", "efficiency"),
    )
    rows = [_cells_ahead(p) for p in ahead]
    out.print(drawn("\npredicted, not measured: GPUs that are not here", columns, rows))
    out.print(
        f"assumed: {cluster.memory_gib:g} GiB and {cluster.tflops:g} TFLOP/s a GPU, of which "
        f"{cluster.utilization:.0%} is reached; {cluster.node_bandwidth:g} GB/s within "
        f"{cluster.node_gpus} GPUs, {cluster.network_bandwidth:g} GB/s beyond; bf16, compiled, "
        "use_flash on, AdamW, one micro-batch a step"
    )


def _cells_ahead(p: Prediction) -> tuple[str, ...]:
    if not p.rows:
        return (p.model, p.engine, f"{p.gpus}", "does not fit", *["-"] * 6)
    seconds = p.compute_seconds + p.exposed_seconds
    return (
        *(p.model, p.engine if p.gpus > 1 else "-", f"{p.gpus}", f"{p.rows}"),
        *(f"{p.memory.total / GIB:.1f}", f"{p.sent_bytes / 1e9:.2f}"),
        *(f"{1e3 * seconds:,.0f}", f"{1e3 * p.exposed_seconds:,.1f}"),
        *(f"{p.tokens_per_second:,.0f}", f"{p.efficiency:.1%}"),
    )


def _show_choice(out: Console, run: RunConfig, result: Result, written: Path | None) -> None:
    if result.best is None or written is None:
        out.print(
            "\nnothing that was measured fits: smaller model.context_length, more --memory, or "
            "train.tokens_per_step of fewer sequences"
        )
        return
    out.print(f"\nrecommended: {result.best.way}, micro-batch {result.best.micro_batch}")
    if len(result.rows) == 1:
        out.print("  (nothing else was measured; more --seconds compares more)")
    for line in _changes(run, _chosen(run, result.best)):
        out.print(f"  {line}")
    train = f"flashgpt train {typed(written)} --out runs/planned"
    out.print(f"written to {written}; train with it: {train}")


def _changes(before: RunConfig, after: RunConfig) -> Iterator[str]:
    """The keys that differ, with both values."""
    for section in dataclasses.fields(RunConfig):
        old, new = getattr(before, section.name), getattr(after, section.name)
        for field in dataclasses.fields(old):
            a, b = getattr(old, field.name), getattr(new, field.name)
            if a != b:
                was = "left out" if a is None else a
                yield f"{section.name}.{field.name} = {b} (was {was})"
