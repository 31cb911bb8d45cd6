"""The contract of `attend`, kernel by kernel, against float64.

The oracle (conftest.py) goes query by query in numpy and shares no line with flashgpt.
pytest tests/attention/test_attend.py
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flashgpt.attention import kernels
from flashgpt.attention.attend import Attended, attend
from flashgpt.attention.dropout import Dropout
from flashgpt.attention.standard import causal_mask

KERNELS = ("standard", "blocked", "sdpa:cpu")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call; `documents` is the length of each packed document."""

    T: int
    S: int
    p: float = 0.0
    documents: int | None = None
    B: int = 2
    N: int = 2
    H: int = 8

    def __str__(self) -> str:
        return f"T{self.T}-S{self.S}-p{self.p}-docs{self.documents}-B{self.B}-H{self.H}"

    @property
    def kernels(self) -> list[str]:
        fused = not self.p and self.documents is None and self.T in (1, self.S)
        return list(KERNELS) if fused else ["standard", "blocked"]

    def inputs(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """q, k, v, dout of unit scale."""
        generator = torch.Generator().manual_seed(self.T * 1000 + self.S)
        lengths = (self.T, self.S, self.S, self.T)
        shapes = [(self.B, self.N, length, self.H) for length in lengths]
        return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    @property
    def documents_BS(self) -> Tensor | None:
        if self.documents is None:
            return None
        rows = torch.arange(self.B)[:, None]  # borders differ from row to row
        return (torch.arange(self.S)[None] + 3 * rows) // self.documents + 5


LENGTHS = (1, 2, 5, 63, 65, 128, 129, 257)
CASES = [
    *(Case(t, t) for t in LENGTHS),
    *(Case(t, t, p=0.2) for t in LENGTHS),
    *(Case(1, s) for s in (2, 7, 300)),
    *(Case(t, s, p=0.2) for t, s in ((1, 9), (2, 5), (5, 129), (63, 200), (33, 600))),
    Case(130, 700, p=0.2, B=3),  # more than one part of B * N, one query tile and one key tile
    *(Case(t, t, documents=7) for t in (1, 5, 65, 129)),
    Case(20, 150, p=0.2, documents=37),
    Case(129, 600, documents=31),  # whole key tiles of other documents come first
    *(Case(9, 9, H=h) for h in (1, 3, 33)),
]
SERVED = [pytest.param(c, k, id=f"{c}-{k}") for c in CASES for k in c.kernels]


def run(
    kernel: str,
    qkv: list[Tensor],
    dout: Tensor,
    *,
    dropout: Dropout | None = None,
    documents: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv of one kernel. Inputs keep their strides."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    found = attend(
        *leaves,
        use_flash=kernel != "standard",
        kernel=kernel,
        dropout=dropout,
        documents_BT=documents,
        return_lse=True,
        **options,
    )
    assert isinstance(found, Attended)
    assert found.lse_BNT is not None
    assert not found.lse_BNT.requires_grad
    grads = torch.autograd.grad(found.out_BNTH, leaves, dout)
    names = ("out", "lse", "dq", "dk", "dv")
    return dict(zip(names, (found.out_BNTH, found.lse_BNT, *grads), strict=True))


@pytest.fixture(scope="module")
def exact_of(oracle: Callable[..., Any], law: Callable[..., Any]) -> Callable[[Case], Any]:
    """The oracle's answer to a case, made once for all kernels."""
    known: dict[Case, Any] = {}

    def find(case: Case) -> Any:
        if case not in known:
            mask = law(case.p, -7, 5, 2)
            keep = mask.attention(case.B, case.N, case.T, case.S) if case.p else None
            scale = mask.dropout.scale if case.p else 1.0
            known[case] = oracle(
                *case.inputs(), keep=keep, scale=scale, documents=case.documents_BS
            )
        return known[case]

    return find


@pytest.mark.parametrize(("case", "kernel"), SERVED)
def test_out_lse_and_gradients_are_those_of_float64(
    case: Case, kernel: str, exact_of: Callable[[Case], Any], law: Callable[..., Any]
) -> None:
    dropout = law(case.p, -7, 5, 2).dropout if case.p else None
    for dtype in (torch.float32, torch.float64):
        *qkv, dout = case.inputs(dtype)
        found = run(kernel, qkv, dout, dropout=dropout, documents=case.documents_BS)
        assert {x.dtype for x in found.values()} == {dtype}
        exact_of(case).check(found)


@pytest.mark.parametrize(
    "change",
    ["no scale", "mask off by one", "top-left", "dropout shifted", "document border"],
)
def test_the_oracle_tells_wrong_attention_apart(
    change: str, exact_of: Callable[[Case], Any], law: Callable[..., Any]
) -> None:
    case = Case(20, 150, p=0.2, documents=37)
    *qkv, dout = case.inputs()
    dropout, documents = law(case.p, -7, 5, 2).dropout, case.documents_BS
    assert documents is not None
    mask = causal_mask(case.T, case.S, torch.device("cpu"))
    if change == "no scale":
        qkv[0] = qkv[0] * 8**0.5
    elif change == "mask off by one":
        mask = mask.roll(1, dims=1) | mask[:, :1]
    elif change == "top-left":
        mask = torch.ones_like(mask).tril()
        mask[:, -case.T :] |= torch.eye(case.T, dtype=torch.bool)  # no row without a key
    elif change == "dropout shifted":
        dropout = dataclasses.replace(dropout, first_row=dropout.first_row + 1)
    else:
        documents = documents.roll(1, dims=1)
    found = run("standard", qkv, dout, dropout=dropout, documents=documents, mask_TS=mask)
    for name, got in found.items():
        if name == "lse" and change == "dropout shifted":
            continue  # the normaliser knows nothing of dropout
        with pytest.raises(AssertionError):
            exact_of(case).check({name: got})


def packed(x: Tensor) -> Tensor:
    """A view into the output of one fused projection, [B, T, 3, N, H]."""
    batch, heads, length, head_dim = x.shape
    qkv = torch.full((batch, length, 3, heads, head_dim), torch.nan, dtype=x.dtype)
    qkv[:, :, 1] = x.transpose(1, 2)
    return qkv.permute(2, 0, 3, 1, 4)[1]


def features_apart(x: Tensor) -> Tensor:
    """Every second feature of a wider tensor."""
    wide = torch.full((*x.shape[:3], 2 * x.shape[3]), torch.nan, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def odd_offset(x: Tensor) -> Tensor:
    """A slice at an odd storage offset."""
    flat = torch.full((x.numel() + 3,), torch.nan, dtype=x.dtype)
    flat[3:] = x.flatten()
    return flat[3:].view(x.shape)


LAYOUTS = {
    "packed": packed,
    "features apart": features_apart,
    "odd offset": odd_offset,
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch inside": lambda x: x.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_strides_of_q_k_v_and_of_the_upstream_gradient(
    kernel: str, layout: str, exact_of: Callable[[Case], Any]
) -> None:
    case = Case(65, 65)
    inputs = [LAYOUTS[layout](x) for x in case.inputs()]
    assert any(x.stride() != x.contiguous().stride() or x.storage_offset() for x in inputs)
    for x, plain in zip(inputs, case.inputs(), strict=True):
        assert torch.equal(x, plain)
    found = run(kernel, inputs[:3], inputs[3])
    exact_of(case).check(found)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_expanded_upstream_gradient_and_expanded_keys(
    kernel: str, oracle: Callable[..., Any]
) -> None:
    q, k, v, dout = Case(65, 65).inputs()
    row = dout[:, :, :1].expand_as(dout)
    oracle(q, k, v, row).check(run(kernel, [q, k, v], row))
    one = torch.ones(()).expand_as(dout)  # what out.sum().backward() hands down: all strides 0
    assert set(one.stride()) == {0}
    k, v = (x[:, :1].expand(-1, q.shape[1], -1, -1) for x in (k, v))
    oracle(q, k, v, one).check(run(kernel, [q, k, v], one))


def large(q: Tensor, k: Tensor, v: Tensor) -> None:
    q *= 5
    k *= 3
    v *= 3


def far(sign: float) -> Callable[[Tensor, Tensor, Tensor], None]:
    """All scores near 120 or -120: the recipe of pytorch issue 196678."""

    def apply(q: Tensor, k: Tensor, v: Tensor) -> None:
        q[..., 0], k[..., 0] = 1, sign * 120 * k.shape[-1] ** 0.5

    return apply


def one_huge_key(q: Tensor, k: Tensor, v: Tensor) -> None:
    k[:, :, 3] *= 100


def equal_keys(q: Tensor, k: Tensor, v: Tensor) -> None:
    k[:] = k[:, :, :1].clone()


def zeros(q: Tensor, k: Tensor, v: Tensor) -> None:
    q[:] = k[:] = 0


RECIPES = {
    "large": large,
    "all near 120": far(1.0),
    "all near -120": far(-1.0),
    "one huge key": one_huge_key,
    "equal keys": equal_keys,
    "zeros": zeros,
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("length", [5, 129])
def test_extreme_scores(recipe: str, length: int, oracle: Callable[..., Any]) -> None:
    *qkv, dout = Case(length, length, B=1).inputs()
    RECIPES[recipe](*qkv)
    exact = oracle(*qkv, dout)
    for kernel in KERNELS:
        exact.check(run(kernel, qkv, dout))


@pytest.mark.parametrize("kernel", KERNELS)
def test_later_tokens_change_nothing_and_receive_nothing(kernel: str) -> None:
    *qkv, dout = Case(129, 129).inputs()
    dout[:, :, 70:] = 0
    before = run(kernel, qkv, dout)
    for name in ("dk", "dv"):
        assert not before[name][:, :, 70:].any()
        assert before[name][:, :, :70].ne(0).all()
    for x in qkv[1:]:
        x[:, :, 70:] += 1
    after = run(kernel, qkv, dout)
    assert torch.equal(before["out"][:, :, :70], after["out"][:, :, :70])
    assert not torch.equal(before["out"][:, :, 70:], after["out"][:, :, 70:])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_non_finite_upstream_gradient_stays_in_its_row(kernel: str, bad: float) -> None:
    *qkv, dout = Case(129, 129).inputs()
    clean = run(kernel, qkv, dout)
    dout[1, 0, 60] = bad
    hurt = run(kernel, qkv, dout)
    others = torch.ones(dout.shape[:3], dtype=torch.bool)
    others[1, 0, 60] = False
    assert not torch.isfinite(hurt["dq"][1, 0, 60]).any()
    assert torch.equal(hurt["dq"][others], clean["dq"][others])
    for name in ("dk", "dv"):  # no other head or batch row
        assert torch.equal(hurt[name][0], clean[name][0])
        assert torch.equal(hurt[name][1, 1], clean[name][1, 1])


def test_decoding_token_by_token_and_chunks_give_the_rows_of_the_whole(
    law: Callable[..., Any],
) -> None:
    q, k, v, _ = Case(70, 70).inputs(torch.float64)
    dropout = law(0.3, 11, 4, 1).dropout
    for drop in (None, dropout):
        whole = attend(q, k, v, use_flash=False, dropout=drop)
        for start, stop in [*((t, t + 1) for t in (0, 1, 33, 69)), (0, 20), (20, 55), (55, 70)]:
            part = q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]
            for use_flash in (True, False):
                rows = attend(*part, use_flash=use_flash, dropout=drop)
                torch.testing.assert_close(rows, whole[:, :, start:stop], rtol=0, atol=1e-13)


def test_weights_after_dropout(oracle: Callable[..., Any], law: Callable[..., Any]) -> None:
    case = Case(20, 50, p=0.4, documents=13)
    q, k, v, dout = case.inputs(torch.float64)
    mask = law(case.p, 3, 0, 0)
    keep = mask.attention(2, 2, 20, 50)
    exact = oracle(q, k, v, dout, keep=keep, scale=mask.dropout.scale, documents=case.documents_BS)
    for use_flash in (True, False):  # asking for weights is asking for standard attention
        found = attend(
            q,
            k,
            v,
            use_flash=use_flash,
            dropout=mask.dropout,
            documents_BT=case.documents_BS,
            return_weights=True,
        )
        assert isinstance(found, Attended)
        assert found.weights_BNTS is not None
        assert found.lse_BNT is None
        expected = torch.from_numpy(exact.weights)
        torch.testing.assert_close(found.weights_BNTS, expected, rtol=1e-12, atol=0)
        assert torch.equal(found.weights_BNTS == 0, expected == 0)


def test_only_what_is_asked_for_comes_back() -> None:
    q, k, v, _ = Case(5, 5).inputs()
    assert isinstance(attend(q, k, v), Tensor)
    for use_flash in (True, False):
        found = attend(q, k, v, use_flash=use_flash, return_lse=True)
        assert isinstance(found, Attended)
        assert found.weights_BNTS is None
        assert found.lse_BNT is not None


@pytest.mark.parametrize("kernel", KERNELS)
def test_autograd(kernel: str, law: Callable[..., Any]) -> None:
    """retain_graph, any subset of inputs that require a gradient, no_grad."""
    case = Case(65, 65)
    *qkv, dout = case.inputs()
    dropout = None if kernel == "sdpa:cpu" else law(0.2, 1, 0, 0).dropout
    use_flash = kernel != "standard"
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = attend(*leaves, kernel=kernel, use_flash=use_flash, dropout=dropout)
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    second = torch.autograd.grad(out, leaves, dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for needed in itertools.product((True, False), repeat=3):
        leaves = [x.clone().requires_grad_(n) for x, n in zip(qkv, needed, strict=True)]
        out = attend(*leaves, kernel=kernel, use_flash=use_flash, dropout=dropout)
        assert out.requires_grad == any(needed)
        if any(needed):
            out.backward(dout)
        for leaf, n, grad in zip(leaves, needed, first, strict=True):
            assert (leaf.grad is not None) == n
            if leaf.grad is not None:
                assert torch.equal(leaf.grad, grad)
    leaves = [x.clone().requires_grad_() for x in qkv]
    with torch.no_grad():
        quiet = attend(*leaves, kernel=kernel, use_flash=use_flash, dropout=dropout)
    assert not quiet.requires_grad
    assert torch.equal(quiet, out)


@pytest.mark.parametrize("kernel", ["blocked", "sdpa:cpu"])
def test_a_second_derivative_is_refused_not_wrong(kernel: str) -> None:
    *qkv, dout = Case(5, 5).inputs(torch.float64)
    leaves = [x.requires_grad_() for x in qkv]
    out = attend(*leaves, kernel=kernel)
    (dq,) = torch.autograd.grad(out, leaves[:1], dout, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no autograd formula|not implemented"):
        torch.autograd.grad(dq.sum(), leaves)


@pytest.mark.parametrize("kernel", ["standard", "blocked"])
@pytest.mark.parametrize("case", [Case(5, 5, B=1), Case(3, 6, p=0.3, documents=4, B=1, H=3)])
def test_gradcheck(kernel: str, case: Case, law: Callable[..., Any]) -> None:
    leaves = [x.requires_grad_() for x in case.inputs(torch.float64)[:3]]
    dropout = law(case.p, 9, 0, 0).dropout if case.p else None

    def call(*qkv: Tensor) -> Tensor:
        return attend(
            *qkv,
            kernel=kernel,
            use_flash=kernel != "standard",
            dropout=dropout,
            documents_BT=case.documents_BS,
        )

    assert torch.autograd.gradcheck(call, leaves)
    if kernel == "standard":
        assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("use_flash", [True, False])
def test_checkpointing_gives_equal_gradients(
    use_flash: bool, reentrant: bool, law: Callable[..., Any]
) -> None:
    *qkv, dout = Case(65, 65).inputs()
    dropout = law(0.2, 1, 0, 0).dropout

    def call(*qkv: Tensor) -> Tensor:
        return attend(*qkv, use_flash=use_flash, dropout=dropout)

    def gradients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in qkv]
        return torch.autograd.grad(function(*leaves), leaves, dout)

    def again(*qkv: Tensor) -> Tensor:
        found: Tensor = checkpoint(call, *qkv, use_reentrant=reentrant, preserve_rng_state=False)
        return found

    if reentrant:  # this mode has no autograd.grad, only backward

        def gradients_of_checkpoint() -> list[Tensor | None]:
            leaves = [x.clone().requires_grad_() for x in qkv]
            again(*leaves).backward(dout)
            return [x.grad for x in leaves]

        found = gradients_of_checkpoint()
    else:
        found = list(gradients(again))
    for got, wanted in zip(found, gradients(call), strict=True):
        assert got is not None
        assert torch.equal(got, wanted)


def test_dropout_too_small_to_drop_anything_is_none() -> None:
    q, k, v, _ = Case(5, 5).inputs()
    seed = torch.tensor(1)
    kernels.clear_receipt()
    out = attend(q, k, v, dropout=Dropout(1e-10, seed, seed))
    assert kernels.receipt()[0].startswith("sdpa:cpu served ")
    assert torch.equal(out, attend(q, k, v))


def test_standard_uses_the_mask_it_is_given() -> None:
    q, k, v, _ = Case(5, 9).inputs()
    mask = causal_mask(5, 9, torch.device("cpu"))
    plain = attend(q, k, v, use_flash=False)
    assert torch.equal(attend(q, k, v, use_flash=False, mask_TS=mask), plain)
    other = attend(q, k, v, use_flash=False, mask_TS=torch.ones_like(mask))
    assert not torch.equal(other, plain)


@pytest.mark.parametrize("kernel", ["standard", "blocked", "sdpa:cpu"])
def test_autocast_changes_nothing(kernel: str) -> None:
    *qkv, dout = Case(33, 33).inputs()
    plain = run(kernel, qkv, dout)
    leaves = [x.detach().requires_grad_() for x in qkv]
    with torch.autocast("cpu", dtype=torch.float16):
        out = attend(*leaves, kernel=kernel, use_flash=kernel != "standard")
    assert isinstance(out, Tensor)
    found = (out, *torch.autograd.grad(out, leaves, dout))  # as trainers do: backward outside
    for name, got in zip(("out", "dq", "dk", "dv"), found, strict=True):
        assert torch.equal(got, plain[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing_in_half_precision(dtype: torch.dtype) -> None:
    qkv = [x.detach().half() for x in Case(33, 33).inputs()[:3]]
    plain = attend(*qkv, use_flash=False)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(attend(*qkv, use_flash=False), plain)


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (1, 4), (2, 4)])
@pytest.mark.parametrize("options", [{}, {"kernel": "blocked"}, {"use_flash": False}], ids=str)
def test_an_empty_batch_gives_an_empty_result(
    queries: int, keys: int, options: dict[str, Any]
) -> None:
    q, k = torch.zeros(0, 3, queries, 8, requires_grad=True), torch.zeros(0, 3, keys, 8)
    out = attend(q, k, k, **options)
    assert isinstance(out, Tensor) and out.shape == q.shape
    assert torch.autograd.grad(out, q, torch.zeros_like(out))[0].shape == q.shape


def zeros_of(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


QKV = zeros_of(2, 3, 4, 8)
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "a mask that nobody would read": (
        (QKV, QKV, QKV),
        {"mask_TS": torch.ones(4, 4, dtype=torch.bool)},
        r"mask_TS is for standard attention only; leave it out, or use_flash=False",
    ),
    "a mask of another shape": (
        (QKV, QKV, QKV),
        {"use_flash": False, "mask_TS": torch.ones(1, 1, dtype=torch.bool)},
        r"mask must be bool \[T, S\] = \[4, 4\], got torch\.bool \[1, 1\]",
    ),
    "a mask of numbers": (
        (QKV, QKV, QKV),
        {"use_flash": False, "mask_TS": torch.ones(4, 4)},
        r"mask must be bool .*, got torch\.float32 \[4, 4\]",
    ),
    "no heads": ((QKV[:, :0],) * 3, {}, r"must have heads and features, got \[2, 0, 4, 8\]"),
    "no features": ((QKV[..., :0],) * 3, {}, r"must have heads and features, got \[2, 3, 4, 0\]"),
    "float8": ((QKV.to(torch.float8_e4m3fn),) * 3, {}, r"share one dtype of fp16, bf16, fp32"),
    "documents elsewhere": (
        (QKV, QKV, QKV),
        {"documents_BT": torch.zeros(2, 4, dtype=torch.int64, device="meta")},
        r"documents must be on cpu as q is, got meta",
    ),
    "complex documents": (
        (QKV, QKV, QKV),
        {"documents_BT": torch.zeros(2, 4, dtype=torch.complex64)},
        r"documents must be integers, got torch\.complex64",
    ),
    "3-d": ((QKV[0], QKV[0], QKV[0]), {}, r"must be \[B, N, T, H\], got \[3, 4, 8\]"),
    "v unlike k": (
        (QKV, QKV, zeros_of(2, 3, 5, 8)),
        {},
        r"v must have k's shape \[2, 3, 4, 8\], got \[2, 3, 5, 8\]",
    ),
    "heads": (
        (QKV, zeros_of(2, 1, 4, 8), zeros_of(2, 1, 4, 8)),
        {},
        r"k must have q's B, N and H \[2, 3, 4, 8\], got \[2, 1, 4, 8\]",
    ),
    "head dim": (
        (QKV, zeros_of(2, 3, 4, 7), zeros_of(2, 3, 4, 7)),
        {},
        r"k must have q's B, N and H",
    ),
    "T > S": (
        (QKV, QKV[:, :, :3], QKV[:, :, :3]),
        {},
        r"T must be in 1 \.\. S.*got T 4 and S 3",
    ),
    "no query": ((QKV[:, :, :0], QKV, QKV), {}, r"got T 0 and S 4"),
    "dtypes": ((QKV, QKV.double(), QKV), {}, r"share one dtype .*, got torch\.float32"),
    "integers": ((QKV.long(),) * 3, {}, r"share one dtype .*, got torch\.int64"),
    "devices": (
        (QKV, QKV.to("meta"), QKV),
        {},
        r"must share a device, got cpu, meta, cpu",
    ),
    "documents' shape": (
        (QKV[:, :, :1], QKV, QKV),
        {"documents_BT": torch.zeros(2, 1, dtype=torch.int64)},
        r"documents must be \[B, S\] = \[2, 4\], got \[2, 1\]",
    ),
    "documents' dtype": (
        (QKV, QKV, QKV),
        {"documents_BT": zeros_of(2, 4)},
        r"documents must be integers, got torch\.float32",
    ),
    "standard, flash named": (
        (QKV, QKV, QKV),
        {"use_flash": False, "kernel": "blocked"},
        r"kernel must be 'standard' with use_flash=False, got 'blocked'",
    ),
    "weights, flash named": (
        (QKV, QKV, QKV),
        {"return_weights": True, "kernel": "sdpa:cpu"},
        r"kernel must be 'standard' with return_weights=True, got 'sdpa:cpu'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_calls_that_do_not_fit_are_refused(name: str) -> None:
    tensors, options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        attend(*tensors, **options)
