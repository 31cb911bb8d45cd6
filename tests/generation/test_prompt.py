"""The pass over a prompt as a graph: the model's own numbers at every length, each time.

Without a GPU the graph is a plain call.
pytest tests/generation/test_prompt.py
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgpt.generation import prompt
from flashgpt.generation.rows import Logits, Row
from flashgpt.model.gpt2 import GPTModel

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CONTEXT = 100
Make = Callable[..., GPTModel]


@pytest.fixture(autouse=True)
def captures(monkeypatch: pytest.MonkeyPatch, graphs_without_gpu: None) -> Callable[[], int]:
    """How often a pass was captured."""
    found = []
    capture = prompt.cudagraph.Stream.capture

    def count(*arguments: Any) -> Any:
        found.append(arguments)
        return capture(*arguments)

    monkeypatch.setattr(prompt.cudagraph.Stream, "capture", count)
    return lambda: len(found)


@pytest.fixture
def model(make_model: Make) -> GPTModel:
    """One that lives as long as its test."""
    return make_model(context_length=CONTEXT).to(DEVICE)


def ids_of(count: int) -> list[int]:
    return torch.randint(257, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def two(model: GPTModel, ids: list[int]) -> Tensor:
    """Logits after a prompt, and after one more token, which needs what the cache holds."""
    logits, row = Logits(model), Row(list(ids), 2)
    first = logits.after([row]).clone()
    row.window.append(5)
    return torch.stack([first, logits.after([row])])


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 99])
def test_logits_are_the_models_each_time(model: GPTModel, count: int) -> None:
    """Plain, when captured, and replayed; shorter prompts between them leave nothing behind."""
    ids = ids_of(count)
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        whole = double(torch.tensor([[*ids, 5]], device=DEVICE))[:, -2:]
    exact = whole.transpose(0, 1)
    first = two(model, ids)
    assert (first - exact).abs().max() <= 2e-5 * exact.abs().max()
    for _ in range(3):
        two(model, ids_of(3))
        two(model, ids_of(CONTEXT - 1))
        assert torch.equal(two(model, ids), first)


def test_a_pass_is_captured_for_the_second_prompt_of_about_its_length(
    model: GPTModel, captures: Callable[[], int]
) -> None:
    found = []
    for count in (10, 70, 64, 3, 90, 100):
        Logits(model).after([Row(ids_of(count), 1)])
        found.append(captures())
    assert found == [0, 0, 1, 1, 2, 2]


def test_new_weights_are_used(model: GPTModel, captures: Callable[[], int]) -> None:
    """Written in place, which a graph sees, or put in their place, which it cannot."""
    ids, made = ids_of(20), []
    for change in (lambda p: p.mul_(0.5), lambda p: setattr(p, "data", 2 * p.data)):
        for _ in range(2):
            two(model, ids)
        made.append(captures())
        with torch.no_grad():
            change(model.h[0].mlp.c_fc.weight)
            exact = model(torch.tensor([ids], device=DEVICE))[:, -1]
        assert torch.allclose(two(model, ids)[0], exact, rtol=1e-3, atol=1e-3)
    two(model, ids)
    assert [*made, captures()] == [1, 1, 2]


@pytest.mark.parametrize(
    ("changes", "texts"),
    [({"use_flash": False}, 1), ({"context_length": 4096}, 1), ({}, 2)],
    ids=str,
)
def test_others_pass_as_they_are(
    make_model: Make, changes: dict[str, Any], texts: int, captures: Callable[[], int]
) -> None:
    """Models that are more than their weights, prompts that keep a GPU busy, several prompts."""
    model = make_model(**{"context_length": CONTEXT, **changes}).to(DEVICE)
    count = min(model.cfg.context_length, 2049)
    for _ in range(2):
        Logits(model).after([Row(ids_of(count - at), 1) for at in range(texts)])
    assert captures() == 0


def test_a_pass_does_not_keep_its_model(make_model: Make) -> None:
    model = make_model(context_length=CONTEXT).to(DEVICE)
    for _ in range(2):
        two(model, ids_of(9))
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None
