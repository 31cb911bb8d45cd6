"""`flashgpt verify`: passes here, and fails when a kernel is broken.

What is run is cut down; tests/attention judges every kernel on more.
pytest tests/verbs/test_verify.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashgpt import half_on_cpu, orchestrator
from flashgpt.attention import kernels

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def _small(short_audit: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator, "verification", lambda: ["PyTorch version: x"])


def test_it_passes_and_says_what_it_did(cli: Cli, tiny: None) -> None:
    shown = cli("verify").done()
    lines = shown.splitlines()
    assert lines[0] == "PyTorch version: x"
    assert lines[1].strip() == "errors against float64"
    rows = [line.split() for line in lines if line.rstrip().endswith("ok") and "%" in line]
    assert {"blocked", "sdpa:cpu", "use_flash=True"} <= {row[0] for row in rows}
    assert {"out", "dq", "dk", "dv", "lse", "logits", "loss", "gradients"} == {r[1] for r in rows}
    assert "FAILED" not in shown
    assert lines[-1].startswith("verdict: identical within the rule (")
    for check in ("dropout masks equal", "no output depends on a later", "greedy tokens equal"):
        assert any(line.startswith(check) for line in lines)


@pytest.mark.parametrize("name", ["blocked", "sdpa:cpu"])
def test_a_broken_kernel_fails(
    trained: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A scale that is off by a thousandth."""
    kernel = kernels.KERNELS[name]

    def broken(q: Any, *rest: Any, **options: Any) -> Any:
        return kernel.attention(q * 1.001, *rest, **options)

    monkeypatch.setitem(kernels.KERNELS, name, dataclasses.replace(kernel, attention=broken))
    ran = cli("verify", "--checkpoint", trained.folder)
    assert ran.status == 1 and ran.err == ""
    assert ran.out.splitlines()[-1].startswith("verdict: FAILED (")
    failed = [line.split()[0] for line in ran.out.splitlines() if line.rstrip().endswith("FAILED")]
    assert name in failed and set(failed) <= {name, "use_flash=True"}


def test_a_damaged_checkpoint_is_refused_before_anything_is_measured(
    copied: Any, cli: Cli, flip: Any
) -> None:
    for path in copied.checkpoints:
        flip(path / "model.safetensors", 5000)
    ran = cli("verify", "--checkpoint", copied.folder)
    assert "has no good checkpoint" in ran.error(1) and ran.out == ""


def test_one_precision_is_audited_alone(trained: Any, cli: Cli) -> None:
    shown = cli("verify", "--checkpoint", trained.folder, "--dtype", "fp16").done()
    audited = [line for line in shown.splitlines() if line.split()[:2] == ["blocked", "out"]]
    assert audited and all("float16" in line for line in audited)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has bf16")
def test_bf16_is_audited_on_a_cpu_that_is_made_for_it(
    trained: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = half_on_cpu.refusal()
    if reason is None:
        shown = cli("verify", "--checkpoint", trained.folder, "--dtype", "bf16").done()
        audited = [line for line in shown.splitlines() if line.split()[:2] == ["blocked", "out"]]
        assert audited and all("bfloat16" in line for line in audited)
    monkeypatch.setattr(half_on_cpu, "refusal", lambda: "it ends the process")
    ran = cli("verify", "--dtype", "bf16")
    assert ran.status == 2 and ran.out == "" and "use fp16" in ran.err
