"""The choice of a kernel, its reasons, and its receipt. pytest tests/attention/test_kernels.py"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from flashgpt.attention import kernels
from flashgpt.attention.attend import attend
from flashgpt.attention.kernels import KERNELS, choose
from flashgpt.attention.request import T_BUCKETS, Request, bucket, shape_of

CPU = Request("cpu", torch.float32, 64, 64, "square", False, False, True, False)
CUDA = dataclasses.replace(CPU, device="cuda", dtype=torch.bfloat16, t_bucket=1024)
NAN = "(github.com/pytorch/pytorch/issues/196678)"


@pytest.fixture(autouse=True)
def _clean_receipt() -> Iterator[None]:
    kernels.clear_receipt()
    yield
    kernels.clear_receipt()


@pytest.mark.parametrize(
    ("request_", "kernel"),
    [
        (CPU, "sdpa:cpu"),
        (dataclasses.replace(CPU, dtype=torch.float64), "sdpa:cpu"),
        (dataclasses.replace(CPU, shape="single"), "sdpa:cpu"),
        (dataclasses.replace(CPU, deterministic=True), "sdpa:cpu"),
        (dataclasses.replace(CPU, shape="chunk"), "blocked"),
        (dataclasses.replace(CPU, dropout=True), "blocked"),
        (dataclasses.replace(CPU, documents=True), "blocked"),
        (CUDA, "triton"),
        (dataclasses.replace(CUDA, shape="single"), "sdpa:flash"),
        (dataclasses.replace(CUDA, gradient=False), "sdpa:cudnn"),
        (dataclasses.replace(CUDA, gradient=False, head_dim=136), "sdpa:flash"),
        (dataclasses.replace(CPU, dtype=torch.float16), "blocked"),
        (dataclasses.replace(CPU, dtype=torch.bfloat16), "blocked"),
        (dataclasses.replace(CUDA, dtype=torch.float32), "triton"),
        (dataclasses.replace(CUDA, dtype=torch.float64), "blocked"),
        (dataclasses.replace(CUDA, head_dim=60), "blocked"),
        (dataclasses.replace(CUDA, deterministic=True), "triton"),
        (dataclasses.replace(CUDA, deterministic=True, gradient=False), "sdpa:cudnn"),
        (dataclasses.replace(CUDA, dropout=True), "triton"),
        (dataclasses.replace(CUDA, shape="chunk"), "triton"),
        (dataclasses.replace(CUDA, documents=True), "triton"),
        (dataclasses.replace(CUDA, shape="single", dropout=True), "blocked"),
        (dataclasses.replace(CPU, device="mps"), "blocked"),
    ],
)
def test_choice_per_kind_of_call(request_: Request, kernel: str) -> None:
    choice = choose(request_)
    assert choice.kernel == kernel
    order = kernels.fastest(request_)
    passed_over = order[: order.index(kernel)]
    assert [name for name, _ in choice.refused] == list(passed_over)
    assert all(reason for _, reason in choice.refused)


def test_a_known_bad_case_is_passed_over_and_says_why() -> None:
    assert dict(choose(CUDA).refused)["sdpa:cudnn"].endswith(NAN)
    half = dataclasses.replace(CPU, dtype=torch.float16)
    assert KERNELS["sdpa:cpu"].supports(half) is None
    ((kernel, reason),) = choose(half).refused
    assert kernel == "sdpa:cpu" and "fp16" in reason
    assert choose(CUDA) is choose(dataclasses.replace(CUDA))  # decided once


def test_what_the_audit_found_over_budget_is_refused() -> None:
    for name, change, part in (
        ("fa4", {"head_dim": 16}, "H 64 alone"),
        ("sdpa:flash", {"t_bucket": 64}, "T 2"),
        ("sdpa:efficient", {"t_bucket": 64}, "T 2 and 3"),
        ("sdpa:efficient", {"dtype": torch.float32}, "fp32"),
    ):
        conditions = [why for bad, why in kernels.KNOWN_BAD[name] if bad(CUDA)]
        assert conditions == [], "the usual call is served"
        changed = dataclasses.replace(dataclasses.replace(CUDA, t_bucket=1024), **change)
        (why,) = [why for bad, why in kernels.KNOWN_BAD[name] if bad(changed)]
        assert part in why


def test_every_kernel_of_the_order_is_in_the_table() -> None:
    assert all(name in KERNELS for order in kernels.FASTEST.values() for name in order)
    assert all(order[-1] == "blocked" for order in kernels.FASTEST.values())
    assert all(name in KERNELS for name in kernels.KNOWN_BAD)
    assert all(name == kernel.name for name, kernel in KERNELS.items())


def test_requests_are_few() -> None:
    assert [bucket(t) for t in (1, 2, 64, 65, 1024, 1025, 10**6)] == [
        1,
        64,
        64,
        128,
        1024,
        2048,
        T_BUCKETS[-1],
    ]
    shapes = [shape_of(*sizes) for sizes in ((1, 1), (1, 9), (9, 9), (4, 9))]
    assert shapes == ["single", "single", "square", "chunk"]


OPERATORS = {
    "standard": "aten::_softmax",
    "blocked": "flashgpt::blocked",
    "sdpa:cpu": "aten::_scaled_dot_product_flash_attention_for_cpu",
}


@pytest.mark.parametrize(
    ("kernel", "sizes", "options"),
    [
        ("sdpa:cpu", (9, 9), {}),
        ("sdpa:cpu", (1, 9), {}),
        ("blocked", (4, 9), {}),
        ("blocked", (9, 9), {"dropout": True}),
        ("blocked", (9, 9), {"documents": True}),
        ("blocked", (9, 9), {"kernel": "blocked"}),
        ("standard", (9, 9), {"use_flash": False}),
        ("standard", (9, 9), {"use_flash": False, "kernel": "standard", "dropout": True}),
        ("standard", (9, 9), {"kernel": "standard"}),
        ("standard", (9, 9), {"return_weights": True}),
    ],
)
def test_the_receipt_names_what_really_ran(
    kernel: str,
    sizes: tuple[int, int],
    options: dict[str, Any],
    recorder: type[Any],
    law: Callable[..., Any],
) -> None:
    queries, keys = sizes
    options = dict(options)
    dropout = law(0.1, 0, 0, 0).dropout if options.pop("dropout", False) else None
    documents = torch.zeros(2, keys, dtype=torch.int64) if options.pop("documents", False) else None
    q = torch.randn(2, 2, queries, 8, requires_grad=True)
    k, v = torch.randn(2, 2, 2, keys, 8)
    with recorder() as seen:
        attend(q, k, v, dropout=dropout, documents_BT=documents, **options)
    ran = {name for name, operator in OPERATORS.items() if operator in seen.ops}
    assert ran == {kernel}
    (line,) = kernels.receipt()
    assert line.startswith(f"{kernel} served cpu, float32, H 8, T <= {bucket(queries)}, ")


def test_receipt_has_a_line_per_kind_of_call_with_the_reasons(law: Callable[..., Any]) -> None:
    q = torch.randn(1, 1, 9, 8)
    dropout = law(0.1, 0, 0, 0).dropout
    for _ in range(3):
        attend(q, q, q)
        attend(q, q, q, dropout=dropout)
        attend(q, q, q, kernel="blocked")
    assert kernels.receipt() == [
        "sdpa:cpu served cpu, float32, H 8, T <= 64, square",
        "blocked served cpu, float32, H 8, T <= 64, square, dropout "
        "(not sdpa:cpu: PyTorch's kernels cannot draw the shared dropout mask)",
        "blocked served cpu, float32, H 8, T <= 64, square (not others: blocked was asked for)",
    ]
    q.requires_grad_()
    kernels.clear_receipt()
    attend(q, q, q, deterministic=True)
    with torch.no_grad():
        attend(q, q, q)
    first, second = kernels.receipt()
    assert first.endswith("square, gradient, deterministic")
    assert second.endswith("square")


@pytest.mark.parametrize(
    ("kernel", "sizes", "options", "message"),
    [
        ("fa5", (9, 9), {}, r"kernel must be one of standard, blocked, sdpa:cpu.*got 'fa5'"),
        ("sdpa:cpu", (4, 9), {}, r"'sdpa:cpu' cannot serve this call \(cpu.*chunk\).*top-left"),
        ("sdpa:cpu", (9, 9), {"dropout": True}, r"cannot draw the shared dropout mask"),
        ("sdpa:flash", (9, 9), {}, r"'sdpa:flash' cannot serve.*runs on CUDA, data is on cpu"),
    ],
)
def test_a_pinned_kernel_that_cannot_serve_raises_with_the_reason(
    kernel: str,
    sizes: tuple[int, int],
    options: dict[str, Any],
    message: str,
    law: Callable[..., Any],
) -> None:
    dropout = law(0.1, 0, 0, 0).dropout if options else None
    q, k = torch.randn(1, 1, sizes[0], 8), torch.randn(1, 1, sizes[1], 8)
    with pytest.raises(ValueError, match=message):
        attend(q, k, k, kernel=kernel, dropout=dropout)
    assert kernels.receipt() == []
