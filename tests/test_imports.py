"""Imports point one way, need the required dependencies only, and are lazy where that is promised.

pytest tests/test_imports.py
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "flashgpt").rglob("*.py"))
}

# What each part may know, itself apart; everything not named here may know anything but
# the verbs, the command line and the composition root.
MAY_KNOW: dict[str, set[str]] = {
    "fields": set(),
    "config": {"fields"},
    "runconfig": {"config", "fields"},
    "toml": {"fields", "runconfig"},
    "usercache": set(),
    "cudagraph": set(),
    "attention": {"usercache"},
    "model": {"attention", "config"},
    "launch": set(),
    "tokenizer": {"vocabulary"},
    "vocabulary": set(),
    "locks": set(),
    "data": {"locks", "runconfig", "tokenizer"},
    "generation": {"attention", "config", "cudagraph", "model", "runconfig", "tokenizer"},
    "interop": {"config", "model", "tokenizer"},
}
TOP = {"cli", "verbs", "orchestrator"}  # known to nobody but the verbs and each other
KNOWS_TOP = {"__main__": {"cli"}, "cli": {"verbs"}, "verbs": TOP, "orchestrator": set()}

# Imported when the first CUDA tensor comes, by nothing before.
NEED_TRITON = {
    "flashgpt.attention.triton_flash",
    "flashgpt.attention.triton_keys",
    "flashgpt.attention.triton_launch",
    "flashgpt.generation.triton_attend",
    "flashgpt.generation.triton_dot",
    "flashgpt.generation.triton_sample",
    "flashgpt.generation.triton_step",
    "flashgpt.model.gluon_mlp",
    "flashgpt.model.triton_loss",
    "flashgpt.model.triton_mlp",
}


def part(module: str) -> str:
    """The part of flashgpt that a module belongs to: `attention` of flashgpt.attention.heads."""
    return module.split(".")[1] if "." in module else "__init__"


def imported(module: str, source: str) -> Iterator[str]:
    """Modules of flashgpt that a source imports, wherever in it, type-checking blocks too."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} must import by full names"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # "flashgpt.verbs.train", as for import_module
            names = [node.value] if node.value in SOURCES else []
        yield from (name for name in names if name.split(".")[0] == "flashgpt")


def wrong_ways(module: str, source: str) -> list[str]:
    """What a module imports and must not know."""
    own = part(module)
    if own == "__init__":  # the public names, loaded when used
        return [name for name in imported(module, source) if part(name) in TOP]
    wrong = []
    for name in imported(module, source):
        other = part(name)
        if other in (own, "__init__", "__version__"):
            continue
        allowed = KNOWS_TOP.get(own, set()) if other in TOP else MAY_KNOW.get(own, {other})
        if other not in allowed:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_one_way(module: str) -> None:
    assert wrong_ways(module, SOURCES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("flashgpt.attention.heads", "from flashgpt.model.block import X", True),
        ("flashgpt.attention.heads", "import flashgpt.config", True),
        ("flashgpt.attention.heads", "def f():\n    from flashgpt import model", True),
        ("flashgpt.attention.heads", "from flashgpt.attention import dropout", False),
        ("flashgpt.model.gpt2", "from flashgpt.train.trainer import Trainer", True),
        ("flashgpt.model.gpt2", "from flashgpt.generation.cache import KVCache", True),
        ("flashgpt.model.gpt2", "from flashgpt import interop", True),
        ("flashgpt.model.gpt2", "from flashgpt.attention.heads import X", False),
        ("flashgpt.train.loop", "from flashgpt.orchestrator import build", True),
        ("flashgpt.train.loop", "from flashgpt import cli", True),
        ("flashgpt.train.loop", "from flashgpt.verbs.console import x", True),
        ("flashgpt.train.loop", "import_module('flashgpt.orchestrator')", True),
        ("flashgpt.train.loop", "from flashgpt.model.gpt2 import GPTModel", False),
        ("flashgpt.verbs.train", "from flashgpt import orchestrator", False),
        ("flashgpt.orchestrator", "from flashgpt import cli", True),
        ("flashgpt.cli", "from flashgpt import orchestrator", True),
        ("flashgpt", "from flashgpt.orchestrator import build", True),
    ],
)
def test_the_check_sees_wrong_ways(module: str, source: str, wrong: bool) -> None:
    assert bool(wrong_ways(module, source)) == wrong


def packages(requirements: list[str]) -> set[str]:
    """Import names of requirements; our dependencies are all imported by the name they have."""
    names = (re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0] for line in requirements)
    return {name.replace("-", "_") for name in names}


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def python(code: str) -> str:
    """Output of a fresh interpreter."""
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_every_module_imports_with_the_required_dependencies_only() -> None:
    required = packages(project()["dependencies"])
    assert {"torch", "numpy", "tyro", "rich"} <= required
    extras = [line for extra in project()["optional-dependencies"].values() for line in extra]
    absent = packages(extras) - required
    assert {"pytest", "transformers", "triton", "pyarrow"} <= absent
    code = f"""
import importlib, importlib.machinery, json, sys
absent = set({sorted(absent)!r})
class Installed(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in absent else super().find_spec(name, path, target)
sys.meta_path = [
    Installed if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path
]
for name in {sorted(SOURCES.keys() - NEED_TRITON)!r}:
    if not name.endswith("__main__"):
        importlib.import_module(name)
tops = sorted({{name.split(".")[0] for name in sys.modules}} & absent)
print(json.dumps(tops))
"""
    assert json.loads(python(code)) == []


HEAVY = ("torch", "numpy", "matplotlib", "tokenizers", "tyro", "rich", "huggingface_hub")


@pytest.mark.parametrize("module", ["flashgpt", "flashgpt.config", "flashgpt.cli"])
def test_what_must_start_quickly_imports_nothing_heavy(module: str) -> None:
    code = f"import {module}, json, sys; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(python(code)))
    assert module in loaded
    assert [name for name in HEAVY if name in loaded] == []


def test_the_public_names_are_found_when_used() -> None:
    import flashgpt

    for name in flashgpt.__all__:
        assert getattr(flashgpt, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'GPTModle'"):
        flashgpt.GPTModle  # noqa: B018
