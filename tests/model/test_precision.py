"""Dtypes under autocast. pytest tests/model/test_precision.py"""

from __future__ import annotations

import pytest
import torch

from flashgpt.model import precision
from flashgpt.model.gpt2 import GPTModel

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("own", "autocast", "products", "residual"),
    [
        (FP32, None, FP32, FP32),
        (FP32, BF16, BF16, BF16),
        (FP32, FP16, FP16, FP32),
        (BF16, None, BF16, BF16),
        (BF16, BF16, BF16, BF16),
        (FP64, None, FP64, FP64),
        (FP64, BF16, FP64, FP64),
    ],
    ids=str,
)
def test_dtypes(
    own: torch.dtype, autocast: torch.dtype | None, products: torch.dtype, residual: torch.dtype
) -> None:
    x = torch.zeros(1, dtype=own)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        assert (precision.of_products(x), precision.of_residual(x)) == (products, residual)


@pytest.mark.parametrize(("own", "seen"), [(FP32, BF16), (FP64, FP64)], ids=str)
def test_the_blocks_of_a_model_hand_on_the_residual_dtype(
    own: torch.dtype, seen: torch.dtype
) -> None:
    shape = {"vocab_size": 50, "context_length": 8, "emb_dim": 12, "n_heads": 3}
    model = GPTModel({**shape, "n_layers": 2, "drop_rate": 0.0}).to(own)
    dtypes: set[torch.dtype] = set()
    for block in model.h:
        block.register_forward_hook(lambda *call: dtypes.update({call[1][0].dtype, call[2].dtype}))
        # Without its products, which some processors cannot do in bf16.
        block.attn.forward = lambda x, *_: x.to(torch.bfloat16 if own == FP32 else own)
        block.mlp.forward = lambda x: x.to(torch.bfloat16 if own == FP32 else own)
    model.lm_head.forward = lambda x: x
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with torch.autocast("cpu", BF16):
        model(ids)
    assert dtypes == {seen}
