"""Muon: its Newton-Schulz, one step against a plain one in float64, refusals.

pytest tests/train/test_muon.py
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgpt.train.muon import Muon, orthogonalise

SHAPES = [(1, 1), (8, 8), (12, 40), (40, 12), (64, 64)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_spectrum(rows: int, columns: int, smallest: float) -> tuple[Tensor, Tensor, Tensor]:
    """U, s and V^T of a matrix of Frobenius norm 1, singular values falling to about `smallest`."""
    u, _, vt = torch.linalg.svd(random(rows, columns), full_matrices=False)
    s = torch.logspace(0, math.log10(smallest), u.shape[1], dtype=torch.float64)
    return u, s / s.norm(), vt


def five_steps(s: Tensor) -> Tensor:
    """What the published polynomial makes of singular values."""
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def budget(rows: int, columns: int, dtype: torch.dtype) -> float:
    """What rounding may change in an entry of an orthogonalised matrix.

    A step has three products, each with sums of at most max(rows, columns) terms of norm at most 2
    and coefficients up to 5, so errs by at most 30 max(rows, columns) roundings; the steps behind
    stretch an error by at most the polynomial's slope, 3.4445 each: 3.4445^4 + .. + 1 = 199 in all.
    """
    return 199 * 30 * max(rows, columns) * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("smallest", [1.0, 0.3, 1e-2, 1e-6])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_follow_the_published_polynomial(
    shape: tuple[int, int], smallest: float
) -> None:
    u, s, vt = with_spectrum(*shape, smallest)
    matrix = u * s @ vt
    found = orthogonalise(torch.stack([matrix, 7e-3 * matrix, matrix.flip(0)]))
    wanted = u * five_steps(s) @ vt
    limit = budget(*shape, torch.float64)
    assert limit < 1e-8
    for got in (found[0], found[1], found[2].flip(0)):
        assert (got - wanted).abs().max() <= limit
    values = torch.linalg.svdvals(found[0])
    near = values[: int((s >= 0.0015).sum())] if smallest < 1e-2 else values
    assert len(near) and near.min() >= 0.67 and values.max() <= 1.21
    other = u * five_steps(1.001 * s) @ vt
    assert (found[0] - other).abs().max() > limit


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(32, 128), (128, 32), (48, 16)])
def test_random_matrices_come_into_the_band(shape: tuple[int, int], seed: int) -> None:
    x = random(*shape, seed=seed, dtype=torch.float32)
    found = orthogonalise(x[None])[0]
    assert found.dtype == torch.float32
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.68 and values.max() < 1.21
    wanted = orthogonalise(x[None].double())[0]
    assert (found - wanted).abs().max() <= budget(*shape, torch.float32)


def test_matrices_of_a_batch_do_not_meet() -> None:
    x = random(5, 6, 9)
    alone = torch.cat([orthogonalise(matrix[None]) for matrix in x])
    assert (orthogonalise(x) - alone).abs().max() <= budget(6, 9, torch.float64)
    assert torch.equal(orthogonalise(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def plain_step(
    weight: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    *,
    mu: float = 0.95,
    nesterov: bool = True,
    decay: float = 0.1,
    adamw_scale: bool = True,
    lr: float = 0.02,
) -> tuple[Tensor, Tensor]:
    """Weight and momentum after one step of one matrix, through its singular vectors."""
    momentum = mu * momentum + (1 - mu) * gradient
    ahead = mu * momentum + (1 - mu) * gradient if nesterov else momentum
    u, s, vt = torch.linalg.svd(ahead, full_matrices=False)
    update = u * five_steps(s / s.norm()) @ vt
    rows, columns = weight.shape
    scale = (
        0.2 * math.sqrt(max(rows, columns)) if adamw_scale else math.sqrt(max(1, rows / columns))
    )
    return weight - lr * decay * weight - lr * scale * update, momentum


def run_plainly(weights: list[Tensor], split: int, steps: int, **changes: Any) -> list[Tensor]:
    found = []
    for index, weight in enumerate(weights):
        parts = []
        for part, matrix in enumerate(weight.chunk(split)):
            momentum = torch.zeros_like(matrix)
            for step in range(steps):
                gradient = gradient_of(weight, index, step).chunk(split)[part]
                matrix, momentum = plain_step(matrix, gradient, momentum, **changes)
            parts.append(matrix)
        found.append(torch.cat(parts))
    return found


def gradient_of(weight: Tensor, index: int, step: int) -> Tensor:
    return random(*weight.shape, seed=100 * step + index)


def run_batched(weights: list[Tensor], split: int, steps: int) -> list[Tensor]:
    parameters = [weight.clone().requires_grad_() for weight in weights]
    muon = Muon(parameters, lr=0.02, weight_decay=0.1, split=split)
    for step in range(steps):
        for index, parameter in enumerate(parameters):
            parameter.grad = gradient_of(parameter, index, step)
        muon.step()
    return [parameter.detach() for parameter in parameters]


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


WRONG: list[dict[str, Any]] = [
    *({"mu": 0.9}, {"nesterov": False}, {"decay": 0.0}, {"adamw_scale": False}, {"lr": 0.021})
]


@pytest.mark.parametrize("split", [1, 3])
def test_batched_steps_equal_plain_ones_in_float64(split: int) -> None:
    """Budget: each of 3 steps adds an update that errs by `budget` (the plain one's singular
    vectors by less), times lr 0.2 sqrt(18) < 0.02."""
    weights = [
        random(*shape, seed=9) for shape in [(18, 6), (6, 18), (18, 6), (6, 18), (6, 6), (18, 6)]
    ]
    found = run_batched(weights, split, steps=3)
    limit = 3 * 2 * 0.02 * budget(18, 6, torch.float64)
    assert apart(found, run_plainly(weights, split, steps=3)) <= limit < 1e-9
    for change in WRONG:
        assert apart(found, run_plainly(weights, split, steps=3, **change)) > 1e-3, change
    assert apart(found, run_plainly(weights, 4 - split, steps=3)) > 1e-3


def test_one_parameter_split_in_three_equals_three_parameters() -> None:
    whole = random(15, 7)
    split = run_batched([whole], 3, steps=1)
    parameters = [part.clone().requires_grad_() for part in whole.chunk(3)]
    muon = Muon(parameters, lr=0.02, weight_decay=0.1)
    for parameter, gradient in zip(parameters, gradient_of(whole, 0, 0).chunk(3), strict=True):
        parameter.grad = gradient
    muon.step()
    assert torch.equal(split[0], torch.cat([parameter.detach() for parameter in parameters]))


@pytest.mark.parametrize("shape", [(32, 32), (32, 128), (128, 32)])
def test_an_update_is_as_large_as_adamws(shape: tuple[int, int]) -> None:
    """Singular values in 0.68 .. 1.21 make a root mean square of 0.136 .. 0.242, whatever shape."""
    parameter = torch.zeros(shape, requires_grad=True)
    parameter.grad = random(*shape, dtype=torch.float32) * 1e-4
    Muon([parameter], lr=1.0, weight_decay=0.1).step()
    assert 0.136 <= parameter.detach().square().mean().sqrt() <= 0.242


def test_a_refused_step_changes_no_bit_and_the_next_is_as_if_it_had_not_been() -> None:
    start = [random(6, 4, seed=seed, dtype=torch.float32) for seed in (7, 8)]
    start[0][0, 0] = -0.0

    def run(refusals: bool) -> list[Tensor]:
        parameters = [weight.clone().requires_grad_() for weight in start]
        muon = Muon(parameters, 0.02, 0.1, split=2)

        def step(gradients: list[Tensor], refused: float) -> list[Tensor]:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            muon.found_inf = torch.tensor(refused) if refusals else None
            muon.step()
            moments = [muon.state[parameter]["momentum_buffer"] for parameter in parameters]
            return [t.detach().clone().view(torch.int32) for t in (*parameters, *moments)]

        before = [t.view(torch.int32) for t in (*start, *map(torch.zeros_like, start))]
        for number in range(3):
            if refusals:
                after = step([torch.full_like(weight, torch.nan) for weight in start], 1.0)
                assert all(map(torch.equal, after, before))
            before = step([gradient_of(w, i, number).float() for i, w in enumerate(start)], 0.0)
        return before

    assert all(map(torch.equal, run(refusals=True), run(refusals=False)))


def test_a_step_asks_the_device_for_nothing() -> None:
    """On the meta device there is nothing to answer."""
    parameter = torch.nn.Parameter(torch.empty(6, 4, device="meta"))
    parameter.grad = torch.empty_like(parameter)
    muon = Muon([parameter], 0.02, 0.1, split=3)
    muon.found_inf = torch.empty((), device="meta")
    muon.step()
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(muon.found_inf)


def test_a_parameter_without_a_gradient_stays() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    parameters[0].grad = torch.eye(3)
    muon = Muon(parameters, 0.02, 0.1)
    muon.step()
    assert torch.equal(parameters[1], torch.ones(3, 3))
    assert not torch.equal(parameters[0], torch.ones(3, 3))
    assert parameters[1] not in muon.state
