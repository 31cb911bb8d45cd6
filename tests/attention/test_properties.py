"""What holds of a kernel exactly, and that a fault in it shows.

pytest tests/attention/test_properties.py
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgpt.attention import properties, standard, verify
from flashgpt.attention.kernels import KERNELS, Kernel, refusal
from flashgpt.attention.verify import Case

CPU = torch.device("cpu")
Mutant = Callable[[str], None]
MASKS = [Case(2, 3, 65, 65, 16, 0.1), Case(1, 2, 33, 70, 16, 0.1)]


@pytest.mark.parametrize("case", MASKS, ids=str)
def test_dropout_masks_are_compared_bit_for_bit(case: Case, mutant: Mutant) -> None:
    assert properties.masks_equal(case, CPU) == {"standard": True, "blocked": True}
    changes = ["no dropout", "dropout of the next row", "dropout of another layer"]
    changes += ["dropout of the top-left"] if case.queries < case.keys else []
    for change in ("none", *changes):
        mutant(change)
        assert properties.masks_equal(case, CPU)["mutant"] == (change == "none")


@pytest.mark.parametrize("case", [Case(1, 2, 130, 130, 16), Case(1, 2, 33, 50, 16)], ids=str)
def test_causality_is_seen(case: Case, mutant: Mutant) -> None:
    for kernel, entry in KERNELS.items():
        if entry.supports(case.request(CPU)) is None:
            assert properties.is_causal(kernel, case, CPU), kernel
    for change in ("none", "sees the next token", "no mask"):
        mutant(change)
        assert properties.is_causal("mutant", case, CPU) == (change == "none")


def put(monkeypatch: pytest.MonkeyPatch, attention: Callable[..., Any]) -> None:
    monkeypatch.setitem(KERNELS, "mutant", Kernel("mutant", lambda _: None, attention))


def test_a_kernel_that_looks_at_nothing_is_not_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, lambda q, k, v, **_: (q, q[..., 0]))
    assert not properties.is_causal("mutant", Case(1, 2, 33, 33, 16), CPU)


@pytest.mark.parametrize("where", ["nowhere", "out", "lse", "gradient"])
def test_results_that_do_not_repeat_are_seen(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def wavering(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        out, lse, _ = standard.attention(q, k, v, **given)
        off = 1e-6 * next(calls)
        if where == "out":
            out = out + off
        elif where == "lse":
            lse = lse + off
        elif where == "gradient":
            out = out + off * (v - v.detach())
        return out, lse

    put(monkeypatch, wavering)
    case = Case(1, 2, 33, 33, 16, 0.1)
    assert properties.repeats("mutant", case, CPU, 3) == (where == "nowhere")
    for name in KERNELS:
        if name != "mutant" and refusal(name, case.request(CPU)) is None:
            assert properties.repeats(name, case, CPU, 3)


def test_every_kernel_and_the_definition_reach_the_closed_forms() -> None:
    verdicts = list(properties.closed_forms(CPU, torch.float32))
    assert {v.kernel for v in verdicts} == {"definition", "standard", "blocked", "sdpa:cpu"}
    assert {v.tensor for v in verdicts} == {"out", "lse", "dq"}
    assert {v.case.split("dropout 0 ")[1] for v in verdicts} == {
        f"same keys {level} float32" for level in (1, 120, -120)
    }
    assert [v for v in verdicts if not v.passed] == []


@pytest.fixture
def one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed forms on one seed, of what is broken here alone."""
    monkeypatch.setattr(verify, "MIN_SEEDS", 1)
    kept = ("standard", "mutant")
    monkeypatch.setattr(properties, "refusal", lambda name, _: None if name in kept else "whole")


@pytest.mark.usefixtures("one_seed")
@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ("none", set()),
        ("no scale", {"lse"}),  # equal scores stay equal
        ("sees the next token", {"out", "lse"}),
        ("misses itself", {"out", "lse"}),
        ("top-left", {"out", "lse"}),
        ("lse a little low", {"lse"}),
    ],
)
def test_closed_forms_tell_faults_apart(change: str, broken: set[str], mutant: Mutant) -> None:
    mutant(change)
    verdicts = [v for v in properties.closed_forms(CPU, torch.float32) if v.kernel == "mutant"]
    assert {v.tensor for v in verdicts if not v.passed} == broken


@pytest.mark.usefixtures("one_seed")
@pytest.mark.parametrize("fault", ["mask", "scale"])
def test_a_fault_in_the_definition_itself_is_seen(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged against standard attention alone, every kernel that shares its fault would pass."""
    attention = standard.attention

    def wrong(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor, Tensor]:
        if fault == "mask":
            given["mask_TS"] = standard.causal_mask(q.shape[2], k.shape[2], q.device).roll(1, 1)
            given["mask_TS"][:, 0] = True
        return attention(q * (2 if fault == "scale" else 1), k, v, **given)

    monkeypatch.setattr(standard, "attention", wrong)
    entry = dataclasses.replace(KERNELS["standard"], attention=wrong)
    monkeypatch.setitem(KERNELS, "standard", entry)
    verdicts = list(properties.closed_forms(CPU, torch.float32))
    assert not all(v.passed for v in verdicts if v.kernel == "definition")
