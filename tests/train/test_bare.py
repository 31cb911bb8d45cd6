"""The bare step is the step of the trainer. pytest tests/train/test_bare.py"""

from __future__ import annotations

import copy

import torch

from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import TrainConfig
from flashgpt.train import optimizer
from flashgpt.train.bare import BareStep

CPU = torch.device("cpu")
CFG = dict(vocab_size=64, context_length=16, emb_dim=32, n_heads=2, n_layers=1, drop_rate=0.0)


def test_it_is_loss_gradient_clipping_and_update() -> None:
    model = GPTModel(CFG)
    torch.nn.init.normal_(model.wte.weight, std=5.0)  # gradients far beyond the limit
    other = copy.deepcopy(model)
    ids, targets = torch.randint(64, (2, 2, 16)).unbind()
    found = optimizer.build(model, TrainConfig())
    BareStep(model, model, found, 1.0, CPU, None)(ids, targets)

    made = optimizer.build(other, TrainConfig())
    other(ids, targets).backward()
    grads = [p.grad for p in other.parameters() if p.grad is not None]
    norm = torch.stack([g.norm() for g in grads]).norm()
    assert norm > 2
    torch._foreach_mul_(grads, float(1 / norm))
    made.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.grad is None
    torch.testing.assert_close(found.state_tensors(), made.state_tensors())
