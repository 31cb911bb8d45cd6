"""The loss on a GPU, as training calls it. There: pytest tests/model/test_loss_cuda.py

What the kernel and the products compute is in test_triton_loss.py, which runs there too.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashgpt.measure.memory import peak_bytes
from flashgpt.model import loss as loss_module
from flashgpt.model.loss import IGNORE, linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(rows: int = 300, width: int = 64, vocab: int = 1001, seed: int = 0) -> list[Tensor]:
    """x_MD, weight_VD, which need gradients, and targets_M; a tenth of them is not counted."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, device="cuda")
    weight = 3 / width**0.5 * torch.randn(vocab, width, generator=generator, device="cuda")
    targets = torch.randint(vocab, (rows,), generator=generator, device="cuda")
    targets[::10] = IGNORE
    return [x.requires_grad_(), weight.requires_grad_(), targets]


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition, with all logits; in fp32 from the logits on."""
    logits = x @ weight.T
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, ignore_index=IGNORE)


def results(
    loss: Loss, given: list[Tensor], autocast: torch.dtype | None = None, upstream: float = 1.0
) -> list[Tensor]:
    """Loss and gradients in float64; the loss may be scaled on the way, as fp16 needs."""
    with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
        value = loss(*given)
    gradients = torch.autograd.grad(value * upstream, given[:2])
    return [value.detach().double(), *(gradient.double() / upstream for gradient in gradients)]


def over(
    found: list[Tensor], same: list[Tensor], exact: list[Tensor], dtype: torch.dtype
) -> list[str]:
    """Gradients that err more than twice what PyTorch's operators do in the same dtype."""
    wrong = []
    for i, name in ((1, "dx"), (2, "dweight")):
        floor = 2 * 0.3 * torch.finfo(dtype).eps / 2 * float(exact[i].abs().max())
        error, usual = found[i] - exact[i], same[i] - exact[i]
        if not all(
            measure(error) <= 2 * measure(usual) + floor
            for measure in (lambda e: e.abs().max(), lambda e: e.square().mean().sqrt())
        ):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("shape", [(300, 64, 1001), (2048, 768, 50257)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(dtype, False) for dtype in DTYPES] + [(dtype, True) for dtype in DTYPES[1:]],
    ids=str,
)
def test_the_loss_errs_no_more_than_pytorchs_operators(
    dtype: torch.dtype, autocast: bool, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss: a logit errs by its sum over D in fp32 and by being rounded; so do the log-sum-exp
    and the target's logit, and the rest by less than 2^-17."""
    monkeypatch.setattr(loss_module, "CHUNK_ROWS_TRITON", 768)
    x, weight, targets = inputs(*shape)
    low = [t.detach().to(dtype) for t in (x, weight)]
    kind = torch.float32 if autocast else dtype
    given = [t.to(kind, copy=True).requires_grad_() for t in low]
    cast = dtype if autocast else None
    upstream = 1024.0 if dtype == torch.float16 else 1.0
    exact = results(plain, [*(t.to(torch.float64).requires_grad_() for t in low), targets])
    same = results(plain, [*given, targets], cast, upstream)
    found = results(linear_cross_entropy, [*given, targets], cast, upstream)
    assert over(found, same, exact, dtype) == []
    sums = float((low[0].abs().double() @ low[1].abs().double().T).max())
    largest = float((low[0].double() @ low[1].double().T).abs().max())
    logit = sums * shape[1] * 2.0**-24 + largest * torch.finfo(dtype).eps / 2
    assert float((found[0] - exact[0]).abs()) <= 2 * logit + 2.0**-17
    for wrong in ([*given, targets.roll(1)], [given[0], given[1] * 1.1, targets]):
        faulty = results(linear_cross_entropy, wrong, cast, upstream)
        assert over(faulty, same, exact, dtype) == ["dx", "dweight"]


def calls_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the rows of each launch."""
    from flashgpt.model import triton_loss

    launched, launch = [], triton_loss.cross_entropy_

    def counted(logits: Tensor, *rest: object) -> None:
        launched.append(len(logits))
        launch(logits, *rest)

    monkeypatch.setattr(triton_loss, "cross_entropy_", counted)
    return launched


def test_the_kernel_serves_and_pytorchs_operators_where_it_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched = calls_of_the_kernel(monkeypatch)
    monkeypatch.setattr(loss_module, "CHUNK_ROWS_TRITON", 128)
    given = inputs()
    found = results(linear_cross_entropy, given)
    assert launched == [128, 128, 44]
    monkeypatch.setattr(loss_module, "_triton_is_installed", lambda: False)
    for got, same in zip(results(linear_cross_entropy, given), found, strict=True):
        torch.testing.assert_close(got, same, rtol=1e-4, atol=1e-6)
    assert len(launched) == 3


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_compiled_in_one_graph_it_is_the_same(autocast: torch.dtype | None) -> None:
    given = inputs()
    compiled = torch.compile(lambda *a: linear_cross_entropy(*a), fullgraph=True)
    eager = results(linear_cross_entropy, given, autocast)
    for got, same in zip(results(compiled, given, autocast), eager, strict=True):
        assert torch.equal(got, same)


def test_nothing_waits_for_the_gpu() -> None:
    given = inputs()
    results(linear_cross_entropy, given, torch.bfloat16)  # compiles the kernel
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(linear_cross_entropy, given, torch.bfloat16)
        with pytest.raises(RuntimeError, match="synchroniz"):
            given[2].sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_repeats_it_on_other_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ROWS_TRITON", 128)
    given = inputs()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        results(linear_cross_entropy, given, torch.bfloat16)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(linear_cross_entropy, given, torch.bfloat16)
    other = inputs(seed=1)
    with torch.no_grad():
        for old, new in zip(given, other, strict=True):
            old.copy_(new)
    graph.replay()
    wanted = results(linear_cross_entropy, other, torch.bfloat16)
    before = results(linear_cross_entropy, inputs(), torch.bfloat16)
    for got, same, stale in zip(captured, wanted, before, strict=True):
        limit = 2.0**-6 * float(same.abs().max())  # another algorithm may round another way
        assert float((got - same).abs().max()) <= limit
        assert same.dim() == 0 or float((stale - same).abs().max()) > limit


def test_a_graph_that_is_kept_gives_the_same_gradients_twice() -> None:
    given = inputs()
    loss = linear_cross_entropy(*given)
    first = torch.autograd.grad(loss, given[:2], retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, given[:2], retain_graph=True)
    again = torch.autograd.grad(loss, given[:2])
    for a, b, c in zip(first, again, thrice, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_second_derivative_is_refused() -> None:
    x, weight, targets = inputs()
    loss = linear_cross_entropy(x, weight, targets)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_the_logits_of_the_whole_batch_are_never_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ROWS_TRITON", 1024)
    given = inputs(rows=16384, width=64, vocab=50257)

    def peak(loss: Loss) -> int:
        return peak_bytes(lambda: results(loss, given, torch.bfloat16), torch.device("cuda"))

    whole = 16384 * 50257 * 2
    assert peak(linear_cross_entropy) < whole / 4 < whole < peak(plain)


def test_rows_beyond_32_bits_are_reached() -> None:
    from flashgpt.model.triton_loss import cross_entropy_

    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device="cuda")
    logits = far.as_strided((3, 64), (2**30, 1))
    logits.copy_(torch.randn(3, 64))
    near, targets = logits.clone(), torch.tensor([0, 5, 63], device="cuda")
    losses = torch.empty(2, 3, device="cuda")
    cross_entropy_(logits, targets, losses[0], 64, IGNORE, True)
    cross_entropy_(near, targets, losses[1], 64, IGNORE, True)
    assert torch.equal(losses[0], losses[1]) and torch.equal(logits, near)


@pytest.mark.parametrize("need_grad", [False, True])
def test_the_operator_is_well_formed(need_grad: bool) -> None:
    x, weight, targets = (
        t.detach().requires_grad_(t.requires_grad and need_grad) for t in inputs()
    )
    torch.library.opcheck(loss_module._forward, (x, weight, targets, torch.float32, need_grad))
