"""AdamW: what decays, what is clipped, state by name. pytest tests/train/test_optimizer.py"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flashgpt.config import TrainConfig
from flashgpt.model.gpt2 import GPTModel
from flashgpt.train import optimizer

CFG = dict(vocab_size=11, context_length=4, emb_dim=8, n_heads=2, n_layers=1, drop_rate=0.0)


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_vectors_do_not(tied: bool) -> None:
    model = GPTModel({**CFG, "qkv_bias": True, "tie_weights": tied})
    config = TrainConfig(lr=0.5, weight_decay=0.2, beta1=0.8, beta2=0.9)
    made = optimizer.build(model, config)
    grouped = [p for group in made.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    assert len(grouped) == len(list(model.parameters()))
    assert all(group["betas"] == (0.8, 0.9) for group in made.param_groups)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    made.step()
    for name, p in model.named_parameters():
        decays = not name.endswith("bias") and "ln_" not in name
        assert torch.equal(p, before[name] * (1 - 0.5 * 0.2) if decays else before[name]), name


def test_the_gradient_is_clipped_to_its_norm(tmp_path: Path, train: Callable[..., Any]) -> None:
    """After one step exp_avg is (1 - beta1) times the gradient that AdamW was given."""
    norms = {}
    for limit in (0, 0.25, 100):
        run = train(tmp_path / str(limit), "--train.stop-at", 1, "--train.grad-clip", limit)
        moments = [t for name, t in run.tensors().items() if name.endswith("exp_avg")]
        given = math.sqrt(sum(float(t.double().square().sum()) for t in moments)) / 0.1
        norms[limit] = run.metrics[0]["grad_norm"]
        assert norms[limit] > 1
        expected = 0.25 if limit == 0.25 else norms[limit]
        assert given == pytest.approx(expected, rel=1e-5)
    assert len(set(norms.values())) == 1  # what is logged is the norm before clipping


def test_state_goes_by_the_names_of_the_parameters() -> None:
    model, twin = GPTModel(CFG), GPTModel(CFG)
    first, second = (optimizer.build(m, TrainConfig()) for m in (model, twin))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    first.step()
    tensors = optimizer.state_tensors(first, model)
    names = {name for name, _ in model.named_parameters()}
    assert set(tensors) == {f"{n}.{m}" for n in names for m in ("exp_avg", "exp_avg_sq", "step")}
    optimizer.load_state_tensors(second, twin, tensors)
    again = optimizer.state_tensors(second, twin)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert all(tensors[name].data_ptr() != again[name].data_ptr() for name in tensors)


def test_state_of_another_model_is_refused() -> None:
    model = GPTModel(CFG)
    made = optimizer.build(model, TrainConfig())
    with pytest.raises(ValueError, match=r"does not fit the model: 'h\.0"):
        optimizer.load_state_tensors(made, model, {"wte.weight.exp_avg": torch.zeros(1)})
    optimizer.load_state_tensors(made, model, {})  # a checkpoint of step 0
    assert optimizer.state_tensors(made, model) == {}
