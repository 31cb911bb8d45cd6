"""Our Triton kernels as an operator: how PyTorch sees it, what it serves, what it keeps.

On the CPU, where blocked attention stands in for the kernels (test_triton_flash.py has those).
pytest tests/attention/test_triton_op.py
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flashgpt.attention import tiles, triton_op
from flashgpt.attention.attend import attend, attend_packed
from flashgpt.attention.dropout import Dropout, attention_keys
from flashgpt.attention.request import Request

DTYPES = [torch.float32, torch.float16]
CUDA = Request("cuda", torch.bfloat16, 64, 64, "square", False, False, True, False)


def packed(dtype: torch.dtype = torch.float32) -> Tensor:
    """qkv_BT3NH, which needs a gradient."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 9, 3, 2, 16, generator=generator).to(dtype).requires_grad_()


def three(qkv: Tensor) -> list[Tensor]:
    """The same as q, k and v, each a leaf with a memory of its own."""
    parts = qkv.detach().permute(2, 0, 3, 1, 4)
    return [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in parts]


def options(full: bool) -> dict[str, Any]:
    """No masks, or dropout and documents."""
    if not full:
        return {"dropout": None, "documents_BS": None}
    draw = Dropout(0.3, torch.tensor(3), torch.tensor(1), layer=2)
    return {"dropout": draw, "documents_BS": torch.arange(9).expand(2, 9) // 4 % 2}


def masks(full: bool) -> list[Any]:
    """The same as the operator's arguments."""
    draw, documents = options(full).values()
    if not full:
        return [None, None, None, 0, None, None]
    keys = attention_keys(draw, 2, 2, 9, 9)
    return [*keys, draw.threshold, tiles.document_starts(documents), tiles.document_ends(documents)]


def weighed(out: Tensor) -> Tensor:
    """A sum whose gradient differs from place to place."""
    generator = torch.Generator().manual_seed(1)
    return (out.float() * torch.randn(out.shape, generator=generator)).sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
def test_the_operators_are_well_formed(is_packed: bool, full: bool, dtype: torch.dtype) -> None:
    """Schema, autograd, shapes without data, strides, under tracing: torch.library.opcheck."""
    qkv = packed(dtype)
    leaves: list[Any] = [qkv, None, None] if is_packed else three(qkv)
    for need_low in (False,) if dtype == torch.float32 else (False, True):
        torch.library.opcheck(triton_op.forward, (*leaves, *masks(full), need_low))
        plain = [None if x is None else x.detach() for x in leaves]
        out, lse, low = triton_op.forward(*plain, *masks(full), need_low)
        assert (low.shape == out.shape) if need_low else low.numel() == 0
        arguments = (torch.ones_like(out), *plain, out, lse, low, *masks(full))
        torch.library.opcheck(triton_op.backward, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("full", [False, True])
def test_it_is_attention_packed_or_not(full: bool, dtype: torch.dtype) -> None:
    qkv, given = packed(dtype), options(full)
    leaves = three(qkv)
    one, lse_one = triton_op.attention(qkv, **given)
    other, lse_other = triton_op.attention(*leaves, **given)
    assert torch.equal(one, other) and torch.equal(lse_one, lse_other)
    assert not lse_one.requires_grad and lse_one.dtype == torch.float32
    (grad,) = torch.autograd.grad(weighed(one), qkv)
    grads = torch.autograd.grad(weighed(other), leaves)
    assert grad.is_contiguous() and grad.dtype == dtype
    assert torch.equal(grad.permute(2, 0, 3, 1, 4), torch.stack(grads))
    documents = given.pop("documents_BS")
    out = attend(*leaves, kernel="blocked", documents_BT=documents, **given)
    assert torch.equal(out, one)
    for got, same in zip(grads, torch.autograd.grad(weighed(out), leaves), strict=True):
        limit = 2 * torch.finfo(dtype).eps * float(same.abs().max())
        assert float((got - same).abs().max()) <= limit


BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++"),
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_graph_without_breaks_gives_the_same(dtype: torch.dtype, backend: str) -> None:
    """Bits; generated code may round what surrounds the operator another way."""

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        return triton_op.attention(x * 1, **options(full=True))

    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):
        compiled = torch.compile(call, fullgraph=True, backend=backend)
        found = []
        for function in (call, compiled):
            leaf = packed(dtype)
            out, lse = function(leaf)
            dout = torch.ones_like(out).cumsum(-1)
            found.append([out.detach(), lse, *torch.autograd.grad(out, leaf, dout)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(use_reentrant: bool) -> None:
    calls = []

    def block(x: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return triton_op.attention(x.sin(), **options(full=True))[0]

    plain, kept = packed(torch.float16), packed(torch.float16)
    (wanted,) = torch.autograd.grad(weighed(block(plain)), plain)
    weighed(checkpoint(block, kept, use_reentrant=use_reentrant)).backward()
    assert kept.grad is not None and torch.equal(kept.grad, wanted)
    assert len(calls) == 3  # once, and twice


def test_a_second_derivative_is_refused() -> None:
    """Where only its graph is asked for, too: autograd would take the gradient for a constant."""
    qkv = packed()
    out, _ = triton_op.attention(qkv, **options(full=False))
    with pytest.raises(RuntimeError, match="triton has no second derivative"):
        torch.autograd.grad(out.square().sum(), qkv, create_graph=True)


def test_what_out_lost_is_kept_for_a_gradient_in_half_precision_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost: list[Tensor] = []
    forward = triton_op.forward

    def noting(*given: Any) -> Any:
        found = forward(*given)
        lost.append(found[2])
        return found

    def kept(*tensors: Tensor) -> bool:
        triton_op.attention(*tensors, **options(full=False))
        return lost[-1].numel() > 0

    monkeypatch.setattr(triton_op, "forward", noting)
    half, single = packed(torch.float16), packed()
    assert kept(half) and kept(*three(half))
    assert not kept(half.detach()) and not kept(single) and not kept(*three(single))
    with torch.no_grad():
        assert not kept(half)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, True, True)])
def test_only_some_inputs_need_a_gradient(needs: tuple[bool, ...]) -> None:
    leaves = three(packed(torch.float16))
    out, _ = triton_op.attention(*leaves, **options(full=True))
    wanted = torch.autograd.grad(weighed(out), leaves)
    for leaf, need in zip(leaves, needs, strict=True):
        leaf.requires_grad_(need)
    out, _ = triton_op.attention(*leaves, **options(full=True))
    weighed(out).backward()
    for leaf, need, same in zip(leaves, needs, wanted, strict=True):
        assert torch.equal(leaf.grad, same) if need and leaf.grad is not None else not need


def test_a_graph_that_is_kept_gives_the_same_gradients_twice() -> None:
    qkv = packed(torch.float16)
    loss = weighed(triton_op.attention(qkv, **options(full=True))[0])
    first, again = (torch.autograd.grad(loss, qkv, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again) and first.any()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        *(({"dtype": dtype}, None) for dtype in triton_op.DTYPES),
        *(({"head_dim": head_dim}, None) for head_dim in (16, 24, 40, 96, 128)),
        *(({"shape": shape}, None) for shape in ("single", "chunk")),
        ({"dropout": True, "documents": True, "deterministic": True, "shape": "chunk"}, None),
        (
            {"shape": "single", "dropout": True, "gradient": False, "dtype": torch.bfloat16},
            None,
        ),
        ({"device": "cpu"}, "runs on CUDA, data is on cpu"),
        ({"device": "mps"}, "runs on CUDA, data is on mps"),
        ({"dtype": torch.float64}, "has no float64"),
        *(({"head_dim": h}, f"from 16 to 128, got {h}") for h in (8, 60, 65, 136)),
        ({"own_masks": True, "dropout": True}, "drops by the shared masks only"),
        ({"shape": "single", "dropout": True}, "gradient of a single dropped weight"),
        (
            {"shape": "single", "dropout": True, "gradient": False, "dtype": torch.float32},
            "errs more than the rule allows in fp32",
        ),
    ],
)
def test_what_it_serves(
    change: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton" or None)
    found = triton_op.supports(dataclasses.replace(CUDA, **change))
    assert found is None if reason is None else found is not None and reason in found


def test_no_zeros_are_made_for_what_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    backward = triton_op._Gradient.backward

    def recorded(ctx: Any, *grads: Any) -> Any:
        given.extend(grads)
        return backward(ctx, *grads)

    monkeypatch.setattr(triton_op._Gradient, "backward", staticmethod(recorded))
    qkv = packed()
    out, _ = triton_op.attention(qkv, dropout=None, documents_BS=None)
    out.sum().backward()
    assert qkv.grad is not None and given[1:] == [None, None]


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert triton_op.supports(CUDA) == "needs the package triton"


@pytest.mark.parametrize("call", [attend_packed, lambda x, **given: attend(*three(x), **given)])
def test_on_the_cpu_it_is_refused_by_name(call: Callable[..., Tensor]) -> None:
    message = r"kernel 'triton' cannot serve this call \(cpu, .*\): runs on CUDA, data is on cpu"
    with pytest.raises(ValueError, match=message):
        call(packed(), kernel="triton")
