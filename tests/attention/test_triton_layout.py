"""The attention kernels and memory: inputs of any layout, gradients into a packed tensor.

In Triton's interpreter; what the kernels compute is in test_triton_flash.py.
pytest tests/attention/test_triton_layout.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashgpt.attention import tiles, triton_op, verify
from flashgpt.attention.dropout import Dropout, attention_keys
from flashgpt.attention.verify import Case

pytest.importorskip("triton")

from flashgpt.attention import triton_flash
from flashgpt.attention.triton_flash import Masks

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="with a GPU the kernels run there: test_triton_cuda.py"
    ),
    # NumPy's, of rows past the last query.
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning"),
]
FP16, FP32 = torch.float16, torch.float32
Results = dict[str, Tensor]
Plain = tuple[list[Tensor], Masks, Results]


def inputs(queries: int, keys: int, head_dim: int, dtype: torch.dtype = FP16) -> list[Tensor]:
    """q, k, v, dout of two sequences of two heads."""
    case = Case(2, 2, queries, keys, head_dim, dtype=dtype)
    return verify.inputs_of(case, 0, torch.device("cpu"))


def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, masks: Masks) -> Results:
    """out, lse, dq, dk and dv."""
    out, lse, low = triton_op._forward(q, k, v, *masks, True)
    grads = triton_op._backward(dout, q, k, v, out, lse, low, *masks)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))


def same(one: Results, other: Results) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one | other)


def misaligned(x: Tensor) -> Tensor:
    """The same values at an address that no descriptor takes."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    return room.copy_(x)


def transposed(x: Tensor) -> Tensor:
    """Features apart in memory."""
    return x.mT.contiguous().mT


def heads_last(x: Tensor) -> Tensor:
    """Heads of a position side by side, as projections give them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def padded(x: Tensor) -> Tensor:
    """Rows further apart than they are long, by what a descriptor takes."""
    wide = torch.full((*x.shape[:3], x.shape[3] + 16), torch.nan, dtype=x.dtype)
    wide[..., : x.shape[3]] = x
    return wide[..., : x.shape[3]]


@pytest.fixture(scope="module")
def plain() -> Plain:
    """Contiguous inputs in fp16, dropout and documents, results."""
    draw = Dropout(0.2, torch.tensor(3), torch.tensor(1))
    documents = torch.arange(20).expand(2, -1) // 7 % 2
    keys = attention_keys(draw, 2, 2, 20, 20)
    ends = tiles.document_starts(documents), tiles.document_ends(documents)
    tensors, masks = inputs(20, 20, 24), Masks(*keys, draw.threshold, *ends)
    return tensors, masks, run(*tensors, masks)


@pytest.mark.parametrize("layout", [misaligned, transposed, heads_last, padded])
def test_inputs_may_lie_in_memory_in_any_way(
    layout: Callable[[Tensor], Tensor], plain: Plain
) -> None:
    tensors, masks, wanted = plain
    laid = [layout(x) for x in tensors]
    if layout is not misaligned:
        assert all(x.stride() != y.stride() for x, y in zip(laid, tensors, strict=True))
    assert same(run(*laid, masks), wanted)


def test_a_gradient_may_be_one_number_expanded(
    plain: Plain,
) -> None:
    (q, k, v, dout), masks, _ = plain
    for one in (torch.tensor(0.5, dtype=FP16), dout[:, :1, :1]):
        expanded = one.expand(dout.shape)
        assert same(run(q, k, v, expanded, masks), run(q, k, v, expanded.clone(), masks))


def test_packed_inputs_and_gradients_are_never_unpacked(
    plain: Plain,
) -> None:
    """q, k and v as views of one tensor; gradients written into another, whole and nowhere else."""
    (q, k, v, dout), masks, wanted = plain
    qkv = torch.stack([x.transpose(1, 2) for x in (q, k, v)], dim=2)
    for x, rows in zip(qkv.permute(2, 0, 3, 1, 4).unbind(), (q, k, v), strict=True):
        described = triton_flash._described(x, 16, 32)
        assert described.base.data_ptr() == x.data_ptr() and torch.equal(x, rows)
    out, lse, low = triton_op._forward(qkv, None, None, *masks, True)
    (grad,) = triton_op._backward(dout, qkv, None, None, out, lse, low, *masks)
    assert grad.shape == qkv.shape and grad.is_contiguous()
    dq, dk, dv = grad.permute(2, 0, 3, 1, 4).unbind()
    assert same(dict(zip(wanted, (out, lse, dq, dk, dv), strict=True)), wanted)
    around = torch.full((2, 20, 5, 2, 32), 7.0, dtype=FP16)
    into = around[:, :, 1:4, :, :24].permute(2, 0, 3, 1, 4).unbind()
    triton_flash.backward(dout, q, k, v, out, lse, low, masks, (into[0], into[1], into[2]))
    assert all(torch.equal(x, wanted[n]) for x, n in zip(into, ("dq", "dk", "dv"), strict=True))
    around[:, :, 1:4, :, :24] = 7.0
    assert (around == 7.0).all()


def test_lse_is_that_of_the_scores_and_low_what_out_lost() -> None:
    q, k, v, _ = inputs(33, 65, 40)
    out, lse, low = triton_flash.forward(q, k, v, Masks(), True)
    assert lse.dtype == FP32 and low.dtype == out.dtype == FP16
    scores = (q.double() @ k.double().mT) * 40**-0.5
    visible = torch.ones(33, 65, dtype=torch.bool).tril(32)
    scores = scores.masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-6)
    exact = scores.softmax(-1) @ v.double()
    together, alone = (exact - out - low).abs(), (exact - out).abs()
    assert together.square().mean() < 0.5 * alone.square().mean()
    assert triton_flash.forward(q, k, v, Masks(), False)[2].numel() == 0


def test_an_empty_batch_is_served() -> None:
    q, k, v, dout = (x[:0] for x in inputs(9, 9, 16, FP32))
    found = run(q, k, v, dout, Masks())
    assert {name: x.shape[0] for name, x in found.items()} == dict.fromkeys(found, 0)
