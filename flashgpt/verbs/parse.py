"""Command lines to dataclasses, by tyro; one line for what is wrong.

`Flag` marks a bool that is a bare flag, `Valued` a section whose bools take a value, `Positional`
what stands without an option's name, `OmitPrefix` a section whose options stand without its name,
`Repeatable` one whose lists take an option for each entry.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import shlex
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from flashgpt.cli import UsageError

T = TypeVar("T")
Flag: Any = tyro.conf.FlagCreatePairsOff
Valued: Any = tyro.conf.FlagConversionOff
Positional: Any = tyro.conf.Positional
Repeatable: Any = tyro.conf.UseAppendAction
OmitPrefix: Any = tyro.conf.arg(name="")


def typed(path: Path) -> str:
    """A path as one types it in a shell."""
    return shlex.quote(str(path))


def parse(
    kind: type[T], verb: str, argv: Sequence[str], module_doc: str | None, default: T | None = None
) -> T:
    """Reads `argv` into a `kind`.

    Args:
        module_doc: what `--help` shows above the options: purpose and examples.
        default: values of options that are not given.

    Raises:
        UsageError: an unknown option (the nearest one is suggested), a wrong or missing value.
        SystemExit: after `--help`.
    """
    known = set(_options(kind, ""))
    for argument in argv:
        name = argument.split("=")[0].replace("_", "-")
        if not argument.startswith("--") or argument == "--" or name in known | {"--help"}:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see flashgpt {verb} --help"
        raise UsageError(f"flashgpt {verb} has no option {argument.split('=')[0]}; {hint}")
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown), usage():
            found: T = tyro.cli(  # type: ignore[assignment]  # None stands for no default
                kind,
                prog=f"flashgpt {verb}",
                description=module_doc or "",
                args=list(argv),
                default=default,
            )
    except SystemExit as end:
        if end.code in (None, 0):
            raise
        reason = _unboxed(shown.getvalue()).rstrip(".")
        raise UsageError(f"{reason}; see flashgpt {verb} --help") from end
    return found


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """What a config refuses while this is entered is wrong usage."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def _unboxed(shown: str) -> str:
    """The first paragraph of the box in which tyro shows an error, in one line."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", row).strip(" \u2502") for row in shown.splitlines()]
    paragraphs: list[list[str]] = [[]]
    for row in filter(None, rows):
        if set(row) <= {"\u2500", "-"}:
            paragraphs.append([])
        elif row[0] not in "\u256d\u2570":
            paragraphs[-1].append(row)
    # Where the output is not UTF-8 there is no frame, and the title stands above the first rule.
    at = 0 if "\u256d" in shown else min(1, len(paragraphs) - 1)
    return " ".join(" ".join(paragraphs[at]).split())


def _options(kind: type, prefix: str) -> list[str]:
    """Names of all options of a dataclass, nested ones with their path."""
    names = []
    plain, marked = (typing.get_type_hints(kind, include_extras=x) for x in (False, True))
    for field in dataclasses.fields(kind):
        path = f"{prefix}{field.name.replace('_', '-')}"
        if not dataclasses.is_dataclass(inner := plain[field.name]):
            names.append(f"--{path}")
            continue
        marks = getattr(marked[field.name], "__metadata__", ())
        inner_prefix = "" if OmitPrefix in marks else f"{path}."
        names += _options(typing.cast(type, inner), inner_prefix)
    return names
