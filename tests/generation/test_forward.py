"""The forward pass without its modules' calls: the model's own numbers, and whom it serves.

pytest tests/generation/test_forward.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashgpt.generation import forward
from flashgpt.generation.cache import KVCache
from flashgpt.generation.decode import decode_rows
from flashgpt.generation.forward import (
    Forward,
    OneDNNProduct,
    PackedProduct,
    Product,
    has_onednn,
    weights_of,
)
from flashgpt.generation.rows import Row
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import SampleConfig, TrainConfig
from flashgpt.train.optimizer import build

Make = Callable[..., GPTModel]


def logits_of(model: GPTModel, ids: Tensor, chunks: list[int], product: type[Product]) -> Tensor:
    """Logits after ids that come in chunks."""
    weight = model.wte.weight
    cache = KVCache(model.cfg, len(ids), weight.device, weight.dtype)
    with torch.inference_mode():
        for part in ids.split(chunks, 1):
            found = Forward(model, product)(part, cache)
    return found


@pytest.mark.parametrize("chunks", [[7], [6, 1], [3, 1, 3], [1] * 7], ids=str)
@pytest.mark.parametrize("product", [Product, OneDNNProduct, PackedProduct])
@pytest.mark.parametrize(
    "shape", [{}, {"activation": "gelu", "qkv_bias": True}, {"tie_weights": True}], ids=str
)
def test_logits_are_the_models(
    make_model: Make, shape: dict[str, Any], product: type[Product], chunks: list[int]
) -> None:
    """In float64 to what rounding can do there; oneDNN has products in fp32."""
    model = make_model(**shape)
    fp32 = product is not Product
    if fp32 and not has_onednn(model):
        pytest.skip("this PyTorch has no oneDNN")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # GPT-2 begins with equal ones
                parameter.normal_(mean=float(len(parameter) == 16), std=0.5)
    ids = torch.randint(257, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids)[:, -1]
    limit = 2e-5 if fp32 else 1e-12
    found = logits_of(model if fp32 else model.double(), ids, chunks, product)
    assert (found - exact).abs().max() <= limit * exact.abs().max()
    assert exact.std() > 0.5


def test_models_that_compute_something_else_are_refused(make_model: Make) -> None:
    model = make_model()
    assert {id(p) for p in weights_of(model) or ()} == {id(p) for p in model.parameters()}
    hooked, replaced, own_forward, mixed, pinned, off = (make_model() for _ in range(6))
    no_bias, no_gain, other_gelu, head_bias = (make_model() for _ in range(4))
    hooked.h[0].mlp.register_forward_hook(lambda *_: None)
    replaced.h[1].ln_1 = nn.Identity()
    own_forward.lm_head.forward = lambda x: x  # type: ignore[method-assign]
    mixed.ln_f.double()
    pinned.set_attention(kernel="blocked")
    off.set_attention(use_flash=False)
    no_bias.h[0].mlp.c_fc = nn.Linear(16, 64, bias=False)
    no_gain.h[1].ln_2 = nn.LayerNorm(16, elementwise_affine=False)
    other_gelu.h[0].mlp.gelu.approximate = "none"
    head_bias.lm_head = nn.Linear(16, 257)
    for model in (hooked, replaced, own_forward, mixed, pinned, off):
        assert weights_of(model) is None
    for model in (no_bias, no_gain, other_gelu, head_bias):
        assert weights_of(model) is None


def test_copies_leave_the_model_alone(make_model: Make) -> None:
    model = make_model()
    if not has_onednn(model):
        pytest.skip("this PyTorch has no oneDNN")
    before = copy.deepcopy(model.state_dict())
    strides = [p.stride() for p in model.parameters()]
    Forward(model, PackedProduct)
    assert [p.stride() for p in model.parameters()] == strides
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Those of the forward passes that are made, as they are."""
    made: list[str] = []
    start = Forward.__init__

    def init(self: Forward, model: GPTModel, product: type[Product] = Product) -> None:
        made.append(product.__name__.removesuffix("Product"))
        start(self, model, product)

    monkeypatch.setattr(Forward, "__init__", init)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    forward._is_intel.cache_clear()
    yield made
    forward._is_intel.cache_clear()


def tokens(model: GPTModel, texts: int, count: int) -> list[int]:
    """Those of all texts, drawn side by side."""
    config = SampleConfig(temperature=0, max_new_tokens=count)
    rows = [Row([5, 6], count) for _ in range(texts)]
    return [drawn.id for _, drawn in decode_rows(model, rows, config, vocab_size=257)]


@pytest.mark.parametrize(
    ("processor", "cpu", "texts", "count", "wanted"),
    [
        ("AMD EPYC", "AVX2", 1, 42, ["OneDNN"]),
        ("AMD EPYC", "AVX2", 2, 42, ["OneDNN", "Packed"]),
        ("AMD EPYC", "AVX512", 1, 42, ["OneDNN", "Packed"]),
        ("AMD EPYC", "AVX512", 2, 40, ["OneDNN"]),
        ("Intel(R) Xeon(R)", "AVX512", 1, 42, [""]),
        ("Intel(R) Xeon(R)", "AVX512", 3, 42, [""]),
        ("Intel(R) Xeon(R)", "AVX512", 4, 42, ["", "Packed"]),
        ("Intel(R) Xeon(R)", "AVX512", 4, 40, ["", "OneDNN"]),
    ],
)
def test_products_are_those_that_are_fastest_there(
    make_model: Make,
    processor: str,
    cpu: str,
    texts: int,
    count: int,
    wanted: list[str],
    products: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first are those of the prefill: one, of two tokens, for all texts."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    monkeypatch.setattr(forward, "device_name", lambda kind: processor)
    model = make_model(context_length=80)
    if not has_onednn(model):
        pytest.skip("this PyTorch has no oneDNN")
    assert len(tokens(model, texts, count)) == texts * count
    assert products == wanted


def test_a_text_after_a_step_of_training_is_of_the_new_weights(make_model: Make) -> None:
    """The optimizer's kernels change weights in a way that no version counter tells."""
    model = make_model(context_length=80)
    before = tokens(model, 2, 70)
    optimizer = build(model, TrainConfig(lr=0.5, weight_decay=0.0))
    for p in model.parameters():
        p.grad = p.detach().sign()
    optimizer.step()
    model.zero_grad()
    after = tokens(model, 2, 70)
    assert after != before
    assert after == tokens(copy.deepcopy(model), 2, 70)
