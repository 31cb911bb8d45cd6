"""The attention kernels in Triton's interpreter, on the CPU, judged as every other kernel is.

What they do with memory is in test_triton_layout.py.

In fp32 and fp16 (it is wrong in bf16). A program takes some 10 ms there, so sizes are small, and
errors are pooled over fewer elements than the rule of verify.py asks for.
pytest tests/attention/test_triton_flash.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgpt.attention import properties, tiles, triton_op, verify
from flashgpt.attention.dropout import Dropout, attention_keep, attention_keys
from flashgpt.attention.kernels import KERNELS, Kernel
from flashgpt.attention.packed import room
from flashgpt.attention.request import Request
from flashgpt.attention.verify import Case

pytest.importorskip("triton")

import triton
import triton.language as tl

from flashgpt.attention import triton_flash
from flashgpt.attention.triton_flash import Masks, Tiles

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="with a GPU the kernels run there: test_triton_cuda.py"
    ),
    # NumPy's, of rows past the last query.
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning"),
]
CPU = torch.device("cpu")
FP16, FP32 = torch.float16, torch.float32
ELEMENTS = 200  # pooled by an audit here, of lse at least
NAME = "interpreted"


class Interpreted(torch.autograd.Function):
    """What CUDA runs as the operator and its gradient, on CPU tensors."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Any, v: Any, *more: Any) -> tuple[Tensor, ...]:
        out, lse, low = triton_op._forward(q, k, v, *more)
        ctx.save_for_backward(q, k, v, out, lse, low)
        ctx.masks = more[:-1]
        ctx.mark_non_differentiable(lse, low)
        return out, lse, low

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        found = triton_op._backward(grads[0], *ctx.saved_tensors, *ctx.masks)
        return (*found, *[None] * (10 - len(found)))


def supports(request: Request) -> str | None:
    return triton_op.supports(dataclasses.replace(request, device="cuda"))


@pytest.fixture(autouse=True)
def _in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_op, "forward", Interpreted.apply)
    kernel = Kernel(NAME, supports, triton_op.attention, packed=True)
    monkeypatch.setitem(KERNELS, NAME, kernel)
    monkeypatch.setattr(verify, "MIN_ELEMENTS", ELEMENTS)


def audit(case: Case) -> dict[str, verify.Verdict]:
    return {row.tensor: row for row in verify.audit([case], CPU) if row.kernel == NAME}


@pytest.mark.parametrize(
    "case",
    [
        *(Case(2, 2, t, t, 16, p, dtype=FP16) for t in (5, 65) for p in (0.0, 0.1)),
        Case(1, 2, 63, 63, 40, 0.1, dtype=FP16),
        Case(1, 1, 129, 129, 64, 0.1, dtype=FP16),
        Case(1, 2, 33, 100, 40, 0.1, documents=True, dtype=FP16),
        Case(1, 2, 65, 65, 16, 0.1, documents=True, dtype=FP16),
        *(Case(1, 2, 65, 65, 16, values=values, dtype=FP16) for values in verify.VALUES),
        Case(1, 1, 65, 65, 16, 0.1, dtype=FP32),
        Case(1, 1, 33, 100, 16, documents=True, dtype=FP32),
        *(Case(1, 1, 33, 33, 16, values=values, dtype=FP32) for values in verify.VALUES),
        Case(1, 1, 100, 130, 16, values=verify.SAME_KEYS[1.0], dtype=FP32),
    ],
    ids=str,
)
def test_errors_are_within_the_rule(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also dq where keys have much in common: no excess is known of this kernel."""
    monkeypatch.setattr(verify, "MIN_SEEDS", 3)
    rows = audit(case)
    assert set(rows) == set(verify.TENSORS)
    assert {name: row.used for name, row in rows.items() if not row.passed} == {}


@pytest.mark.parametrize("keys", [1, 77])
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_decoding_is_within_the_rule(
    dtype: torch.dtype, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One query; with dropout only its output is asked of this kernel, in fp32 nothing."""
    monkeypatch.setattr(verify, "MIN_ELEMENTS", 20)
    dropped = () if dtype == FP32 else verify.INFERENCE
    for p, tensors in ((0.0, verify.TENSORS), (0.1, dropped)):
        rows = audit(Case(1, 2, 1, keys, 16, p, dtype=dtype))
        assert set(rows) == set(tensors)
        assert {name: row.used for name, row in rows.items() if not row.passed} == {}


def test_what_out_lost_by_rounding_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, 2, 65, 65, 16, values="one huge key", dtype=FP16)
    with_low, backward = audit(case)["dq"], triton_flash.backward

    def without(*given: Any) -> None:
        *before, low, masks, into = given
        backward(*before, torch.zeros_like(low), masks, into)

    monkeypatch.setattr(triton_flash, "backward", without)
    dq = audit(case)["dq"]
    assert not dq.passed and dq.rms_used > 2 * with_low.rms_used


def out_of_order(batch: int, keys: int) -> Tensor:
    """documents_BS: runs of 11 tokens of three documents in turn; later rows begin elsewhere."""
    return torch.stack([(torch.arange(keys) // 11 + b) % 3 for b in range(batch)])


def inputs(
    batch: int, heads: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype = FP32
) -> list[Tensor]:
    """q, k, v, dout."""
    return verify.inputs_of(Case(batch, heads, queries, keys, head_dim, dtype=dtype), 0, CPU)


def masks_of(shape: tuple[int, int, int, int], draw: Dropout | None, ids: Tensor | None) -> Masks:
    """The masks of a call of [B, N, T, S]."""
    masks = Masks()
    if draw is not None:
        a, b, c = attention_keys(draw, *shape)
        masks = masks._replace(a_BNT=a, b_BNT=b, c_S=c, threshold=draw.threshold)
    if ids is not None:
        first, last = tiles.document_starts(ids), tiles.document_ends(ids)
        masks = masks._replace(first_BS=first, last_BS=last)
    return masks


def launch(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, masks: Masks) -> dict[str, Tensor]:
    """out, lse, dq, dk and dv, by the launchers alone."""
    out, lse, low = triton_flash.forward(q, k, v, masks, q.dtype != FP32)
    into = room(q, q.dtype), room(k, k.dtype), room(v, v.dtype)
    triton_flash.backward(dout, q, k, v, out, lse, low, masks, into)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *into), strict=True))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one | other)


Shape = tuple[int, int, int, int, int]
SHAPES: list[tuple[Shape, float, bool]] = [
    ((2, 2, 1, 1, 16), 0.0, False),
    ((2, 2, 1, 77, 16), 0.0, True),
    ((2, 2, 5, 5, 40), 0.1, False),
    ((1, 2, 33, 100, 40), 0.1, True),
    ((2, 1, 63, 63, 16), 0.5, True),
    ((1, 1, 65, 65, 64), 0.0, True),
    ((1, 1, 129, 129, 16), 0.1, False),
]


@pytest.mark.parametrize(("shape", "p", "documents"), SHAPES, ids=str)
def test_in_fp32_results_are_those_of_float64(
    shape: Shape, p: float, documents: bool, oracle: Callable[..., Any], law: Callable[..., Any]
) -> None:
    """Query by query; ids of documents are in no order."""
    batch, heads, queries, keys, _ = shape
    tensors, sizes = inputs(*shape), (batch, heads, queries, keys)
    mask = law(p, -7, 5, 2)
    ids = out_of_order(batch, keys) if documents else None
    found = launch(*tensors, masks_of(sizes, mask.dropout if p else None, ids))
    exact = oracle(
        *tensors,
        keep=mask.attention(*sizes) if p else None,
        scale=mask.dropout.scale if p else 1.0,
        documents=ids,
    )
    exact.check(found)


FAULTS = {
    "scale": {"dq", "dk", "dv", "out", "lse"},
    "sees the next token": {"dq", "dk", "dv", "out", "lse"},
    "dropout of the next row": {"dq", "dk", "dv", "out"},
    "dropout of another seed": {"dq", "dk", "dv", "out"},
    "no dropout": {"dq", "dk", "dv", "out"},
    "not rescaled": {"dq", "dk", "dv", "out"},
    "documents begin late": {"dq", "dk", "dv", "out", "lse"},
    "documents end early": {"dk", "dv"},
    "no documents": {"dq", "dk", "dv", "out", "lse"},
}


@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_the_oracle_tells_faults_apart(
    fault: str,
    oracle: Callable[..., Any],
    law: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = (1, 2, 33, 70)
    (q, k, v, dout), mask, ids = inputs(*shape, 16), law(0.3, 1, 0, 0), out_of_order(1, 70)
    exact = oracle(
        *(q, k, v, dout), keep=mask.attention(*shape), scale=mask.dropout.scale, documents=ids
    )
    masks = masks_of(shape, mask.dropout, ids)
    assert masks.first_BS is not None and masks.last_BS is not None
    if fault == "scale":
        q = q * (1 + 2**-12)
    elif fault == "sees the next token":  # what was the key before is the token's own
        k, v = k.roll(-1, dims=2), v.roll(-1, dims=2)
    elif fault == "dropout of the next row":
        masks = masks_of(shape, law(0.3, 1, 1, 0).dropout, ids)
    elif fault == "dropout of another seed":
        masks = masks_of(shape, law(0.3, 2, 0, 0).dropout, ids)
    elif fault == "no dropout":
        masks = masks_of(shape, None, ids)
    elif fault == "not rescaled":
        monkeypatch.setattr(triton_flash, "keep_scale", lambda _: 1.0)
    elif fault == "documents begin late":
        masks = masks._replace(first_BS=masks.first_BS.roll(1, dims=1))
    elif fault == "documents end early":
        masks = masks._replace(last_BS=masks.last_BS.clamp(max=40))
    elif fault == "no documents":
        masks = masks._replace(first_BS=None, last_BS=None)
    found = launch(q, k, v, dout, masks)
    wrong = set()
    for name, got in found.items():
        try:
            exact.check({name: got})
        except AssertionError:
            wrong.add(name)
    assert wrong == FAULTS.get(fault, set())


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
@pytest.mark.parametrize("queries", [72, 33])
def test_the_dropout_mask_is_the_definition(queries: int, dtype: torch.dtype) -> None:
    """Forward by the shared check. Backward by signs: where a row's weights are equal and so are
    the gradients of all of them, a score's gradient is negative exactly where it was dropped."""
    case = Case(1, 2, queries, 72, 16, 0.1, dtype=dtype)
    assert properties.masks_equal(case, CPU)[NAME]
    draw = verify.dropout_of(case, 0, CPU)
    assert draw is not None
    shape = (1, 2, queries, 72)
    keep = attention_keep(draw, *shape).tril(72 - queries)
    dropped = ~keep & torch.ones_like(keep).tril(72 - queries) & keep.any(-1, keepdim=True)
    eye = torch.eye(72, dtype=dtype)
    one_T, one_S = eye[:queries].expand(1, 2, -1, -1), eye.expand(1, 2, -1, -1)
    ones, masks = torch.ones_like(one_S), masks_of(shape, draw, None)
    found = launch(torch.zeros_like(one_T), one_S, ones, one_T, masks)
    assert torch.equal(found["dq"] < -1e-4, dropped)
    assert torch.equal(found["dv"].mT[:, :, :queries] > 0, keep)
    found = launch(one_T, torch.zeros_like(one_S), ones, one_T, masks)
    assert torch.equal(found["dk"].mT[:, :, :queries] < -1e-4, dropped)


@pytest.mark.parametrize("case", [Case(1, 2, 65, 65, 16), Case(1, 2, 33, 50, 40, 0.1)], ids=str)
def test_no_output_depends_on_a_later_token_and_results_repeat(case: Case) -> None:
    for dtype in (FP16, FP32):
        typed = dataclasses.replace(case, dtype=dtype)
        assert properties.is_causal(NAME, typed, CPU)
        assert properties.repeats(NAME, typed, CPU, 2)


def cuts(t: int, s: int) -> Callable[..., Tiles]:
    return lambda *_: Tiles(t, s, 4, 1)


@pytest.mark.parametrize(("t", "s"), [(16, 16), (16, 64), (64, 16), (128, 32)])
def test_tiles_of_any_size_give_the_same(
    t: int,
    s: int,
    monkeypatch: pytest.MonkeyPatch,
    oracle: Callable[..., Any],
    law: Callable[..., Any],
) -> None:
    monkeypatch.setattr(triton_flash, "tiles", cuts(t, s))
    shape, mask, ids = (1, 2, 50, 70), law(0.3, 2, 1, 4), out_of_order(1, 70)
    tensors = inputs(*shape, 16)
    exact = oracle(*tensors, keep=mask.attention(*shape), scale=mask.dropout.scale, documents=ids)
    exact.check(launch(*tensors, masks_of(shape, mask.dropout, ids)))
    assert properties.masks_equal(Case(1, 1, 33, 72, 16, 0.1, dtype=FP16), CPU)[NAME]


def test_the_cut_of_a_call_depends_on_its_kind_only() -> None:
    """So equal calls give equal bits, whatever the batch."""
    kinds = ("forward", "backward_q", "backward_kv")
    for kind in kinds:
        assert triton_flash.tiles(kind, torch.empty(1, 1, 9, 64), True) == triton_flash.FP32_TILES
        for head_dim, h in ((16, 64), (64, 64), (72, 128), (128, 128)):
            q = torch.empty(1, 1, 9, head_dim, dtype=FP16)
            assert triton_flash.tiles(kind, q, False) == triton_flash.HALF_TILES[kind][h]
            assert (
                triton_flash.tiles(kind, q.expand(3, 2, -1, -1), False)
                == (triton_flash.HALF_TILES[kind][h])
            )
    long = torch.empty(1, 1, triton_flash.DROPOUT_KV_UP_TO + 1, 64, dtype=FP16)
    found = [triton_flash.tiles("backward_kv", x, True) for x in (long[:, :, 1:], long)]
    assert found == [triton_flash.DROPOUT_KV, triton_flash.HALF_TILES["backward_kv"][64]]


@triton.jit
def _powers(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + i, triton_flash._exp2(tl.load(X + i), True))


def test_powers_of_two_in_fp32_err_by_roundings_only() -> None:
    """One rounding of the result and one of the fraction times ln(2), which is below 0.35."""
    x = torch.cat((torch.linspace(-126, 0, 4090), torch.tensor([-0.5, 0.5, 1, 126, 0, -126])))
    y = torch.empty_like(x)
    _powers[(1,)](x, y, N=x.numel())
    exact = x.double().exp2()
    assert float(((y - exact) / exact).abs().max()) <= 1.5 * 2.0**-24 * (1 + 0.35)
    assert torch.equal(y[-2:], torch.tensor([1.0, 2.0**-126]))
    low = torch.tensor([-126.5, -1e4, -torch.inf, -127.0])
    _powers[(1,)](low, y, N=4)
    assert not y[:4].any()
