"""Our attention kernels on a GPU: the rule, masks, graphs, layouts. There: pytest -m gpu

What needs no GPU is in test_triton_flash.py, test_triton_op.py and test_fa4.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flashgpt import GPTModel
from flashgpt.attention import fa4, kernels, properties, triton_op, verify
from flashgpt.attention.attend import attend, attend_packed
from flashgpt.attention.dropout import Dropout, attention_keep, attention_keys
from flashgpt.attention.verify import Case
from flashgpt.measure.memory import peak_bytes
from flashgpt.train import runtime

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BF16 = torch.bfloat16


@functools.cache
def ours() -> tuple[str, ...]:
    """The kernels that are here."""
    return ("triton",) if fa4._missing() else ("triton", "fa4")


@pytest.fixture(autouse=True)
def _clean_receipt() -> Iterator[None]:
    kernels.clear_receipt()
    yield
    kernels.clear_receipt()


def packed(length: int, dtype: torch.dtype = BF16, seed: int = 0, batch: int = 2) -> Tensor:
    """qkv_BT3NH of three heads of 64 features, which needs a gradient."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, length, 3, 3, 64, generator=generator)
    return qkv.to(CUDA, dtype).requires_grad_()


def dropout(seed: int = 3, p: float = 0.1) -> Dropout:
    words = torch.tensor([seed, 1], device=CUDA)
    return Dropout(p, words[0], words[1], layer=2)


def upstream(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=generator).to(out)


def run(qkv: Tensor, **options: Any) -> list[Tensor]:
    """out and the packed gradient."""
    out = attend_packed(qkv, **options)
    (grad,) = torch.autograd.grad(out, qkv, upstream(out))
    return [out.detach(), grad]


def cases(dtype: torch.dtype) -> list[Case]:
    """Odd sizes, chunks, decoding, head dims that are padded, documents, hard values."""
    found = []
    for p in (0.0, 0.1):
        found += [Case(64, 9, 2, 2, 64, p)]
        found += [Case(2, 3, t, t, 64, p) for t in (63, 129, 1023, 2049)]
        found += [Case(2, 3, 33, 300, 40, p), Case(64, 9, 1, 77, 40, p)]
        found += [Case(2, 3, t, 201, 128, p, documents=True) for t in (201, 50)]
        found += [Case(4, 3, 65, 65, 64, p, values=values) for values in verify.VALUES]
    return [dataclasses.replace(case, dtype=dtype) for case in found]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_are_within_the_rule(dtype: torch.dtype) -> None:
    rows = [row for row in verify.audit(cases(dtype), CUDA) if row.kernel in ours()]
    over = [
        f"{row.kernel} {row.case} {row.tensor}: {row.max_used:.2f} {row.rms_used:.2f}"
        for row in rows
        if not (row.passed or row.known)
    ]
    assert not over, "\n".join(over)
    expected = {"triton"} if dtype == torch.float32 else set(ours())
    assert {row.kernel for row in rows} == expected
    refused = dtype == torch.float32  # where T is 1 and weights are dropped; see `supports`
    served = [case for case in cases(dtype) if not (refused and case.queries == 1 and case.p)]
    assert {row.case for row in rows if row.kernel == "triton"} == set(map(str, served))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    for keys in (16, 24, 72, 128):
        for queries in (keys, keys - 7):
            case = Case(2, 3, queries, keys, 16, 0.1, dtype=dtype)
            assert properties.masks_equal(case, CUDA)["triton"], case
            words = [verify.dropout_of(case, 0, torch.device(name)) for name in ("cpu", "cuda")]
            keeps = [attention_keep(d, 2, 3, queries, keys).cpu() for d in words if d is not None]
            assert torch.equal(*keeps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1023, 2100])
def test_long_masks_are_those_of_the_cpu_forward_and_backward(
    length: int, dtype: torch.dtype
) -> None:
    """128 columns, or rows, at a time: v, or the upstream gradient, marks them."""
    cpu = Dropout(0.1, torch.tensor(3), torch.tensor(1), layer=2)
    keep = attention_keep(cpu, 1, 2, length, length).tril()
    zeros = torch.zeros(1, 2, length, 128, dtype=dtype, device=CUDA)
    for first in range(0, length, 128):
        count = min(128, length - first)
        marks = zeros.clone()
        marks[:, :, first : first + count, :count] = torch.eye(count, device=CUDA)
        v = marks.clone().requires_grad_()
        out = attend(zeros, zeros, v, kernel="triton", dropout=dropout())
        (dv,) = torch.autograd.grad(out, v, marks)
        block = slice(first, first + count)
        assert torch.equal((out[..., :count] > 0).cpu(), keep[..., block])
        assert torch.equal((dv[..., :count] > 0).cpu().mT, keep[:, :, block])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1023, 1023), (33, 300)], ids=str)
def test_results_repeat_bit_for_bit(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    for p, documents in itertools.product((0.0, 0.1), (False, True)):
        case = Case(2, 4, *sizes, 64, p, documents, dtype=dtype)
        assert properties.repeats("triton", case, CUDA, 20)
    for name in ours() if dtype != torch.float32 else ("triton",):
        assert properties.is_causal(name, Case(2, 4, *sizes, 64, dtype=dtype), CUDA)


def model_and_ids() -> tuple[GPTModel, Tensor]:
    """Two layers of two heads of 64, dropout 0.1, in training."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "context_length": 128, "emb_dim": 128, "n_heads": 2}
    model = GPTModel({**sizes, "n_layers": 2, "drop_rate": 0.1}).to(CUDA).train()
    ids = torch.randint(300, (4, 128), generator=torch.Generator().manual_seed(0)).to(CUDA)
    return model, ids


def gradients(
    model: GPTModel,
    forward: Callable[[Tensor, Tensor], Tensor],
    ids: Tensor,
    autocast: torch.dtype | None,
    seed: int,
) -> list[Tensor]:
    """The loss, and all gradients in one vector."""
    model.set_dropout(seed)
    model.zero_grad()
    with runtime.casting(CUDA, autocast):
        loss = forward(ids, ids.roll(-1, dims=1))
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return [loss.detach()[None], torch.cat(grads)]


@pytest.mark.parametrize(("autocast", "limit"), [(None, 1e-4), (BF16, 2e-2)], ids=str)
def test_a_compiled_model_in_one_graph_draws_the_same_masks(
    autocast: torch.dtype | None, limit: float
) -> None:
    """Other masks change the gradient by more than ten times what rounding may."""
    model, ids = model_and_ids()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    eager = gradients(model, model, ids, autocast, seed=5)
    others = gradients(model, model, ids, autocast, seed=6)
    kernels.clear_receipt()
    found = gradients(model, compiled, ids, autocast, seed=5)
    dtype = "float32" if autocast is None else "bfloat16"
    (line,) = kernels.receipt()
    assert line.startswith(f"triton served cuda, {dtype}, H 64, T <= 128, square, dropout")
    for got, same in zip(found, eager, strict=True):
        assert float((got - same).norm()) <= limit * float(same.norm())
    assert float((others[1] - eager[1]).norm()) > 10 * limit * float(eager[1].norm())
    assert not torch.equal(others[0], eager[0])


def test_a_model_has_no_graph_breaks() -> None:
    model, ids = model_and_ids()
    model.set_dropout(5)
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(ids, ids)
    assert found.graph_break_count == 0 and found.graph_count == 1, found.break_reasons


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cuda_graph_repeats_it_on_other_inputs_and_with_other_masks(dtype: torch.dtype) -> None:
    words = torch.tensor([3, 1], device=CUDA)
    draw, qkv = Dropout(0.2, words[0], words[1], layer=2), packed(129, dtype)
    dout = upstream(triton_op.attention(qkv, dropout=draw, documents_BS=None)[0])

    def step() -> list[Tensor]:
        out, lse = triton_op.attention(qkv, dropout=draw, documents_BS=None)
        (grad,) = torch.autograd.grad(out, qkv, dout)
        return [out.detach(), lse, grad]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        first = [x.clone() for x in step()]
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(map(torch.equal, captured, first))
    words.copy_(torch.tensor([4, 7]))
    graph.replay()
    masked = [x.clone() for x in captured]
    assert all(map(torch.equal, masked, step()))
    assert not torch.equal(masked[0], first[0]) and not torch.equal(masked[2], first[2])
    assert torch.equal(masked[1], first[1])  # the normaliser knows nothing of dropout
    with torch.no_grad():
        qkv.copy_(packed(129, dtype, seed=1))
    graph.replay()
    assert all(map(torch.equal, captured, step()))
    assert not any(map(torch.equal, captured, masked))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(use_reentrant: bool) -> None:
    draw = dropout()

    def block(x: Tensor) -> Tensor:
        return attend_packed(x * 1, kernel="triton", dropout=draw)

    plain, kept = packed(200), packed(200)
    out = block(plain)
    (wanted,) = torch.autograd.grad(out, plain, upstream(out))
    out = checkpoint(block, kept, use_reentrant=use_reentrant)
    out.backward(upstream(out))
    assert kept.grad is not None and torch.equal(kept.grad, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_packed", [False, True])
def test_the_operators_are_well_formed(is_packed: bool, dtype: torch.dtype) -> None:
    """Schema, autograd, shapes without data, strides, under tracing: torch.library.opcheck."""
    qkv = packed(65, dtype)
    parts = [x.detach().contiguous().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4)]
    leaves: list[Any] = [qkv, None, None] if is_packed else parts
    plain = [None if x is None else x.detach() for x in leaves]
    draw = dropout()
    masks = [*attention_keys(draw, 2, 3, 65, 65), draw.threshold, None, None]
    need_low = dtype != torch.float32
    torch.library.opcheck(triton_op.forward, (*leaves, *masks, need_low))
    out, lse, low = triton_op.forward(*plain, *masks, need_low)
    arguments = (upstream(out), *plain, out, lse, low, *masks)
    torch.library.opcheck(triton_op.backward, arguments)
    if "fa4" in ours() and dtype != torch.float32:  # dq differs in its last bits from call to call
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(fa4.forward, tuple(leaves), test_utils=tests)
        out, lse = fa4.forward(*plain)
        given = (upstream(out), *plain, out, lse)
        torch.library.opcheck(fa4.backward, given, test_utils="test_faketensor")


@pytest.mark.parametrize("length", [65, 2100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_packed_gradient_equals_the_three(dtype: torch.dtype, length: int) -> None:
    """Bits, with triton; another layout may round another way with FlashAttention-4 and cuDNN."""
    qkv = packed(length, dtype)
    for name in ours():
        if name == "fa4" and dtype == torch.float32:
            continue
        draw = dropout() if name == "triton" else None
        out, grad = run(qkv, kernel=name, dropout=draw)
        leaves = [x.detach().contiguous().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4)]
        other = attend(*leaves, kernel=name, dropout=draw)
        grads = torch.autograd.grad(other, leaves, upstream(other))
        for got, same in ((out, other.detach()), (grad.permute(2, 0, 3, 1, 4), torch.stack(grads))):
            limit = 0.0 if name == "triton" else 4 * torch.finfo(dtype).eps
            assert float((got - same).abs().max()) <= limit * float(same.abs().max())


@pytest.mark.parametrize("layout", ["transposed", "misaligned", "padded"])
def test_inputs_may_lie_in_memory_in_any_way(layout: str) -> None:
    qkv, draw = packed(129), dropout()
    wanted = run(qkv, kernel="triton", dropout=draw)
    parts = [x.detach() for x in qkv.permute(2, 0, 3, 1, 4)]
    if layout == "transposed":
        laid = [x.mT.contiguous().mT for x in parts]
    elif layout == "misaligned":
        rooms = [torch.empty(x.numel() + 1, dtype=x.dtype, device=CUDA)[1:] for x in parts]
        laid = [room.view(x.shape).copy_(x) for room, x in zip(rooms, parts, strict=True)]
    else:
        laid = [torch.cat((x, x), dim=-1)[..., :64] for x in parts]
    leaves = [x.requires_grad_() for x in laid]
    out = attend(*leaves, kernel="triton", dropout=draw)
    grads = torch.autograd.grad(out, leaves, upstream(out))
    assert torch.equal(out, wanted[0])
    assert torch.equal(torch.stack(grads), wanted[1].permute(2, 0, 3, 1, 4))
    expanded = torch.ones((), dtype=BF16, device=CUDA).expand(out.shape)
    again = [attend(*leaves, kernel="triton", dropout=draw) for _ in range(2)]
    found = torch.autograd.grad(again[0], leaves, expanded)
    assert all(map(torch.equal, found, torch.autograd.grad(again[1], leaves, expanded.clone())))


def test_rows_beyond_32_bits_are_reached() -> None:
    """Sequences of one batch lie more than 2^31 elements apart: what is read, and what written."""
    from flashgpt.attention.triton_flash import Masks, backward, forward

    if torch.cuda.mem_get_info()[0] < 20 * 10**9:
        pytest.skip("needs 20 GB of free memory")
    near = packed(129).detach()
    step = 2**31 + 64
    size, strides = step + near[0].numel(), (step, *near.stride()[1:])
    far = torch.empty(size, dtype=BF16, device=CUDA).as_strided(near.shape, strides)
    far.copy_(near)
    found, draw = [], dropout()
    for qkv in (near, far):
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        masks = Masks(*attention_keys(draw, 2, 3, 129, 129), draw.threshold)
        out, lse, low = forward(q, k, v, masks, True)
        room = torch.zeros(size if qkv is far else near.numel(), dtype=BF16, device=CUDA)
        grad = room.as_strided(qkv.shape, qkv.stride())
        dq, dk, dv = grad.permute(2, 0, 3, 1, 4).unbind()
        backward(upstream(out), q, k, v, out, lse, low, masks, (dq, dk, dv))
        found.append([out, lse, grad.contiguous()])
        del room, grad, dq, dk, dv
    assert all(map(torch.equal, *found))
    assert found[0][2].any()


def test_memory_is_linear_in_length() -> None:
    peaks = []
    for length in (4096, 8192):
        qkv, draw = packed(length, batch=1), dropout()
        step = functools.partial(run, qkv, kernel="triton", dropout=draw)
        step()  # compiles
        peaks.append(peak_bytes(step, CUDA))
    assert peaks[1] < 2.2 * peaks[0]
    scores = 3 * 8192**2 * 2
    assert peaks[1] < scores / 4, peaks


def test_what_is_chosen() -> None:
    qkv = packed(65)
    for options in ({"deterministic": True}, {"dropout": dropout()}, {}):
        kernels.clear_receipt()
        run(qkv, **options)
        (line,) = kernels.receipt()
        name = "fa4" if not options and "fa4" in ours() else "triton"
        assert line.startswith(f"{name} served cuda, bfloat16, H 64")


def test_a_second_derivative_is_refused() -> None:
    for name in ours():
        qkv = packed(65)
        out = attend_packed(qkv, kernel=name)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(out.float().square().sum(), qkv, create_graph=True)


def test_nothing_waits_for_the_gpu() -> None:
    qkv, draw = packed(65), dropout()
    documents = torch.arange(65, device=CUDA).expand(2, -1) // 20
    out = attend_packed(qkv, kernel="triton", dropout=draw, documents_BT=documents)
    dout = upstream(out)
    torch.autograd.grad(out, qkv, dout)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = attend_packed(qkv, kernel="triton", dropout=draw, documents_BT=documents)
        torch.autograd.grad(out, qkv, dout)
        with pytest.raises(RuntimeError, match="synchroniz"):
            dout.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
