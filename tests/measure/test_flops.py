"""Arithmetic of a step, and peaks of devices. pytest tests/measure/test_flops.py"""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flashgpt.measure.flops import flop_per_token, peak_flop_per_second
from flashgpt.model.gpt2 import GPTModel

CFG = dict(vocab_size=96, context_length=64, emb_dim=32, n_heads=2, n_layers=3, drop_rate=0.0)


@pytest.mark.parametrize("tied", [True, False])
def test_the_count_is_that_of_torch(tied: bool) -> None:
    """Torch counts the matrix products of the standard path. The loss is an operator of ours, which
    it does not see: its three products are added. Biases and norms, which the formula counts as if
    they were products, are under 5 % at this size."""
    model = GPTModel({**CFG, "use_flash": False, "tie_weights": tied})
    ids = torch.randint(96, (2, 64))
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    head = 3 * 2 * ids.numel() * 32 * 96
    expected = (counter.get_total_flops() + head) / ids.numel()
    assert flop_per_token(model) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 311.9e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Another Card", None),
    ],
)
def test_the_peak_of_a_card_goes_by_its_name(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flop_per_second(torch.device("cuda"), torch.bfloat16) == peak
    assert peak_flop_per_second(torch.device("cuda"), None) is None
    assert peak_flop_per_second(torch.device("cpu"), torch.bfloat16) is None
