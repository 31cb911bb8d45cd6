"""The pages of the docs, and the raw data beside the benchmarks."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def prose(page: str) -> str:
    """A page in one line, from the project's root."""
    return " ".join((ROOT / page).read_text().split())


def table(page: str, heading: str) -> list[list[str]]:
    """The lines of the first table below a heading, without its head."""
    part = (ROOT / "docs" / page).read_text().split(heading)[1]
    lines = part[part.index("|") :].split("\n\n")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def raw(path: str) -> Any:
    return json.loads((ROOT / "benchmarks" / path).read_text())


def error_of_mean(values: list[float]) -> float:
    return float(statistics.stdev(values) / len(values) ** 0.5)
