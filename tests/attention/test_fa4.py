"""FlashAttention-4: what it is asked for, and how its package is called.

The package is not needed: standard attention stands in for its two functions, in their layout, so
this judges the way to the kernel and back. The kernel: test_triton_cuda.py, where there is one.
pytest tests/attention/test_fa4.py
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgpt.attention import fa4, standard
from flashgpt.attention.request import Request

CUDA = Request("cuda", torch.bfloat16, 64, 64, "square", False, False, True, False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float16}, None),
        ({"head_dim": 128}, None),
        ({"head_dim": 8}, None),
        ({"shape": "chunk"}, None),
        ({"shape": "single"}, None),
        ({"deterministic": True, "gradient": False}, None),
        ({"device": "cpu"}, "runs on CUDA, data is on cpu"),
        ({"dtype": torch.float32}, "has no float32"),
        ({"dtype": torch.float64}, "has no float64"),
        ({"head_dim": 60}, "divisible by 8 and <= 128, got 60"),
        ({"head_dim": 136}, "divisible by 8 and <= 128, got 136"),
        ({"dropout": True}, "has no dropout"),
        ({"dropout": True, "own_masks": True}, "has no dropout"),
        ({"documents": True}, "has no document mask"),
        ({"deterministic": True}, "adds up dQ in no fixed order"),
    ],
)
def test_what_it_serves(
    change: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fa4, "_missing", lambda: None)
    found = fa4.supports(dataclasses.replace(CUDA, **change))
    assert found is None if reason is None else found is not None and reason in found


def test_what_is_missing_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fa4, "_missing", lambda: "is not there")
    assert fa4.supports(CUDA) == "is not there"


@pytest.mark.parametrize(
    ("package", "capability", "reason"),
    [
        (None, (9, 0), "needs the package flash-attn-4: pip install 'flashgpt[fa4]'"),
        ("", (8, 9), "needs a Hopper GPU or newer, got Some GPU"),
        ("raise ImportError('undefined symbol')", (9, 0), "ImportError: undefined symbol"),
        ("raise RuntimeError('no CTK flavor')", (9, 0), "RuntimeError: no CTK flavor"),
        ("", (9, 0), None),
        ("", (10, 0), None),
    ],
)
def test_it_needs_its_package_and_a_gpu(
    package: str | None,
    capability: tuple[int, int],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The package may be there and broken, as one built for another torch is."""
    for name in [name for name in sys.modules if name.startswith("flash_attn")]:
        monkeypatch.delitem(sys.modules, name)
    if package is not None:
        (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
        (tmp_path / "flash_attn" / "__init__.py").write_text(package)
        (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
        (tmp_path / "flash_attn" / "cute" / "interface.py").touch()
        (tmp_path / "flash_attn_4-4.0.0.dist-info").mkdir()
        described = "Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0.0\n"
        (tmp_path / "flash_attn_4-4.0.0.dist-info" / "METADATA").write_text(described)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    found = fa4._missing.__wrapped__()
    for name in [name for name in sys.modules if name.startswith("flash_attn")]:
        monkeypatch.delitem(sys.modules, name)
    assert found is None if reason is None else found is not None and reason in found


class Package:
    """Stands in for flash_attn.cute.interface: heads after positions, gradients into tensors given.

    Attributes:
        calls: the functions that were called.
        into: the last gradients that were written.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.into: list[Tensor] = []

    def _flash_attn_fwd(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, return_lse: bool
    ) -> tuple[Any, ...]:
        assert causal and return_lse
        self.calls.append("forward")
        out, lse, _ = standard.attention(
            *(x.transpose(1, 2) for x in (q, k, v)), dropout=None, documents_BS=None
        )
        return out.transpose(1, 2).contiguous(), lse, None, None

    def _flash_attn_bwd(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """The textbook's backward pass, from `out` and `lse` as they were given."""
        assert causal
        self.calls.append("backward")
        self.into = [dq, dk, dv]
        q, k, v, out, dout = (x.transpose(1, 2).double() for x in (q, k, v, out, dout))
        (queries, head_dim), keys = q.shape[2:], k.shape[2]
        visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        p = torch.where(visible, (q @ k.mT * head_dim**-0.5 - lse[..., None]).exp(), 0)
        ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * head_dim**-0.5
        for room, grad in zip(self.into, (ds @ k, ds.mT @ q, p.mT @ dout), strict=True):
            room.copy_(grad.transpose(1, 2))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Package:
    """The stand-in, in the place of the package; and one for cuDNN's forward pass."""
    found = Package()
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    interface = sys.modules["flash_attn.cute.interface"]
    monkeypatch.setattr(interface, "_flash_attn_fwd", found._flash_attn_fwd, raising=False)
    monkeypatch.setattr(interface, "_flash_attn_bwd", found._flash_attn_bwd, raising=False)

    def cudnn(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Any, ...]:
        assert options == (None, True, 0.0, True)  # no bias, lse, no dropout, causal
        found.calls.append("cudnn")
        out, lse, _ = standard.attention(q, k, v, dropout=None, documents_BS=None)
        return torch.empty_like(q).copy_(out), lse[..., None], None  # laid out as q is

    operator = types.SimpleNamespace(default=cudnn)
    aten = types.SimpleNamespace(_scaled_dot_product_cudnn_attention=operator)
    monkeypatch.setattr(fa4, "aten", aten)
    return found


def tensors(queries: int, keys: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v, dout of two sequences of three heads."""
    generator = torch.Generator().manual_seed(keys)
    lengths = (queries, keys, keys, queries)
    return [torch.randn(2, 3, n, 8, generator=generator).to(dtype) for n in lengths]


@pytest.mark.parametrize(
    ("queries", "keys", "kernel"),
    [
        (1, 1, "forward"),
        (2, 2, "cudnn"),
        (65, 65, "cudnn"),
        (1, 65, "forward"),
        (20, 65, "forward"),
        (66, 66, "forward"),
        (130, 130, "forward"),
    ],
)
def test_short_texts_go_to_cudnn_and_results_are_those_of_attention(
    queries: int,
    keys: int,
    kernel: str,
    package: Package,
    oracle: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fa4, "CUDNN_UP_TO", 65)
    q, k, v, dout = tensors(queries, keys)
    out, lse = fa4._forward(q, k, v)
    grads = fa4._backward(dout, q, k, v, out, lse)
    assert package.calls == [kernel, "backward"]
    found = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))
    oracle(q, k, v, dout).check(found)
    assert all(x.transpose(1, 2).is_contiguous() for x in grads)


@pytest.mark.parametrize("length", [9, 70])
def test_a_packed_gradient_is_written_in_place(
    length: int, package: Package, oracle: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fa4, "CUDNN_UP_TO", 65)
    q, k, v, dout = tensors(length, length)
    qkv = torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2)
    out, lse = fa4._forward(qkv, None, None)
    (grad,) = fa4._backward(dout, qkv, None, None, out, lse)
    assert grad.shape == qkv.shape and grad.is_contiguous()
    for i, room in enumerate(package.into):
        assert room.data_ptr() == grad[:, :, i].data_ptr()
        assert room.shape == (2, length, 3, 8) and room.stride() == grad[:, :, i].stride()
    dq, dk, dv = grad.permute(2, 0, 3, 1, 4).unbind()
    oracle(q, k, v, dout).check({"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv})


@pytest.mark.parametrize("is_packed", [False, True])
def test_shapes_without_data_are_those_of_the_results(is_packed: bool, package: Package) -> None:
    """What a compiler plans with: sizes, dtypes and strides."""
    q, k, v, dout = (x.half() for x in tensors(70, 70))
    qkv = torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2)
    given = (qkv, None, None) if is_packed else (q, k, v)
    out, lse = fa4._forward(*given)
    planned = fa4._fake(*given)
    assert [x.shape for x in planned] == [out.shape, lse.shape]
    assert [x.stride() for x in planned] == [out.stride(), lse.stride()]
    assert [x.dtype for x in planned] == [torch.float16, torch.float32]
    grads = fa4._backward(dout, *given, out, lse)
    meta = [None if x is None else x.to("meta") for x in given]
    on_meta = (x.to("meta") for x in (out, lse))
    planned_grads = fa4.backward(dout.to("meta"), *meta, *on_meta)
    assert [x.stride() for x in planned_grads] == [x.stride() for x in grads]
    assert [x.shape for x in planned_grads] == [x.shape for x in grads]
    assert package.calls[-1] == "backward"


@pytest.fixture
def operator(package: Package) -> Iterator[Package]:
    """Puts the CUDA kernels of the operators in place for CPU tensors, as long as a test runs."""
    with torch.library._scoped_library("flashgpt", "IMPL") as library:
        library.impl("fa4", fa4._forward, "CPU")
        library.impl("fa4_backward", fa4._backward, "CPU")
        yield package


def test_its_gradient_is_that_of_attention_packed_or_not(
    operator: Package, oracle: Callable[..., Any]
) -> None:
    *qkv, dout = tensors(70, 70)
    exact = oracle(*qkv, dout)
    whole = torch.stack([x.transpose(1, 2) for x in qkv], dim=2).requires_grad_()
    leaves = [x.requires_grad_() for x in qkv]
    for given in ([whole], leaves):
        out, lse = fa4.attention(*given, dropout=None, documents_BS=None)
        assert out.requires_grad and not lse.requires_grad
        grads = torch.autograd.grad(out, given, dout)
        if len(grads) == 1:
            grads = grads[0].permute(2, 0, 3, 1, 4).unbind()
        exact.check(dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True)))
    assert operator.calls == 2 * ["cudnn", "backward"]


@pytest.mark.usefixtures("operator")
def test_a_second_derivative_is_refused() -> None:
    *qkv, _ = (x.requires_grad_() for x in tensors(9, 9))
    out, _ = fa4.attention(*qkv, dropout=None, documents_BS=None)
    with pytest.raises(RuntimeError, match="fa4 has no second derivative"):
        torch.autograd.grad(out.sum(), qkv, create_graph=True)
