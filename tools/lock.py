"""Renews constraints.txt from a fresh install of every extra but fa4: `make lock`.

    python3 tools/lock.py [--torch-index=URL]

The install goes into a temporary environment (up to 4 GB); constraints.txt is replaced only when it
succeeded. Standard library only, like setup_venv.py, whose pip and messages it shares.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import setup_venv

# Raised by hand, and together: torch on PyPI requires exactly one triton on Linux, a CPU build of
# torch (whose metadata a lock may see) names none. triton's interpreter lags behind numpy.
BOUNDS = ("torch==2.13.0", "triton==3.7.1", "numpy<2.4")
HEADER = """\
# The versions that every install of flashgpt uses; `make lock` renews this file.
# No local tags: torch==X also accepts X+cpu or X+cu126. Left out: flash-attn-4, and the CUDA
# libraries of torch, which torch pins itself. torch fixes triton: raise the two together.
"""
# Shipped with the interpreter, ours, or chosen by torch for its platform.
NOT_LOCKED = re.compile(r"(pip|wheel|flashgpt|flash-attn.*|nvidia-.*|cuda-.*)$", re.IGNORECASE)


def resolve(torch_index: str) -> "dict[str, str]":
    """Install everything into a temporary environment; package -> version of what came."""
    log = Path(tempfile.gettempdir()) / "flashgpt-lock-pip.log"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.check_call([sys.executable, "-m", "venv", folder])
        python = Path(folder) / "bin" / "python"
        if torch_index:
            torch = [BOUNDS[0], "--index-url", torch_index]
            setup_venv.pip_install(python, log, torch, f"torch from {torch_index}")
        everything = [*BOUNDS, "-e", ".[dev,hub,notebook]"]
        setup_venv.pip_install(python, log, everything, "all extras")
        frozen = subprocess.check_output([python, "-m", "pip", "freeze", "--all"], text=True)
    return pins(frozen)


def pins(frozen: str) -> "dict[str, str]":
    """What constraints.txt holds of `pip freeze` output: no local tags, paths or own packages."""
    found = re.findall(r"(?m)^([A-Za-z0-9._-]+)==([^\s+]+)", frozen)
    return {name: version for name, version in found if not NOT_LOCKED.match(name)}


def main() -> int:
    """Resolve, write, and say what changed."""
    parser = argparse.ArgumentParser(description="Renew constraints.txt.")
    parser.add_argument("--torch-index", default="", help="package index for torch alone")
    options = parser.parse_args()
    try:
        setup_venv.check_interpreter()
        setup_venv.say(f"all extras into a temporary environment, {', '.join(BOUNDS)}")
        after = resolve(options.torch_index)
    except setup_venv.SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    before = setup_venv.pins() if setup_venv.CONSTRAINTS.exists() else {}
    lines = [f"{name}=={after[name]}\n" for name in sorted(after, key=str.lower)]
    setup_venv.replace(setup_venv.CONSTRAINTS, HEADER + "".join(lines))
    changed = len(set(before.items()) ^ set(after.items()))
    setup_venv.say(f"constraints.txt: {len(after)} pins, {changed} lines changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
