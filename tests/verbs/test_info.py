"""`flashgpt info`. pytest tests/verbs/test_info.py"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flashgpt import __version__, half_on_cpu
from flashgpt.attention.kernels import KERNELS

Cli = Callable[..., Any]


def test_the_machine(cli: Cli) -> None:
    lines = cli("info").done().splitlines()
    assert f"flashgpt {__version__}" in lines and f"torch {torch.__version__}" in lines
    assert f"CPU threads: {torch.get_num_threads()}" in lines
    for name in KERNELS:
        shown = [line.split(maxsplit=1)[1] for line in lines if line.startswith(f"  {name} ")]
        assert len(shown) == 2  # without and with dropout
        assert all(answer == "runs" or answer.startswith("no: ") for answer in shown), shown
    if not torch.cuda.is_available():
        chosen = [line.strip() for line in lines if "chosen: " in line]
        assert chosen == [f"chosen: {name} (built-in order)" for name in ("sdpa:cpu", "blocked")]
        assert "GPU: none that torch can use" in lines
        assert any("sdpa:flash" in line and "no: " in line for line in lines)


@pytest.mark.parametrize(
    ("reason", "told"), [(None, "runs"), ("it ends the process", "no: it ends the process")]
)
def test_whether_the_cpu_trains_in_bf16(
    reason: str | None, told: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine trains on CUDA")
    monkeypatch.setattr(half_on_cpu, "refusal", lambda: reason)
    assert f"train.precision bf16: {told}" in cli("info").done().splitlines()


@pytest.mark.parametrize("package", ["triton", "pytest", "no-such-package"])
def test_triton_is_named_as_it_is_installed(
    package: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is installed here: another package stands in for it."""
    version = importlib.metadata.version
    stands_for = {"triton": package}
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version(stands_for.get(name, name))
    )
    installed = importlib.util.find_spec(package) is not None
    told = f"triton {version(package) if installed else '(none)'}"
    assert told in cli("info").done().splitlines()


def test_a_run(copied: Any, cli: Cli, flip: Callable[[Path, int], None]) -> None:
    damaged = copied.checkpoints[1] / "model.safetensors"
    flip(damaged, 5000)
    lines = cli("info", copied.folder).done().splitlines()
    assert "last checkpoint: step_00000012" in lines
    assert any(line.startswith("best checkpoint: step_00000012 (validation loss") for line in lines)
    assert "  step_00000012: digests match" in lines
    assert f"  {damaged} is damaged: its digest does not match" in lines
    assert any(" served " in line for line in lines)


@pytest.mark.parametrize("content", ["{}", "[]", "{"])
def test_a_damaged_state_is_named(copied: Any, cli: Cli, content: str) -> None:
    (copied.folder / "state.json").write_text(content)
    assert "state.json" in cli("info", copied.folder).error(1)
