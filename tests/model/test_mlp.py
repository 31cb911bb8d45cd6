"""The fused feed-forward layer: numbers, gradients, operators. pytest tests/model/test_mlp.py

Without a GPU its operators are PyTorch's own. test_triton_mlp.py and test_gluon_mlp.py judge the
kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashgpt.model import mlp
from flashgpt.model.block import FeedForward
from tests.model.mlp_limits import HOPPER, gpu

GPU = (pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU"))
FORMS = pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
Layer = Callable[[Tensor], Tensor]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused way is taken, in float64, by PyTorch's operators."""
    monkeypatch.setattr(mlp, "_capability", lambda device: mlp.HOPPER)
    monkeypatch.setattr(mlp, "TYPES", {torch.float64})


def layers(
    width: int,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    activation: str = "gelu_new",
) -> FeedForward:
    """A feed-forward layer whose biases matter."""
    torch.manual_seed(0)
    made = FeedForward(width, activation)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=1.0 if parameter.dim() == 1 else width**-0.5)
    return made.to(device, dtype)


def fused(made: FeedForward) -> Layer:
    return lambda x: mlp.feed_forward(x, made.c_fc, made.gelu, made.c_proj)


def apart(made: FeedForward) -> Layer:
    return lambda x: made.c_proj(made.gelu(made.c_fc(x)))


def results(layer: Layer, made: FeedForward, x: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """Output and gradients, in float64 on the CPU."""
    x = x.detach().requires_grad_()
    out = layer(x)
    grads = torch.autograd.grad(out, [x, *made.parameters()], dout.to(out.dtype))
    names = ["out", "x", *(name for name, _ in made.named_parameters())]
    return {name: t.detach().double().cpu() for name, t in zip(names, (out, *grads), strict=True)}


@FORMS
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 63, 16), (3, 65, 8)], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_it_is_the_three_layers_one_after_the_other(
    shape: tuple[int, int, int], compiled: bool, activation: str
) -> None:
    made = layers(shape[-1], activation=activation)
    x, dout = torch.randn(2, *shape, dtype=torch.float64)
    layer = fused(made)
    if compiled:
        layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    wanted = results(apart(made), made, x, dout)
    for name, found in results(layer, made, x, dout).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-12, atol=1e-12, msg=name)


def test_a_second_derivative_is_refused() -> None:
    made = layers(8)
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    out = fused(made)(x)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_operators_keep_pytorchs_rules(device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def some(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.randn(*shape, dtype=dtype, device=device) for shape in shapes)

    operators, operands = torch.ops.flashgpt, some((5, 8), (8, 16), (5, 16))
    for tanh in (False, True):
        forward = [t.requires_grad_() for t in some((5, 8), (16, 8), (16,))]
        torch.library.opcheck(operators.linear_gelu.default, (*forward, tanh))
        after = [t.requires_grad_() for t in some((5, 16), (5, 16), (16,), (8, 16), (8,))]
        torch.library.opcheck(operators.linear_of_gelu.default, (*after, tanh))
        torch.library.opcheck(operators.matmul_dgelu.default, (*operands, tanh))


def test_it_is_for_training_in_half_precision_on_a_gpu() -> None:
    made = layers(8, torch.float32)
    assert not mlp.serves(torch.randn(1, 2, 8), made.c_fc, made.gelu, made.c_proj)


@FORMS
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("change", "served"),
    [
        ({}, True),
        ({"_capability": 8}, False),
        ({"_capability": 10}, False),
        ({"_triton_is_installed": False}, False),
        ({"hip": "6.2"}, False),  # of which some have capability 9
    ],
    ids=str,
)
def test_it_is_for_hopper_with_triton(
    change: dict[str, Any], served: bool, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = {"_capability": 9, "_triton_is_installed": True, "hip": None} | change
    monkeypatch.setattr(torch.version, "hip", usual.pop("hip"))
    for name, value in usual.items():
        monkeypatch.setattr(mlp, name, lambda *_, value=value: value)
    made, x = layers(8, activation=activation), torch.randn(2, 3, 8, dtype=torch.float64)
    assert mlp.serves(x, made.c_fc, made.gelu, made.c_proj) == served


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("change", ["no gradient", "fp32", "width", "no bias"])
def test_else_it_is_three_layers(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "_triton_is_installed", lambda: True)
    made = layers(12 if change == "width" else 8)
    x = torch.randn(2, 3, made.c_fc.in_features, dtype=torch.float64)
    if change == "fp32":
        made, x = made.float(), x.float()
    if change == "no bias":
        made.c_proj = nn.Linear(32, 8, bias=False).double()
    with torch.set_grad_enabled(change != "no gradient"):
        assert not mlp.serves(x, made.c_fc, made.gelu, made.c_proj)


@pytest.fixture
def choose() -> Iterator[Callable[[], Any]]:
    """What chooses the kernels, anew."""
    mlp._kernels.cache_clear()
    yield mlp._kernels
    mlp._kernels.cache_clear()


@pytest.mark.parametrize(
    ("version", "interpreted", "name"),
    [
        ("3.5.1", False, "triton_mlp"),
        ("3.6.0", False, "gluon_mlp"),
        ("3.6.0", True, "triton_mlp"),
        ("3.10.0", False, "triton_mlp"),
    ],
)
def test_gluon_is_taken_where_it_is_known(
    version: str,
    interpreted: bool,
    name: str,
    choose: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith(mlp.GLUON):
        pytest.skip(f"the Gluon of Triton {triton.__version__} is not known")
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpreted)
    assert choose().__name__ == f"flashgpt.model.{name}"


@FORMS
@pytest.mark.usefixtures("as_on_a_gpu")
def test_where_it_serves_a_compiled_layer_stays_one_graph(activation: str) -> None:
    made = layers(8, activation=activation)
    x, dout = torch.randn(2, 3, 8, dtype=torch.float64)[:, None].unbind()
    assert mlp.serves(x, made.c_fc, made.gelu, made.c_proj)
    wanted = results(apart(made), made, x, dout)
    torch.compiler.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for name, found in results(compiled, made, x, dout).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-12, atol=1e-12, msg=name)


@FORMS
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("recomputed", [False, True])
def test_where_a_block_is_recomputed_a_compiled_layer_keeps_nothing(
    recomputed: bool, activation: str
) -> None:
    made = layers(8, activation=activation)
    x, dout = torch.randn(2, 3, 8, dtype=torch.float64)[:, None].unbind()

    def block(x: Tensor) -> Tensor:
        return checkpoint(made, x, use_reentrant=False) if recomputed else made(x)

    wanted = results(apart(made), made, x, dout)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager_decomp_partition")
    kept: list[list[int]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(list(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = results(compiled, made, x, dout)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-12, atol=1e-12, msg=name)
    assert [3, 8] in kept or [1, 3, 8] in kept
    assert ([3, 32] in kept) != recomputed


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_layer_with_a_hook_or_in_place_of_ours_is_called() -> None:
    made = layers(8)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    seen: list[nn.Module] = []
    for layer in (made.c_fc, made.c_proj):
        hook = layer.register_forward_hook(lambda module, *_: seen.append(module))
        made(x)
        hook.remove()
    assert seen == [made.c_fc, made.c_proj]

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    before = made(x)
    scaled = Scaled(32, 8).double()
    scaled.load_state_dict(made.c_proj.state_dict())
    made.c_proj = scaled
    torch.testing.assert_close(made(x), 2 * before)
    made.c_proj = layers(8).c_proj
    made.c_proj.forward = scaled.forward  # type: ignore[assignment,method-assign]  # as offloading does
    torch.testing.assert_close(made(x), 2 * before)
    made.c_proj = nn.Linear(32, 8, bias=False).double()
    torch.testing.assert_close(made(x), apart(made)(x))


@FORMS
def test_frozen_layers_get_no_gradient(activation: str) -> None:
    made = layers(8, activation=activation)
    x, dout = torch.randn(2, 3, 8, dtype=torch.float64).requires_grad_().unbind()
    wanted = torch.autograd.grad(apart(made)(x), [x, made.c_fc.bias], dout)
    made.c_fc.weight.requires_grad_(False)
    made.c_proj.requires_grad_(False)
    out = fused(made)(x)
    found = torch.autograd.grad(out, [x, made.c_fc.bias], dout.detach())
    for got, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="not require grad"):
        torch.autograd.grad(fused(made)(x), made.c_fc.weight, dout.detach())


def over(found: dict[str, Tensor], usual: dict[str, Tensor], exact: dict[str, Tensor]) -> set[str]:
    """What errs more than twice what three layers in the same dtype do."""
    eps = torch.finfo(torch.bfloat16).eps
    wrong = set()
    for name, value in exact.items():
        floor = 2 * 0.3 * eps / 2 * float(value.abs().max())
        error, its = found[name] - value, usual[name] - value
        worst = error.abs().max() <= 2 * its.abs().max() + floor
        typical = error.square().mean().sqrt() <= 2 * its.square().mean().sqrt() + floor
        if not (worst and typical):
            wrong.add(name)
    return wrong


def gpu_results(
    shape: tuple[int, int, int], dtype: torch.dtype, activation: str = "gelu_new"
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Of FeedForward under autocast, of three layers under autocast, and in float64."""
    made = layers(shape[-1], torch.float32, "cuda", activation).to(dtype).float()
    exact_of = layers(shape[-1], activation=activation)
    exact_of.load_state_dict(made.state_dict())
    x, dout = torch.randn(2, *shape, device="cuda").to(dtype)
    with torch.autocast("cuda", dtype):
        assert mlp.serves(x, made.c_fc, made.gelu, made.c_proj)
        found, usual = results(made, made, x, dout), results(apart(made), made, x, dout)
    exact = results(apart(exact_of), exact_of, x.double().cpu(), dout.double().cpu())
    return found, usual, exact


@gpu
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 65, 64), (2, 1023, 192), (2, 1024, 768)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@FORMS
def test_errors_on_a_gpu_are_those_of_the_three_layers(
    shape: tuple[int, int, int], dtype: torch.dtype, activation: str
) -> None:
    assert not over(*gpu_results(shape, dtype, activation))


@gpu
@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ("no bias", "out"),
        ("another function", "out"),
        ("derivative of another place", "c_fc.weight"),
    ],
)
def test_a_wrong_end_is_seen(change: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = mlp._kernels()

    def linear_gelu(x: Tensor, w: Tensor, b: Tensor, tanh: bool) -> Any:
        act, pre = right.linear_gelu(x, w, 0 * b if change == "no bias" else b, tanh)
        return (nn.functional.gelu(3 * pre) / 3 if change == "another function" else act), pre

    def matmul_dgelu(dout: Tensor, w: Tensor, pre: Tensor, tanh: bool) -> Any:
        moved = change == "derivative of another place"
        return right.matmul_dgelu(dout, w, pre.roll(1, 0) if moved else pre, tanh)

    kernels = SimpleNamespace(linear_gelu=linear_gelu, matmul_dgelu=matmul_dgelu)
    monkeypatch.setattr(mlp, "_kernels", lambda: kernels)
    assert wrong in over(*gpu_results((3, 65, 64), torch.bfloat16))


@gpu
@pytest.mark.parametrize("tanh", [True, False])
def test_operands_may_be_unaligned_and_transposed(tanh: bool) -> None:
    x, dout, pre, weight, bias = (
        torch.randn(*shape, device="cuda").bfloat16()
        for shape in ((65, 64), (65, 64), (65, 256), (256, 64), (256,))
    )
    odd_x = torch.empty(65 * 64 + 1, device="cuda").bfloat16()[1:].view(65, 64).copy_(x)
    odd_dout, odd_weight = (t.t().contiguous().t() for t in (dout, weight))
    forward, backward = torch.ops.flashgpt.linear_gelu, torch.ops.flashgpt.matmul_dgelu
    odd = forward(odd_x, odd_weight, bias, tanh)
    assert all(map(torch.equal, odd, forward(x, weight, bias, tanh)))
    odd = backward(odd_dout, odd_weight.t(), pre, tanh)
    assert all(map(torch.equal, odd, backward(dout, weight.t().contiguous(), pre, tanh)))
