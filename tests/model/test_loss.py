"""Output head and loss in one: numbers, gradients, memory. pytest tests/model/test_loss.py"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashgpt.model import loss as loss_module
from flashgpt.model.loss import IGNORE, linear_cross_entropy


def inputs(rows: int = 50, width: int = 12, vocab: int = 37, ignored: int = 9) -> list[Tensor]:
    """x_MD, weight_VD, targets_M; some targets ignored."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator)
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[torch.randperm(rows, generator=generator)[:ignored]] = IGNORE
    return [x, weight, targets]


def dense(x: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """Loss and gradients of the definition, in float64."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    loss = F.cross_entropy(x @ weight.T, targets, ignore_index=-100)
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight))]


def ours(x: Tensor, weight: Tensor, targets: Tensor, upstream: float = 1.0) -> list[Tensor]:
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    loss = linear_cross_entropy(x, weight, targets)
    return [loss.detach(), *torch.autograd.grad(loss * upstream, (x, weight))]


@pytest.mark.parametrize("chunk", [None, 37, 37 * 7, 37 * 50, 1])
@pytest.mark.parametrize("ignored", [0, 9])
def test_loss_and_gradients_are_those_of_cross_entropy(
    chunk: int | None, ignored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, targets = inputs(ignored=ignored)
    if chunk is not None:
        monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk)
        monkeypatch.setattr(loss_module, "CHUNK_MIN_ROWS", 1)
    wanted = dense(x, weight, targets)
    found = ours(x.double(), weight.double(), targets)
    for got, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-14)
    assert ignored == 0 or not found[1][targets == IGNORE].any()


def test_fp32_errs_no_more_than_dense_fp32() -> None:
    x, weight, targets = inputs(rows=400, width=64, vocab=300)
    exact = dense(x, weight, targets)
    x32, weight32 = (t.detach().requires_grad_() for t in (x, weight))
    plain = F.cross_entropy(x32 @ weight32.T, targets)
    reference = [plain.detach(), *torch.autograd.grad(plain, (x32, weight32))]
    found = ours(x, weight, targets)
    assert {t.dtype for t in found} == {torch.float32}
    for got, same, wanted in zip(found, reference, exact, strict=True):
        floor = 2 * 0.3 * 2**-23 * wanted.abs().max()
        assert (got - wanted).abs().max() <= 2 * (same - wanted).abs().max() + floor
        assert (got - wanted).square().mean().sqrt() <= (
            1.25 * (same - wanted).square().mean().sqrt() + floor
        )


@pytest.mark.parametrize("fault", ["no mean", "shifted targets", "ignored rows counted"])
def test_the_comparison_tells_faults_apart(fault: str) -> None:
    x, weight, targets = inputs()
    exact = dense(x, weight, targets)
    wrong = targets.roll(1) if fault == "shifted targets" else targets
    if fault == "ignored rows counted":
        wrong = targets.clamp(min=0)
    found = ours(x.double(), weight.double(), wrong, upstream=41.0 if fault == "no mean" else 1.0)
    for got, wanted in list(zip(found, exact, strict=True))[1:]:
        assert not torch.allclose(got, wanted, rtol=1e-3)


def test_the_upstream_gradient_is_applied() -> None:
    x, weight, targets = inputs()
    once, thrice = ours(x, weight, targets), ours(x, weight, targets, upstream=-3.0)
    for a, b in zip(once[1:], thrice[1:], strict=True):
        torch.testing.assert_close(b, -3 * a, rtol=1e-6, atol=0)


def test_without_any_counted_target_it_is_nan_as_in_pytorch() -> None:
    x, weight, targets = inputs()
    targets.fill_(IGNORE)
    assert linear_cross_entropy(x, weight, targets).isnan()
    assert F.cross_entropy(x @ weight.T, targets).isnan()


def test_huge_logits_stay_finite() -> None:
    x, weight, targets = inputs()
    found = ours(x * 1000, weight * 10, targets)
    exact = dense(x * 1000, weight * 10, targets)
    for got, wanted in zip(found, exact, strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    x, weight, targets = inputs()
    loss = linear_cross_entropy(x.requires_grad_(), weight, targets)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_gradients_of_either_input_alone_and_none_without_grad() -> None:
    x, weight, targets = inputs()
    _, dx, dw = ours(x, weight, targets)
    for first in (True, False):
        leaves = x.clone().requires_grad_(first), weight.clone().requires_grad_(not first)
        linear_cross_entropy(*leaves, targets).backward()
        got, other = (leaves[0].grad, leaves[1].grad) if first else (leaves[1].grad, leaves[0].grad)
        assert other is None
        assert got is not None
        assert torch.equal(got, dx if first else dw)
    with torch.no_grad():
        assert not linear_cross_entropy(x.requires_grad_(), weight, targets).requires_grad


class Largest(TorchDispatchMode):
    """Elements of the largest tensor made, also inside our operator."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.name() == "flashgpt::linear_cross_entropy":
            with self:
                return loss_module._forward._init_fn(*args)
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return found


def test_never_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, targets = inputs(rows=640, width=8, vocab=256)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 32 * 256)
    monkeypatch.setattr(loss_module, "CHUNK_MIN_ROWS", 16)
    x.requires_grad_()
    with Largest() as seen:
        linear_cross_entropy(x, weight, targets).backward()
    assert seen.elements == 32 * 256
    with Largest() as seen:
        F.cross_entropy(x @ weight.T, targets).backward()
    assert seen.elements == 640 * 256


@pytest.mark.parametrize("need_grad", [False, True])
def test_the_operator_is_well_formed(need_grad: bool) -> None:
    x, weight, targets = inputs()
    if need_grad:
        x, weight = x.requires_grad_(), weight.requires_grad_()
    arguments = (x, weight, targets, torch.float32, need_grad)
    torch.library.opcheck(loss_module._forward, arguments)


def test_half_precision_and_autocast_sum_in_fp32() -> None:
    x, weight, targets = inputs()
    exact = dense(x.half(), weight.half(), targets)[0]
    half = linear_cross_entropy(x.half(), weight.half(), targets)
    with torch.autocast("cpu", dtype=torch.float16):
        cast = linear_cross_entropy(x, weight, targets)
    for found in (half, cast):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)
    assert not torch.equal(cast, linear_cross_entropy(x, weight, targets))


def test_the_softmax_of_half_precision_is_computed_in_fp32() -> None:
    """Whole numbers: the logits are exact in fp16, so only what follows can err."""
    x, weight, targets = inputs()
    x, weight = x.mul(4).round(), weight.mul(2).round()
    exact = dense(x, weight, targets)[0]
    found = linear_cross_entropy(x.half(), weight.half(), targets)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, weight, targets = inputs()
    with pytest.raises(ValueError, match=r"weight must be \[V, D\] for x \[M, D\], got \[37, 11\]"):
        linear_cross_entropy(x, weight[:, 1:], targets)
    with pytest.raises(ValueError, match=r"weight must be \[V, D\]"):
        linear_cross_entropy(x[None], weight, targets)
    with pytest.raises(ValueError, match=r"targets must be \[50\], got \[49\]"):
        linear_cross_entropy(x, weight, targets[1:])


def test_only_minus_100_is_left_out() -> None:
    """Other negative targets are refused, not taken for token 0."""
    x, weight = torch.randn(4, 8), torch.randn(5, 8)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        linear_cross_entropy(x, weight, torch.tensor([1, -1, 2, -100]))
