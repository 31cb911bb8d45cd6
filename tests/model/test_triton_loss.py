"""The loss on CUDA: the Triton kernel, and the products around it.

Without a GPU, in Triton's interpreter, in fp32 and fp16 (it is wrong in bf16).
pytest tests/model/test_triton_loss.py
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashgpt.model import loss as loss_module
from flashgpt.model.loss import IGNORE

pytest.importorskip("triton")

from flashgpt.model import triton_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
VALUES = {
    "ordinary": lambda x: 3 * x,
    "far apart": lambda x: (5e3 * x).clamp(-1e4, 1e4),
    "high": lambda x: 1e4 + 16 * x,
    "low": lambda x: -1e4 + 16 * x,
    "one huge": lambda x: x.index_fill(1, torch.tensor(x.shape[1] // 2), 1e4),
    "equal": lambda x: torch.full_like(x, 7.0),
}
Run = tuple[Tensor, Tensor]


def padded(vocab: int) -> int:
    return -(-vocab // 64) * 64


def case(
    vocab: int, dtype: torch.dtype, values: str = "ordinary", rows: int = 5
) -> tuple[Tensor, Tensor]:
    """logits_MC, whose padding must not be seen, and targets_M; the third row is not counted."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.full((rows, padded(vocab)), 2e4)
    logits[:, :vocab] = VALUES[values](torch.randn(rows, vocab, generator=generator))
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[0], targets[1], targets[2] = 0, vocab - 1, IGNORE
    targets[3] = logits[3, :vocab].argmax()
    return logits.to(DEVICE, dtype), targets.to(DEVICE)


def run(logits: Tensor, targets: Tensor, vocab: int, gradient: bool = True) -> Run:
    """Losses and what then stands in place of (a copy of) the logits."""
    logits, losses = logits.clone(), torch.full(targets.shape, 99.0, device=DEVICE)
    triton_loss.cross_entropy_(logits, targets, losses, vocab, IGNORE, gradient)
    return losses, logits


def excess(found: Run, logits: Tensor, targets: Tensor, vocab: int) -> float:
    """The largest error against float64, in parts of what roundings can add up to.

    u = 2^-24 rounds in fp32; fall = top - x. An exponential errs by (3 fall + 4) u: the difference,
    its product with log2(e), that constant, and the GPU's power of two by 2^-22. A term of the
    total has one at first, one a tile as the peak rises and one when lanes are joined, whose falls
    add up to its own, and is added up across its piece, the tiles and the pieces.
    """
    x = logits[:, :vocab].double()
    counted = targets != IGNORE
    one_hot = F.one_hot(targets.where(counted, 0), vocab)
    p = x.softmax(1)
    fall = x.amax(1, keepdim=True) - x
    fall_target = (fall * one_hot).sum(1)
    log_total = torch.exp(-fall).sum(1).log()
    dx = (p - one_hot).where(counted[:, None], 0)
    loss = (fall_target + log_total).where(counted, 0)

    u = 2.0**-24
    width = 16 // logits.element_size()
    tiles = -(-vocab // (width * triton_loss.PIECES))
    steps = 5 * (tiles + 2) + width + tiles + math.log2(triton_loss.PIECES)
    total_limit = u * (3 * (p * fall).sum(1) + steps)
    loss_limit = total_limit + u * (fall_target + 2 * log_total + 2 * loss) + 2.0**-126
    p_limit = p * (u * (3 * fall + 9) + total_limit[:, None]) + u * dx.abs() * one_hot
    kind = torch.finfo(logits.dtype)
    half_ulp, half_smallest = kind.eps / 2, kind.smallest_normal * kind.eps / 2
    dx_limit = p_limit * (1 + half_ulp) + half_ulp * dx.abs() + half_smallest + 2.0**-126
    losses, gradient = found[0].double(), found[1][:, :vocab].double()
    return max(
        float(((losses - loss).abs() / loss_limit).max()),
        float(((gradient - dx).abs() / dx_limit).max()),
    )


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 300, 1023])
def test_losses_and_gradients_err_by_roundings_only(
    vocab: int, dtype: torch.dtype, values: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, targets = case(vocab, dtype, values)
    for pieces in (triton_loss.PIECES, 8):  # one tile and many
        monkeypatch.setattr(triton_loss, "PIECES", pieces)
        found = run(logits, targets, vocab)
        assert excess(found, logits, targets, vocab) <= 1
        assert not found[0][2].any() and not found[1][2].any()
        assert not found[1][:, vocab:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_vocabulary_of_gpt2(dtype: torch.dtype) -> None:
    logits, targets = case(50257, dtype)
    assert excess(run(logits, targets, 50257), logits, targets, 50257) <= 1
    bare = logits[:, :50257].contiguous()
    assert excess(run(bare, targets, 50257), logits, targets, 50257) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [65, 300])
def test_the_limit_tells_faults_apart(vocab: int, dtype: torch.dtype) -> None:
    logits, targets = case(vocab, dtype)
    losses, gradient = run(logits, targets, vocab)
    one_hot = F.one_hot(targets.clamp(min=0), padded(vocab)).to(dtype)
    counted = targets != IGNORE
    next_target = torch.where(counted, (targets + 1) % vocab, IGNORE)
    faults = {
        "scale": (losses, gradient * 1.01),
        "no one-hot": (losses, gradient + one_hot * counted[:, None]),
        "next target": run(logits, next_target, vocab),
        "padding counted": run(
            logits.clone().index_fill_(1, torch.arange(vocab, padded(vocab), device=DEVICE), 0.0),
            targets,
            padded(vocab),
        ),
        "last column not counted": run(logits, targets % (vocab - 1), vocab - 1),
        "ignored row counted": run(logits, targets.clamp(min=0), vocab),
        "loss": (losses * (1 + 2.0**-16), gradient),
    }
    for name, found in faults.items():
        assert excess(found, logits, targets, vocab) > 1, name


def test_the_limit_sees_a_log_sum_exp_that_rounds_at_the_size_of_the_logits() -> None:
    logits, targets = case(300, torch.float32, "high")
    x = logits[:, :300]
    lse = x.double().logsumexp(1, keepdim=True).float()
    counted = targets != IGNORE
    one_hot = F.one_hot(targets.clamp(min=0), 300)
    losses = (lse - x.gather(1, targets.clamp(min=0)[:, None]))[:, 0].where(counted, 0)
    gradient = (torch.exp(x - lse) - one_hot).where(counted[:, None], 0)
    exact_losses, exact_gradient = run(logits, targets, 300)
    assert excess((exact_losses, exact_gradient), logits, targets, 300) <= 1
    assert excess((losses, exact_gradient), logits, targets, 300) > 1
    assert excess((exact_losses, gradient), logits, targets, 300) > 1


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flashgpt.model.triton_loss import PIECES, WARPS, _row

for kind, width in (("bf16", 8), ("fp16", 8), ("fp32", 4)):
    for gradient in (False, True):
        constants = dict(ignore=-100, gradient=gradient, pieces=PIECES, width=width)
        signature = dict(
            logits="*" + kind, targets="*i64", losses="*fp32", stride="i32", vocab="i32",
            columns="i32", **dict.fromkeys(constants, "constexpr"),
        )
        attributes = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 5)}
        source = ASTSource(_row, signature, constants, attributes)
        hopper = GPUTarget("cuda", 90, 32)
        ptx = triton.compile(source, target=hopper, options=dict(num_warps=WARPS)).asm["ptx"]
        print(kind, ptx.count("ld.global.v4"), ptx.count("st.global.v4"))
"""


def test_it_compiles_for_hopper_with_wide_loads(tmp_path: Path) -> None:
    """By Triton's own assembler, without a GPU. The interpreter takes more than the compiler."""
    found = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        cwd=Path(loss_module.__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        check=False,
    )
    assert found.returncode == 0, found.stderr
    lines = [line.split() for line in found.stdout.splitlines()]
    assert [line[0] for line in lines] == ["bf16", "bf16", "fp16", "fp16", "fp32", "fp32"]
    for i, (_, loads, stores) in enumerate(lines):
        assert int(loads) >= 2 and (int(stores) >= 2) is (i % 2 == 1)


def test_only_the_rows_given_are_written() -> None:
    logits, targets = case(300, torch.float32)
    around = torch.full((len(logits) + 2, logits.shape[1] + 64), 99.0, device=DEVICE)
    inside = around[1:-1, : logits.shape[1]]
    inside.copy_(logits)
    losses = torch.empty_like(targets, dtype=torch.float32)
    triton_loss.cross_entropy_(inside, targets, losses, 300, IGNORE, True)
    wanted = run(logits, targets, 300)
    assert torch.equal(losses, wanted[0]) and torch.equal(inside, wanted[1])
    inside.fill_(99.0)
    assert (around == 99.0).all()


def test_without_a_gradient_the_logits_stay() -> None:
    logits, targets = case(300, torch.float32)
    losses, after = run(logits, targets, 300, gradient=False)
    assert torch.equal(after, logits)
    assert torch.equal(losses, run(logits, targets, 300)[0])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of the interpreter
def test_what_is_not_finite_is_seen_in_its_row_alone() -> None:
    logits, targets = case(300, torch.float32)
    good = run(logits, targets, 300)
    for value in (math.nan, math.inf):
        for row, column in ((0, 0), (0, 299), (2, 7)):
            bad = logits.clone()
            bad[row, column] = value
            losses, gradient = run(bad, targets, 300)
            counted = row != 2
            assert bool(losses[row].isnan()) is bool(gradient[row].isnan().any()) is counted
            others = torch.arange(len(targets), device=DEVICE) != row
            assert torch.equal(losses[others], good[0][others])
            assert torch.equal(gradient[others], good[1][others])


@pytest.mark.parametrize("target", [-1, 300, 2**40])
def test_a_target_outside_the_vocabulary_is_nan(target: int) -> None:
    logits, targets = case(300, torch.float32)
    targets[1] = target
    losses, gradient = run(logits, targets, 300)
    assert losses.isnan().tolist() == [False, True, False, False, False]
    assert gradient[1].isnan().all() and gradient[[0, 2, 3, 4]].isfinite().all()


def inputs(rows: int = 30, width: int = 12, vocab: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    """x_MD, weight_VD, targets_M; nine rows are not counted, and hold what must not be seen."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator)
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[torch.randperm(rows, generator=generator)[:9]] = IGNORE
    x[targets == IGNORE] = math.nan
    return x.to(DEVICE), weight.to(DEVICE), targets.to(DEVICE)


def summed(
    x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """What `_fused` returns, from the definition: gradients of the summed loss. In float64, or in
    a dtype with the logits rounded to it."""
    total = (targets != IGNORE).sum()
    x = torch.where(targets[:, None] == IGNORE, 0, x)  # 0 NaN = NaN
    wide = torch.promote_types(dtype or torch.float64, torch.float32)
    leaves = [t.detach().to(dtype or torch.float64).requires_grad_() for t in (x, weight)]
    logits = (leaves[0] @ leaves[1].T).to(wide)
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    gradients = torch.autograd.grad(loss, leaves)
    return [(loss / total).detach(), *gradients, total.to(wide)]


def loss_limit(x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> float:
    """What roundings add up to: a logit errs by its sum over D and by being rounded to the dtype,
    the log-sum-exp and the target's logit by no more, what follows by less than 128 u."""
    counted = targets != IGNORE
    sums = float((x[counted].double().abs() @ weight.double().abs().T).max())
    u = 2.0**-24
    return 2 * sums * (x.shape[1] * u + torch.finfo(dtype).eps / 2) + 128 * u


def over(
    found: tuple[Tensor, ...], plain: list[Tensor], exact: list[Tensor], limit: float
) -> list[str]:
    """Gradients that err more than twice what PyTorch's operators do in the same dtype, a loss
    that errs by more than its limit, another number of targets."""
    wrong = ["loss"] * (not abs(found[0] - exact[0]) <= limit)
    wrong += ["total"] * (not torch.equal(found[3].double(), exact[3]))
    half_ulp = torch.finfo(plain[1].dtype).eps / 2
    for i, name in ((1, "dx"), (2, "dweight")):
        floor = 2 * 0.3 * half_ulp * float(exact[i].abs().max())
        error, usual = found[i] - exact[i], plain[i] - exact[i]
        if not all(
            measure(error) <= 2 * measure(usual) + floor
            for measure in (lambda e: e.abs().max(), lambda e: e.square().mean().sqrt())
        ):
            wrong.append(name)
    return wrong


@pytest.fixture
def products_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-precision products into fp32, which PyTorch has on GPUs only."""
    if DEVICE == "cuda":
        return

    def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
        product = (a.float() @ b.float()).to(out.dtype)
        out.copy_(out + product if add else product)

    monkeypatch.setattr(loss_module, "_multiply", multiply)


@pytest.mark.usefixtures("products_of_the_cpu")
@pytest.mark.parametrize(("vocab", "chunk"), [(37, 99), (37, 7), (64, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_errs_no_more_than_pytorchs_operators(
    dtype: torch.dtype, vocab: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ROWS_TRITON", chunk)
    x, weight, targets = inputs(vocab=vocab)
    x, weight = x.to(dtype).float(), weight.to(dtype).float()
    exact, plain = summed(x, weight, targets), summed(x, weight, targets, dtype)
    limit = loss_limit(x, weight, targets, dtype)
    for given in (torch.float32, dtype):
        found = loss_module._fused(x.to(given), weight.to(given), targets, dtype, True)
        assert [t.dtype for t in found] == [torch.float32, given, given, torch.float32]
        assert over(found, plain, exact, limit) == []
        assert not found[1][targets == IGNORE].any()
        without = loss_module._fused(x.to(given), weight.to(given), targets, dtype, False)
        assert torch.equal(without[0], found[0]) and torch.equal(without[3], found[3])
        assert without[1].numel() == without[2].numel() == 0
    faults: dict[str, tuple[Any, ...]] = {
        "next target": (x, weight, ((targets + 1) % vocab).where(targets != IGNORE, IGNORE)),
        "row counted": (x.nan_to_num(1.0), weight, targets.clamp(min=0)),
        "weight": (x, weight * 1.1, targets),
    }
    for name, arguments in faults.items():
        found = loss_module._fused(*arguments, dtype, True)
        assert {"loss", "dx", "dweight"} <= set(over(found, plain, exact, limit)), name


def test_without_rows_or_counted_targets_the_loss_is_nan() -> None:
    x, weight, targets = inputs()
    for rows in (0, 30):
        ignored = torch.full_like(targets[:rows], IGNORE)
        loss, dx, dw, total = loss_module._fused(x[:rows], weight, ignored, torch.float32, True)
        assert loss.isnan() and total == 0
        assert dx.shape == (rows, 12) and not dx.any() and not dw.any()


def test_inputs_may_lie_in_memory_in_other_ways() -> None:
    x, weight, targets = inputs()
    wanted = loss_module._fused(x, weight, targets, torch.float32, True)
    columns, strided = x.T.contiguous().T, torch.stack([targets, targets], 1)[:, 0]
    found = loss_module._fused(columns, weight, strided, torch.float32, True)
    for got, same in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, same, rtol=1e-5, atol=1e-5)
    assert found[1].stride() == torch.empty_like(columns).stride()


def test_the_kernel_serves_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.empty(300, 16)
    takes = loss_module._kernel_takes
    assert all(takes(weight, t) for t in (torch.float32, torch.float16, torch.bfloat16))
    assert not takes(weight, torch.float64)
    assert not takes(torch.empty(16, 300).T, torch.float32)
    monkeypatch.setattr(loss_module, "_triton_is_installed", lambda: False)
    assert not takes(weight, torch.float32)


def test_the_operator_around_it_is_well_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, as it is on CUDA: one graph when compiled, gradients scaled and not used up."""
    monkeypatch.setattr(loss_module, "_plain", loss_module._fused)
    x, weight, targets = inputs()
    for need_grad in (False, True):
        given = x.requires_grad_(need_grad), weight.requires_grad_(need_grad)
        arguments = (*given, targets, torch.float32, need_grad)
        torch.library.opcheck(loss_module._forward, arguments)
    loss = loss_module.linear_cross_entropy(x, weight, targets)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, (x, weight), retain_graph=True)
    exact = summed(x, weight, targets)
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-6, atol=0)
    for once, more, wanted in zip(first, thrice, exact[1:3], strict=True):
        limit = 1e-6 * float(wanted.abs().max())
        assert float((once * exact[3] - wanted).abs().max()) <= limit
        assert float((more * exact[3] / 3 - wanted).abs().max()) <= limit
    for again, once in zip(torch.autograd.grad(loss, (x, weight)), first, strict=True):
        assert torch.equal(again, once)
