"""Attention kernels against float64: how far each one errs, next to standard attention.

The rule, written before it was measured: against standard attention in float64 on the same inputs
and the same dropout mask, a kernel's error in out, lse, dq, dk and dv is at most

    maximum:  2    * (standard's maximum error in the same dtype) + floor
    rms:      1.25 * (standard's rms error in the same dtype)     + floor

where the floor is two roundings, in the precision of the computation (fp32 for half precision), at
0.3 of the scale of what is added up: the same sum with every term replaced by its absolute value,
and in backward with each weight p = exp(s - lse) counted 1 + |lse| times, since the saved lse is
rounded as well. Without a floor T = 1 could not be judged, where standard attention's dq is exactly
zero because equal terms cancel. Errors are pooled over at least 8 seeds and 4,096 elements. Dropout
masks must be equal bit for bit, and no output may depend on a later token. The factor 2 is that of
the tests of github.com/Dao-AILab/flash-attention.

Legend: B batch, T query positions, S key positions, N heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from flashgpt.attention.attend import Attended, attend
from flashgpt.attention.dropout import Dropout, attention_keep
from flashgpt.attention.kernels import KERNELS, refusal
from flashgpt.attention.request import Request, bucket, shape_of

MAX_FACTOR, RMS_FACTOR = 2.0, 1.25
MIN_SEEDS, MIN_ELEMENTS = 8, 4096
TENSORS = ("out", "lse", "dq", "dk", "dv")


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of call. `documents` packs documents of 37 tokens."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    p: float = 0.0
    documents: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        text = f"T {self.queries}" + (f" S {self.keys}" if self.keys != self.queries else "")
        text += f" H {self.head_dim} dropout {self.p:g}" + (" documents" if self.documents else "")
        return text + " " + str(self.dtype).removeprefix("torch.")

    def request(self, device: torch.device) -> Request:
        """The request that `attend` would make of it, gradients included."""
        return Request(
            device.type,
            self.dtype,
            self.head_dim,
            bucket(self.queries),
            shape_of(self.queries, self.keys),
            self.p > 0,
            self.documents,
            gradient=True,
            deterministic=False,
        )


@dataclasses.dataclass
class Error:
    """Pooled error of one tensor against float64, and its floor."""

    max: float = 0.0
    squares: float = 0.0
    count: int = 0
    floor_max: float = 0.0
    floor_squares: float = 0.0

    def add(self, got: Tensor, exact: Tensor, terms: Tensor) -> None:
        """Pools one more tensor.

        Args:
            got: what is judged.
            exact: the same in float64.
            terms: sum of the absolute values of the terms that make up `exact`.
        """
        error = (got.detach().double() - exact).abs()
        if not torch.isfinite(error).all():
            self.max = self.squares = math.inf
        eps = torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps
        floor = 2 * 0.3 * eps * terms.abs()
        self.max = max(self.max, error.max().item())
        self.squares += error.square().sum().item()
        self.count += error.numel()
        self.floor_max = max(self.floor_max, floor.max().item())
        self.floor_squares += floor.square().sum().item()

    @property
    def rms(self) -> float:
        """Root of the mean squared error."""
        return math.sqrt(self.squares / self.count)

    @property
    def floor_rms(self) -> float:
        """The floor of the rms error."""
        return math.sqrt(self.floor_squares / self.count)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A kernel's error on one tensor, and the share of its budget that it uses (<= 1 passes)."""

    kernel: str
    case: str
    tensor: str
    max_error: float
    standard_max_error: float
    max_used: float
    rms_used: float

    @property
    def passed(self) -> bool:
        """Within the rule."""
        return self.max_used <= 1 and self.rms_used <= 1


def judge(kernel: str, case: str, tensor: str, error: Error, standard: Error) -> Verdict:
    """Applies the rule."""
    max_budget = MAX_FACTOR * standard.max + standard.floor_max
    rms_budget = RMS_FACTOR * standard.rms + standard.floor_rms
    return Verdict(
        kernel,
        case,
        tensor,
        error.max,
        standard.max,
        _share(error.max, max_budget),
        _share(error.rms, rms_budget),
    )


def _share(error: float, budget: float) -> float:
    if budget > 0:
        return error / budget
    return 0.0 if error == 0 else math.inf


def quick_cases(dtype: torch.dtype = torch.float32) -> list[Case]:
    """The grid of a quick audit: odd sizes, chunks, decoding, dropout, documents."""
    cases = []
    for p in (0.0, 0.1):
        cases += [Case(64, 8, t, t, 16, p) for t in (1, 5)]
        cases += [Case(4, 3, t, t, 16, p) for t in (63, 65, 129)]
        cases += [Case(1, 2, t, t, 64, p) for t in (257, 1023)]
        cases += [Case(64, 8, 1, 77, 32, p), Case(8, 2, 33, 300, 32, p)]
        cases += [Case(2, 2, 200, 200, 32, p, documents=True)]
    return [dataclasses.replace(case, dtype=dtype) for case in cases]


def audit(cases: Iterable[Case], device: torch.device) -> Iterator[Verdict]:
    """Judges every kernel that `choose` may take for a case on `device`, tensor by tensor."""
    for case in cases:
        request = case.request(device)
        names = [name for name in KERNELS if refusal(name, request) is None]
        pooled = {name: {tensor: Error() for tensor in TENSORS} for name in names}
        elements = case.batch * case.heads * case.queries  # of lse, the smallest tensor
        for seed in range(max(MIN_SEEDS, math.ceil(MIN_ELEMENTS / elements))):
            inputs = _inputs(case, seed, device)
            wide = [x.double() for x in inputs]
            exact, terms = _run("standard", case, seed, wide), _terms(case, seed, wide)
            for name in names:
                for tensor, got in _run(name, case, seed, inputs).items():
                    pooled[name][tensor].add(got, exact[tensor], terms[tensor])
        for name in names:
            for tensor in TENSORS:
                yield judge(
                    name, str(case), tensor, pooled[name][tensor], pooled["standard"][tensor]
                )


def masks_equal(case: Case, device: torch.device) -> dict[str, bool]:
    """Per kernel: the dropout mask it applies equals the definition, bit for bit.

    With q = k = 0 every visible key weighs the same, and v = identity columns make the weights
    visible as outputs: out[i, j] > 0 exactly where weight (i, j) was kept.
    """
    shape = (case.batch, case.heads)
    q = torch.zeros(*shape, case.queries, case.keys, dtype=case.dtype, device=device)
    k = torch.zeros(*shape, case.keys, case.keys, dtype=case.dtype, device=device)
    v = torch.eye(case.keys, dtype=case.dtype, device=device).expand_as(k)
    dropout = _dropout(case, 0, device)
    assert dropout is not None, "a mask needs dropout"
    keep = attention_keep(dropout, *shape, case.queries, case.keys)
    expected = keep.tril(case.keys - case.queries)
    request = dataclasses.replace(case, head_dim=case.keys).request(device)
    found = {}
    for name, kernel in KERNELS.items():
        if kernel.supports(request) is None:
            out = attend(q, k, v, kernel=name, use_flash=name != "standard", dropout=dropout)
            assert isinstance(out, Tensor)
            found[name] = torch.equal(out > 0, expected)
    return found


def is_causal(kernel: str, case: Case, device: torch.device) -> bool:
    """Whether a change of the later half of k and v leaves every earlier output bit for bit."""
    inputs = _inputs(case, 0, device)[:3]
    middle = case.keys // 2
    changed = [inputs[0]] + [x.clone() for x in inputs[1:]]
    for x in changed[1:]:
        x[:, :, middle:] += 1
    before, after = (_attend(kernel, case, 0, q, k, v).out_BNTH for q, k, v in (inputs, changed))
    rows = max(0, middle - (case.keys - case.queries))
    later_changed = not torch.equal(before[:, :, rows:], after[:, :, rows:])
    return later_changed and torch.equal(before[:, :, :rows], after[:, :, :rows])


def _inputs(case: Case, seed: int, device: torch.device) -> list[Tensor]:
    """q, k, v and the upstream gradient, of unit scale."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (case.queries, case.keys, case.keys, case.queries)
    return [
        torch.randn(case.batch, case.heads, length, case.head_dim, generator=generator)
        .to(case.dtype)
        .to(device)
        for length in lengths
    ]


def _dropout(case: Case, seed: int, device: torch.device) -> Dropout | None:
    if not case.p:
        return None
    words = torch.tensor([0x5EED << 32 | seed, 3], dtype=torch.int64, device=device)
    return Dropout(case.p, words[0], words[1], layer=1)


def _attend(kernel: str, case: Case, seed: int, q: Tensor, k: Tensor, v: Tensor) -> Attended:
    documents = None
    if case.documents:
        documents = torch.arange(case.keys, device=q.device).expand(case.batch, -1) // 37
    found = attend(
        q,
        k,
        v,
        use_flash=kernel != "standard",
        kernel=kernel,
        dropout=_dropout(case, seed, q.device),
        documents_BT=documents,
        return_lse=True,
        return_weights=kernel == "standard",
    )
    assert isinstance(found, Attended)
    return found


def _run(kernel: str, case: Case, seed: int, inputs: list[Tensor]) -> dict[str, Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    found = _attend(kernel, case, seed, *leaves)
    gradients = torch.autograd.grad(found.out_BNTH, leaves, inputs[3])
    assert found.lse_BNT is not None
    return dict(zip(TENSORS, (found.out_BNTH, found.lse_BNT, *gradients), strict=True))


def _terms(case: Case, seed: int, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Each result with every term that it adds up replaced by its absolute value."""
    q, k, v, dout = (x.abs() for x in inputs)
    scale = case.head_dim**-0.5
    kept = _attend("standard", case, seed, *inputs[:3])
    plain = _attend("standard", dataclasses.replace(case, p=0.0), seed, *inputs[:3])
    assert kept.weights_BNTS is not None and plain.weights_BNTS is not None
    assert kept.lse_BNT is not None
    out = kept.weights_BNTS @ v
    recomputed = 1 + kept.lse_BNT.abs()[..., None]
    kept_BNTS, plain_BNTS = kept.weights_BNTS * recomputed, plain.weights_BNTS * recomputed
    ds = kept_BNTS * (dout @ v.mT) + plain_BNTS * (dout * out).sum(-1, keepdim=True)
    results = (
        out,
        (q @ k.mT).amax(-1) * scale,
        ds @ k * scale,
        ds.mT @ q * scale,
        kept_BNTS.mT @ dout,
    )
    return dict(zip(TENSORS, results, strict=True))
