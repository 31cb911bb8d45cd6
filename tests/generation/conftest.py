"""Models that say something definite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgpt import cudagraph
from flashgpt.config import GPTConfig
from flashgpt.generation import ahead, device_step, prompt
from flashgpt.model.gpt2 import GPTModel
from flashgpt.tokenizer import Tokenizer

CONTEXT = 8


def build(vocab_size: int = 257, **changes: Any) -> GPTModel:
    """Random weights, large enough that greedy tokens depend on the whole context."""
    torch.manual_seed(3)
    cfg = GPTConfig(vocab_size, CONTEXT, 16, 2, 2, 0.0, tie_weights=False)
    model = GPTModel({**cfg.to_dict(), **changes}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10)
    return model


@pytest.fixture(scope="session")
def make_model() -> Callable[..., GPTModel]:
    """Builds a model: make_model(vocab_size, drop_rate=0.5)."""
    return build


@pytest.fixture(scope="session")
def model() -> GPTModel:
    """One of them; read only."""
    return build()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """One id a byte."""
    return Tokenizer.bytes()


class PlainStream:
    """What cudagraph.Stream does, without a stream."""

    def run(self, call: Callable[[], Tensor | None]) -> None:
        call()

    def capture(
        self, call: Callable[[], Tensor | None]
    ) -> tuple[Callable[[], None], Tensor | None]:
        out = call()

        def replay() -> None:
            if out is not None:
                out.zero_()
            found = call()
            if out is not None and found is not None:
                out.copy_(found)

        return replay, out


@pytest.fixture
def graphs_without_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models are served as on a GPU; without one a graph is a plain call."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(device_step, "serves", lambda weight: True)
        monkeypatch.setattr(cudagraph, "Stream", PlainStream)
    yield
    ahead._kept.clear()
    prompt._kept.clear()
