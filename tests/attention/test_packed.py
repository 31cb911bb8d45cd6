"""`attend_packed`: the packed projection in place of q, k and v.

Kernels that take the packed tensor as it is are in test_triton_op.py and test_fa4.py.
pytest tests/attention/test_packed.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashgpt.attention.attend import attend, attend_packed
from flashgpt.attention.kernels import KERNELS
from flashgpt.attention.packed import room, room_for_gradients, split
from flashgpt.attention.standard import causal_mask


def packed(batch: int, length: int, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, 3, heads, head_dim, generator=generator).to(dtype)


def both(qkv: Tensor, **options: Any) -> list[list[Tensor]]:
    """out and the packed gradient, by `attend_packed` and by `attend` on the views."""
    found = []
    for call in (attend_packed, lambda x, **more: attend(*x.permute(2, 0, 3, 1, 4), **more)):
        leaf = qkv.detach().requires_grad_()
        out = call(leaf, **options)
        generator = torch.Generator().manual_seed(1)
        dout = torch.randn(out.shape, generator=generator).to(out.dtype)
        found.append([out.detach(), *torch.autograd.grad(out, leaf, dout)])
    return found


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 70, 3, 9))),
    kernel=st.sampled_from(["standard", "blocked", "sdpa:cpu", None]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    drops=st.booleans(),
    packs=st.booleans(),
)
def test_it_equals_attend_on_the_views(
    law: Callable[..., Any],
    sizes: tuple[int, int, int, int],
    kernel: str | None,
    dtype: torch.dtype,
    drops: bool,
    packs: bool,
) -> None:
    """Bits of the output and of the gradient."""
    batch, length, _, _ = sizes
    options: dict[str, Any] = {"kernel": kernel, "use_flash": kernel != "standard"}
    if kernel != "sdpa:cpu":  # takes neither
        options["dropout"] = law(0.2, 3, 1, 2).dropout if drops else None
        documents = torch.arange(length).expand(batch, -1) // 11
        options["documents_BT"] = documents if packs else None
    one, other = both(packed(*sizes, dtype), **options)
    assert one[0].shape == (batch, sizes[2], length, sizes[3])
    assert all(map(torch.equal, one, other))


def test_a_ready_mask_is_used() -> None:
    mask = causal_mask(20, 20, torch.device("cpu"))
    qkv = packed(2, 20, 2, 8, torch.float32)
    one, other = both(qkv, use_flash=False, mask_TS=mask)
    assert all(map(torch.equal, one, other))
    wide = both(qkv, use_flash=False, mask_TS=torch.ones_like(mask))[0]
    assert not torch.equal(wide[0], one[0])


def test_a_kernel_gets_the_packed_tensor_only_where_it_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    qkv = packed(1, 9, 2, 8, torch.float32)
    got: list[tuple[Tensor, ...]] = []

    def attention(*tensors: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        got.append(tensors)
        q = split(*tensors)[0]
        return q, q[..., 0]

    for takes in (False, True):
        kernel = type(KERNELS["blocked"])("blocked", lambda _: None, attention, packed=takes)
        monkeypatch.setitem(KERNELS, "blocked", kernel)
        assert torch.equal(attend_packed(qkv, kernel="blocked"), qkv[:, :, 0].transpose(1, 2))
    assert [len(tensors) for tensors in got] == [3, 1]
    assert got[1][0] is qkv
    assert all(map(torch.equal, got[0], qkv.permute(2, 0, 3, 1, 4)))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 9, 2, 8), {}, r"qkv must be \[B, T, 3, N, H\].* got \[2, 9, 2, 8\]"),
        ((2, 3, 9, 2, 8), {}, r"qkv must be \[B, T, 3, N, H\].* got \[2, 3, 9, 2, 8\]"),
        ((2, 9, 3, 2, 8, 1), {}, r"qkv must be \[B, T, 3, N, H\]"),
        ((2, 0, 3, 2, 8), {}, "none but B empty"),
        ((2, 9, 3, 0, 8), {}, "none but B empty"),
        (
            (2, 9, 3, 2, 8),
            {"use_flash": False, "kernel": "blocked"},
            "kernel must be 'standard' with use_flash=False, got 'blocked'",
        ),
        ((2, 9, 3, 2, 8), {"kernel": "fa5"}, "kernel must be one of .*got 'fa5'"),
        ((2, 9, 3, 2, 8), {"kernel": "triton"}, "runs on CUDA, data is on cpu"),
        (
            (2, 9, 3, 2, 8),
            {"documents_BT": torch.zeros(2, 8).long()},
            "documents must be",
        ),
        (
            (2, 9, 3, 2, 8),
            {"mask_TS": torch.ones(9, 9).bool()},
            "mask_TS is for standard attention only",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    shape: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attend_packed(torch.zeros(shape), **options)


def test_splitting_copies_nothing_and_leaves_three_tensors_alone() -> None:
    qkv = packed(2, 9, 3, 8, torch.float32)
    for i, view in enumerate(split(qkv)):
        assert torch.equal(view, qkv[:, :, i].transpose(1, 2))
        assert view.data_ptr() == qkv[:, :, i].data_ptr()
    three = split(qkv)
    assert all(a is b for a, b in zip(split(*three), three, strict=True))


def test_room_for_gradients_is_laid_out_as_projections_want_it() -> None:
    qkv = packed(2, 9, 3, 8, torch.float16)
    (whole,) = room_for_gradients(qkv.transpose(0, 1).contiguous().transpose(0, 1), None, None)
    assert whole.shape == qkv.shape and whole.is_contiguous() and whole.dtype == qkv.dtype
    q, k, v = split(qkv)
    for x, grad in zip((q[:, :, :4], k, v), room_for_gradients(q[:, :, :4], k, v), strict=True):
        assert grad.shape == x.shape and grad.dtype == x.dtype
        assert grad.transpose(1, 2).is_contiguous()
    assert room(q, torch.float32).dtype == torch.float32
