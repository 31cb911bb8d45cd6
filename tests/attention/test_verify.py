"""The rule that judges kernels: our kernels pass it, wrong ones fail.

pytest tests/attention/test_verify.py
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgpt.attention import standard, verify
from flashgpt.attention.kernels import KERNELS, Kernel, refusal
from flashgpt.attention.verify import Case, Error, Verdict, judge

DEVICE = torch.device("cpu")
GRID = [
    Case(64, 8, 1, 1, 16),
    Case(64, 8, 5, 5, 16, 0.1),
    Case(4, 3, 65, 65, 16),
    Case(4, 3, 129, 129, 16, 0.1),
    Case(8, 2, 33, 300, 32, 0.1),
    Case(64, 8, 1, 77, 32),
    Case(2, 2, 200, 200, 32, 0.1, documents=True),
    Case(4, 3, 65, 65, 16, dtype=torch.float16),
]
SMALL = Case(8, 2, 40, 90, 16, 0.1, documents=True)  # a chunk, dropout, documents: all at once


@pytest.mark.parametrize("case", GRID, ids=str)
def test_all_kernels_keep_the_rule(case: Case) -> None:
    verdicts = list(verify.audit([case], DEVICE))
    kernels = {name for name in KERNELS if refusal(name, case.request(DEVICE)) is None}
    fused = not case.p and not case.documents and case.queries in (1, case.keys)
    fused = fused and case.dtype != torch.float16  # a known bad case
    assert kernels == {"standard", "blocked"} | ({"sdpa:cpu"} if fused else set())
    wanted = {(kernel, tensor) for kernel in kernels for tensor in verify.TENSORS}
    assert {(v.kernel, v.tensor) for v in verdicts} == wanted
    assert [v for v in verdicts if not v.passed] == []
    assert {v.case for v in verdicts} == {str(case)}


def test_the_quick_grid_covers_every_kind_of_call() -> None:
    cases = verify.quick_cases()
    kinds = {(c.p > 0, c.documents, c.request(DEVICE).shape) for c in cases}
    for dropout in (False, True):
        assert {(dropout, False, s) for s in ("square", "single", "chunk")} <= kinds
        assert (dropout, True, "square") in kinds
    assert {c.queries for c in cases} >= {1, 5, 63, 65, 129, 257, 1023}
    assert {c.values for c in cases} == {"normal", *verify.VALUES}


def test_the_full_grid_adds_every_size_of_kernels_md() -> None:
    quick, full = set(verify.quick_cases()), set(verify.full_cases())
    assert quick < full and len(full) == len(verify.full_cases())
    assert {1, 2, 3, 16, 31, 64, 127, 128, 511, 513, 1000, 1024, 1025, 2049} <= {
        c.queries for c in full
    }
    assert {16, 32, 64, 80, 96, 128} <= {c.head_dim for c in full}
    assert {(1, 239), (113, 203), (1023, 1024)} <= {(c.queries, c.keys) for c in full}


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [("logits 120", 100, 140), ("logits -120", -140, -100), ("normal", -7, 7)],
)
def test_hard_values_are_hard(values: str, low: float, high: float) -> None:
    q, k, _, _ = verify.inputs_of(Case(4, 3, 65, 65, 16, values=values), 0, DEVICE)
    scores = q @ k.mT / 4
    assert low < scores.min() and scores.max() < high


def failures(change: str, case: Case, mutant: Callable[[str], None]) -> set[str]:
    """Tensors on which the mutant breaks the rule; the unchanged kernels keep it."""
    mutant(change)
    verdicts = list(verify.audit([case], DEVICE))
    assert all(v.passed for v in verdicts if v.kernel != "mutant")
    return {v.tensor for v in verdicts if v.kernel == "mutant" and not v.passed}


ALL = set(verify.TENSORS)
GRADIENTS = {"out", "dq", "dk", "dv"}


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ("none", set()),
        ("no scale", ALL),
        ("scale a little low", ALL),
        ("sees the next token", ALL),
        ("misses itself", ALL),
        ("mask transposed", ALL),
        ("top-left", ALL),
        ("no mask", ALL),
        ("no dropout", GRADIENTS),
        ("dropout of the next row", GRADIENTS),
        ("dropout of another layer", GRADIENTS),
        ("dropout of the top-left", GRADIENTS),
        ("dropout not rescaled", GRADIENTS),
        ("documents end late", ALL),
        ("no documents", ALL),
        ("lse in base 2", {"lse"}),
        ("lse a little low", {"lse"}),
        ("dv twice", {"dv"}),
    ],
)
def test_wrong_kernels_break_the_rule(
    change: str, broken: set[str], mutant: Callable[[str], None]
) -> None:
    assert failures(change, SMALL, mutant) == broken


@pytest.mark.parametrize("change", ["none", "no scale", "sees the next token", "lse in base 2"])
def test_wrong_kernels_break_the_rule_without_dropout_too(
    change: str, mutant: Callable[[str], None]
) -> None:
    found = failures(change, Case(32, 4, 33, 33, 16), mutant)
    assert bool(found) == (change != "none")


# ---- the rule itself


def error(largest: float, count: int = 4, floor: float = 0.0) -> Error:
    """One element errs by `largest`, the others by half of it."""
    exact = torch.zeros(count, dtype=torch.float64)
    got = torch.full((count,), largest / 2, dtype=torch.float64)
    got[0] = largest
    made = Error()
    made.add(got, exact, torch.zeros(count))
    made.floor_max, made.floor_squares = floor, count * floor**2
    return made


def test_budget_is_twice_the_maximum_and_five_quarters_of_the_rms() -> None:
    base = error(1e-3)
    assert math.isclose(base.rms, 1e-3 * math.sqrt((1 + 3 / 4) / 4))
    ok = judge("k", "c", "out", error(1.249e-3), base)
    assert ok.passed and math.isclose(ok.max_used, 1.249 / 2)
    assert not judge("k", "c", "out", error(1.251e-3), base).passed  # by its rms
    peaked = Error(2.001e-3, base.squares, base.count)
    found = judge("k", "c", "out", peaked, base)
    assert not found.passed and found.rms_used < 1  # by its maximum
    assert judge("k", "c", "out", Error(1.999e-3, base.squares, base.count), base).passed


def test_the_floor_is_two_roundings_at_three_tenths_of_the_terms() -> None:
    made = Error()
    terms = torch.tensor([1.0, -2.0], dtype=torch.float64)
    made.add(torch.zeros(2), torch.zeros(2, dtype=torch.float64), terms)
    assert math.isclose(made.floor_max, 2 * 0.3 * 2 * 2**-23)
    assert math.isclose(made.floor_rms, 0.6 * 2**-23 * math.sqrt(2.5))
    half = Error()  # computed in fp32: half precision gets no wider floor
    half.add(torch.zeros(2).half(), torch.zeros(2, dtype=torch.float64), terms)
    assert half.floor_max == made.floor_max
    exact = error(0.0, floor=1e-7)
    assert judge("k", "c", "out", error(0.99e-7), exact).passed
    assert not judge("k", "c", "out", error(1.01e-7), exact).passed
    assert not judge("k", "c", "out", error(1e-30), error(0.0)).passed
    assert judge("k", "c", "out", error(0.0), error(0.0)).passed


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_fails_even_if_standard_fails_too(bad: float) -> None:
    for first, second in ((bad, 1e-3), (bad, bad), (1e-3, bad)):
        made = Error()
        got = torch.tensor([first, second, 0.0], dtype=torch.float64)
        made.add(got, torch.zeros(3, dtype=torch.float64), torch.ones(3))
        made.add(torch.zeros(3), torch.zeros(3, dtype=torch.float64), torch.ones(3))
        assert not judge("k", "c", "out", made, error(1e-3)).passed
        assert not judge("k", "c", "out", made, made).passed


def test_errors_are_pooled_over_seeds_and_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    run = verify.run_case

    def counting(kernel: str, case: Case, seed: int, *rest: Any, **more: Any) -> dict[str, Tensor]:
        if kernel == "blocked":
            seen.append(seed)
        return run(kernel, case, seed, *rest, **more)

    monkeypatch.setattr(verify, "run_case", counting)
    list(verify.audit([Case(4, 4, 32, 32, 8)], DEVICE))
    assert seen == list(range(8))
    seen.clear()
    list(verify.audit([Case(4, 4, 25, 25, 8)], DEVICE))
    assert seen == list(range(11))  # 4,096 elements of lse, 400 a seed


def test_a_verdict_reads_well() -> None:
    assert str(Case(1, 2, 3, 5, 8, 0.1, documents=True)) == (
        "T 3 S 5 H 8 dropout 0.1 documents float32"
    )
    assert Verdict("k", "c", "out", 0.0, 0.0, 1.0, 1.0).passed
    assert not Verdict("k", "c", "out", 0.0, 0.0, 1.0, math.nan).passed


def test_a_known_excess_is_neither_passed_nor_unlimited() -> None:
    hard = Case(4, 3, 65, 65, 16, dtype=torch.bfloat16, values="one huge key")
    base, over = error(1e-3), error(2.4e-3)  # 1.92 times its rms budget

    def found(kernel: str, case: Case, tensor: str, got: Error) -> tuple[bool, bool]:
        verdict = judge(kernel, case, tensor, got, base)
        return verdict.passed, verdict.known

    assert found("sdpa:flash", hard, "dq", over) == (False, True)
    assert found("sdpa:flash", hard, "dq", base) == (True, False)
    assert found("sdpa:flash", hard, "dq", error(2.6e-3)) == (False, False)
    assert found("sdpa:flash", hard, "dk", over) == (False, False)
    assert found("blocked", hard, "dq", over) == (False, False)
    for easier in ({"dtype": torch.float32}, {"values": "normal"}):
        case = dataclasses.replace(hard, **easier)
        assert found("sdpa:flash", case, "dq", over) == (False, False)


def test_a_kernel_for_inference_alone_is_judged_without_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As cuDNN on CUDA: its forward pass counts, whatever its backward pass does."""

    def forward_only(request: Any) -> str | None:
        return "its backward is broken" if request.gradient else None

    scale = 1.0

    def attention(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        assert not q.requires_grad
        return standard.attention(q * scale, k, v, **given)[:2]

    monkeypatch.setitem(KERNELS, "mutant", Kernel("mutant", forward_only, attention))
    for passes in (True, False):
        rows = [v for v in verify.audit([SMALL], DEVICE) if v.kernel == "mutant"]
        assert [(v.tensor, v.passed) for v in rows] == [("out", passes), ("lse", passes)]
        scale = 1.001
