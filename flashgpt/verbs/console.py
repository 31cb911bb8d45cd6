"""What a person sees while a command works: bars in a terminal, plain lines in a pipe."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from flashgpt.train.evaluate import Evaluation
from flashgpt.train.loop import Listener

PIPE_COLUMNS = 120
PLAIN_SECONDS = 5.0  # a pipe gets a line this often, and the last one


def console(stderr: bool = False, quiet: bool = False) -> Console:
    """Standard output, or standard error, as rich draws on it; or nothing."""
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else PIPE_COLUMNS
    # Names of files are no markup, and a command to copy stays in one line.
    return Console(
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
        width=width,
        stderr=stderr,
        quiet=quiet,
    )


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table; the first column is left-aligned, the others right."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left")
    for row in rows:
        made.add_row(*row)
    return made


@contextlib.contextmanager
def counting(out: Console) -> Iterator[Callable[[int, int, str], None]]:
    """Yields progress(done, total, phase), shown as one bar per phase."""
    with _bar(out) as bar:
        tasks: dict[str, Any] = {}

        def progress(done: int, total: int, phase: str) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total, note="")
                if not out.is_terminal:
                    out.print(f"{phase} ...")
            bar.update(tasks[phase], completed=done, total=total)

        yield progress


@contextlib.contextmanager
def training(out: Console, first: int, last: int) -> Iterator[Listener]:
    """Yields a Listener that shows steps `first` to `last` of a run."""
    with _bar(out) as bar:
        task = bar.add_task("training", total=last, completed=first, note="")
        shown = time.monotonic()

        def step(entry: dict[str, Any]) -> None:
            nonlocal shown
            note = (
                f"loss {entry['loss']:.3f}  lr {entry['lr']:.2e}  "
                f"{entry['tokens_per_second']:,.0f} tokens/s"
            )
            bar.update(task, completed=entry["step"], note=note)
            now = time.monotonic()
            due = now - shown >= PLAIN_SECONDS or entry["step"] in (first + 1, last)
            if due and not out.is_terminal:
                shown = now
                out.print(f"step {entry['step']}/{last}  {note}")

        def evaluation(step: int, found: Evaluation) -> None:
            out.print(
                f"step {step}: validation loss {found.loss:.3f}, perplexity "
                f"{found.perplexity:,.1f}, {found.bits_per_byte:.3f} bits per byte"
            )

        def sample(piece: str) -> None:
            bar.stop()  # a stream of text and a live bar do not share a line
            out.print(piece, end="")

        def note(text: str) -> None:
            out.print(text)

        yield Listener(step, evaluation, note, sample)
        out.print()


def _bar(out: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:10}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=out,
        disable=not out.is_terminal,
    )
