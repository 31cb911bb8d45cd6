"""Blocked attention: tiles of any size, linear memory, no work above the diagonal.

Its numbers are judged with those of the other kernels in test_attend.py.
pytest tests/attention/test_blocked.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgpt.attention import blocked, tiles
from flashgpt.attention.attend import attend
from flashgpt.attention.dropout import Dropout, attention_keys


def inputs(
    batch: int, heads: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (queries, keys, keys, queries)
    shapes = [(batch, heads, length, head_dim) for length in lengths]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def run(kernel: str, *tensors: Tensor, **options: Any) -> list[Tensor]:
    """out, dq, dk, dv."""
    *qkv, dout = tensors
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = attend(*leaves, kernel=kernel, use_flash=kernel != "standard", **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize(
    ("tile", "scores"), [(1, 1), (3, 9), (3, 90), (16, 2000), (7, 10**6), (512, 1)]
)
@pytest.mark.parametrize("queries", [37, 12, 1])
def test_tiles_of_any_size_give_the_same(
    tile: int,
    scores: int,
    queries: int,
    monkeypatch: pytest.MonkeyPatch,
    oracle: Callable[..., Any],
    law: Callable[..., Any],
) -> None:
    tensors = inputs(3, 2, queries, 37, 4, torch.float64)
    documents = torch.arange(37).expand(3, -1) // 11
    mask = law(0.3, 2, 1, 4)
    monkeypatch.setattr(tiles, "TILE", tile)
    monkeypatch.setattr(tiles, "SCORES_PER_THREAD", max(1, scores // torch.get_num_threads()))
    found = run("blocked", *tensors, dropout=mask.dropout, documents_BT=documents)
    exact = oracle(
        *tensors,
        keep=mask.attention(3, 2, queries, 37),
        scale=mask.dropout.scale,
        documents=documents,
    )
    exact.check(dict(zip(("out", "dq", "dk", "dv"), found, strict=True)))


@pytest.mark.parametrize("dropout", [False, True])
def test_memory_is_linear_in_length(
    dropout: bool, recorder: type[Any], law: Callable[..., Any]
) -> None:
    largest = {}
    for kernel, length in (("blocked", 1024), ("blocked", 2048), ("standard", 1024)):
        tensors = inputs(1, 2, length, length, 8, torch.float32)
        with recorder() as seen:
            run(kernel, *tensors, dropout=law(0.1, 0, 0, 0).dropout if dropout else None)
        largest[kernel, length] = seen.largest
    assert largest["standard", 1024] >= 2 * 1024**2
    for length in (1024, 2048):
        in_flight = tiles.SCORES_PER_THREAD * torch.get_num_threads()
        assert largest["blocked", length] <= max(in_flight, 2 * length * 8)
    assert largest["blocked", 2048] < 2048**2 / 8


def test_tiles_above_the_diagonal_are_never_touched(recorder: type[Any]) -> None:
    """Two products forward and five backward, each over the tiles up to the diagonal, no more."""
    groups, head_dim = 2, 8
    for queries, keys in ((1024, 1024), (256, 1024), (1, 1024)):
        with recorder() as seen:
            run("blocked", *inputs(1, groups, queries, keys, head_dim, torch.float32))
        ends = range(keys - queries, keys, tiles.TILE)
        area = sum(min(tiles.TILE, keys - first) * min(first + tiles.TILE, keys) for first in ends)
        assert seen.flops == 2 * head_dim * groups * area * (2 + 5)
        if queries == keys:
            assert area < 0.57 * queries * keys


def test_tiles_of_other_documents_are_never_touched(
    recorder: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "SCORES_PER_THREAD", 1)  # square tiles
    tensors = inputs(1, 2, 1024, 1024, 8, torch.float32)
    for documents, count in ((1, 36), (8, 8)):  # tiles up to the diagonal; the diagonal alone
        ids = torch.arange(1024)[None] // (1024 // documents)
        with recorder() as seen:
            run("blocked", *tensors, documents_BT=ids)
        assert seen.flops == 2 * 8 * 2 * count * tiles.TILE**2 * (2 + 5)


@pytest.mark.parametrize("queries", [40, 9, 1])
@pytest.mark.parametrize(
    "ids",
    [[3, -1, 3, 7], [0, 2**32, 2**33, 1], [-(2**62), 2**62, 0, 2**62 + 1], [5, 5, 5, 5]],
    ids=["out of order", "equal modulo 2^32", "far apart", "one"],
)
def test_any_integers_name_documents(
    ids: list[int], queries: int, monkeypatch: pytest.MonkeyPatch, oracle: Callable[..., Any]
) -> None:
    """The last row of the batch has documents of other lengths than the first."""
    monkeypatch.setattr(tiles, "TILE", 8)
    monkeypatch.setattr(tiles, "SCORES_PER_THREAD", 1)
    tensors = inputs(2, 2, queries, 40, 4, torch.float64)
    documents = torch.tensor([[ids[i // 10] for i in range(40)], [ids[i % 4] for i in range(40)]])
    found = run("blocked", *tensors, documents_BT=documents)
    exact = oracle(*tensors, documents=documents)
    exact.check(dict(zip(("out", "dq", "dk", "dv"), found, strict=True)))


@pytest.mark.parametrize("kernel", ["standard", "blocked"])
def test_a_key_out_of_sight_may_hold_anything(kernel: str) -> None:
    """Later in the text, or of another document: not even NaN reaches those who cannot see it."""
    q, k, v, dout = inputs(1, 2, 50, 50, 4, torch.float32)
    documents = torch.arange(50)[None] // 20
    clean = run(kernel, q, k, v, dout, documents_BT=documents)[0]
    k[:, :, 30] = torch.nan
    hurt = run(kernel, q, k, v, dout, documents_BT=documents)[0]
    sees = torch.zeros(50, dtype=torch.bool)
    sees[30:40] = True
    assert torch.equal(hurt[:, :, ~sees], clean[:, :, ~sees])
    assert hurt[:, :, sees].isnan().all()


def test_half_precision_is_computed_in_fp32(oracle: Callable[..., Any]) -> None:
    tensors = inputs(2, 2, 65, 65, 8, torch.float16)
    found = run("blocked", *tensors)
    exact = oracle(*tensors).results
    assert {x.dtype for x in found} == {torch.float16}
    wanted = torch.from_numpy(exact["out"])
    # One rounding to fp16, and fp32's own error next to it.
    assert ((found[0].double() - wanted).abs() <= wanted.abs() * 2**-11 + 1e-6).all()


def test_autocast_leaves_it_alone() -> None:
    tensors = inputs(2, 2, 33, 33, 8, torch.float32)
    plain = run("blocked", *tensors)
    with torch.autocast("cpu", dtype=torch.float16):
        cast = run("blocked", *tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("full", [False, True])
def test_the_operators_are_well_formed(full: bool) -> None:
    """Schema, autograd, shapes without data, strides, under tracing: torch.library.opcheck."""
    q, k, v, dout = inputs(2, 2, 5, 9, 4, torch.float32)
    q, dout = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, dout))
    extra: list[Any] = [None, None, None, 0, None]
    if full:
        dropout = Dropout(0.3, torch.tensor(3), torch.tensor(1), layer=2)
        documents = torch.arange(9).expand(2, 9) // 4
        extra = [*attention_keys(dropout, 2, 2, 5, 9), dropout.threshold, documents]
    out, lse, _ = blocked.forward(q, k, v, *extra)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(blocked.forward, (*leaves, *extra))
    torch.library.opcheck(blocked.backward, (dout, q, k, v, out, lse, *extra))
    half = [x.half() for x in (q, k, v)]
    found = blocked.forward(*half, *extra)
    assert [x.dtype for x in found] == [torch.float16, torch.float32, torch.float32]
    torch.library.opcheck(blocked.forward, (*half, *extra), test_utils="test_faketensor")


def test_one_graph_without_breaks_gives_the_same_bits(law: Callable[..., Any]) -> None:
    """Traced, functionalised and partitioned; test_standard.py tries generated code."""
    tensors = inputs(2, 2, 40, 70, 8, torch.float32)
    documents = torch.arange(70).expand(2, -1) // 30
    options = {"dropout": law(0.2, 1, 0, 0).dropout, "documents_BT": documents}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, **options)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = compiled(*leaves)
    found = [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]
    wanted = run("blocked", *tensors, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
