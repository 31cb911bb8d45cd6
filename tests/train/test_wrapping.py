"""What wraps a model, apart from what several processes compute: test_parallel.py looks at that.

pytest tests/train/test_wrapping.py
"""

from __future__ import annotations

import pytest
import torch

from flashgpt.model.gpt2 import GPTModel
from flashgpt.train import wrapping

CFG = {"vocab_size": 11, "context_length": 4, "emb_dim": 8, "n_heads": 1, "n_layers": 2}
CFG |= {"drop_rate": 0.0}


def test_of_a_sharded_model_the_blocks_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hooks that stand around them; and it can be taken back."""
    model = GPTModel(CFG)
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(f) or f)
    assert wrapping.compile_module(model) is model
    assert compiled == [model]
    model.reshard = lambda: None  # type: ignore[assignment]  # as FSDP2 leaves a model
    forward = wrapping.compile_module(model)
    assert forward is not model and compiled[1:] == [block.forward for block in model.h]
    ids = torch.arange(4)[None]
    assert torch.equal(forward(ids, ids), model(ids, ids))
    wrapping.uncompile(model)
    assert all("forward" not in vars(block) for block in model.h)
