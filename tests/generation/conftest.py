"""Models that say something definite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashgpt.config import GPTConfig
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
