"""PyTorch's fused kernels: which calls each takes, why not the others, and what really runs.

pytest tests/attention/test_sdpa.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashgpt.attention import sdpa
from flashgpt.attention.attend import attend
from flashgpt.attention.request import Request

CPU = Request("cpu", torch.float32, 64, 64, "square", False, False, True, False)
CUDA = dataclasses.replace(CPU, device="cuda", dtype=torch.bfloat16)
SUPPORTS = {
    "cpu": sdpa.supports_cpu,
    "flash": sdpa.supports_flash,
    "efficient": sdpa.supports_efficient,
    "cudnn": sdpa.supports_cudnn,
}
ON_CUDA = ("flash", "efficient", "cudnn")


@pytest.mark.parametrize("kernel", SUPPORTS)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"shape": "chunk"}, "top-left"),
        ({"dropout": True}, "dropout"),
        ({"documents": True}, "document"),
    ],
)
def test_what_all_of_them_take(kernel: str, change: dict[str, Any], reason: str | None) -> None:
    request = dataclasses.replace(CPU if kernel == "cpu" else CUDA, **change)
    found = SUPPORTS[kernel](request)
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.parametrize(
    ("kernel", "change", "reason"),
    [
        ("cpu", {"device": "cuda"}, "runs on the CPU, data is on cuda"),
        *((kernel, {"device": "cpu"}, "runs on CUDA, data is on cpu") for kernel in ON_CUDA),
        ("flash", {"dtype": torch.float32}, "has no float32"),
        ("cudnn", {"dtype": torch.float32}, "has no float32"),
        ("efficient", {"dtype": torch.float32}, None),
        *((kernel, {"dtype": torch.float64}, "has no float64") for kernel in ON_CUDA),
        *((kernel, {"head_dim": 60}, "divisible by 8") for kernel in ON_CUDA),
        ("cudnn", {"head_dim": 136}, "<= 128, got 136"),
        ("flash", {"head_dim": 136}, None),
        ("flash", {"head_dim": 264}, "<= 256, got 264"),
        ("efficient", {"head_dim": 264}, "<= 256, got 264"),
        *((kernel, {"deterministic": True}, "its backward") for kernel in ON_CUDA),
        *((kernel, {"deterministic": True, "gradient": False}, None) for kernel in ON_CUDA),
        ("cpu", {"deterministic": True}, None),
        *((kernel, {"shape": "single"}, None) for kernel in ("cpu", "flash", "efficient")),
        ("cudnn", {"shape": "single"}, "single query and key"),
    ],
)
def test_what_each_takes(kernel: str, change: dict[str, Any], reason: str | None) -> None:
    request = dataclasses.replace(CPU if kernel == "cpu" else CUDA, **change)
    found = SUPPORTS[kernel](request)
    assert found is None if reason is None else found is not None and reason in found


def test_why_chunks_are_refused(oracle: Callable[..., Any]) -> None:
    """PyTorch's operator aligns the causal mask top-left; if that ever changes, take chunks."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 3, 8, generator=generator)
    k, v = torch.randn(2, 1, 1, 7, 8, generator=generator)
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    square = oracle(q, k[:, :, :3], v[:, :, :3], q)
    square.check({"out": out})


@pytest.mark.parametrize("queries", [1, 9])
def test_one_operator_runs_and_its_backward(queries: int, recorder: type[Any]) -> None:
    q = torch.randn(2, 2, queries, 8, requires_grad=True)
    k, v = (torch.randn(2, 2, 9, 8, requires_grad=True) for _ in range(2))
    with recorder() as seen:
        attend(q, k, v, kernel="sdpa:cpu").sum().backward()
    name = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert [op for op in seen.ops if "attention" in op] == [name, name + "_backward"]
    assert not [op for op in seen.ops if "softmax" in op or "bmm" in op]


def test_memory_stays_linear_in_length(recorder: type[Any]) -> None:
    qkv = [torch.randn(1, 2, 1024, 8, requires_grad=True) for _ in range(3)]
    with recorder() as seen:
        attend(*qkv, kernel="sdpa:cpu").sum().backward()
    assert seen.largest == 2 * 1024 * 8
