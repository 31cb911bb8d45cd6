"""The arithmetic of memory: counts, the step that was measured on an H100, lines through samples.

pytest tests/measure/test_memory_model.py
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flashgpt.config import GPTConfig, preset
from flashgpt.measure import flops, memory_model
from flashgpt.measure.memory_model import Sample, parameters, peak_at, predict, seconds_at
from flashgpt.model import loss
from flashgpt.model.gpt2 import GPTModel

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"tie_weights": False}])
def test_counts_are_those_of_the_model(changes: dict[str, Any]) -> None:
    cfg = GPTConfig(97, 16, 32, 2, 3, 0.0, **changes)
    model = GPTModel(cfg)
    assert parameters(cfg) == model.n_parameters
    assert memory_model.flop_per_token(cfg) == flops.flop_per_token(model)


def test_the_loss_on_cuda_has_the_rows_and_columns_of_its_kernel() -> None:
    assert memory_model.LOSS_ROWS == loss.CHUNK_ROWS_TRITON
    assert memory_model.LOSS_COLUMNS_MULTIPLE == loss.COLUMNS_MULTIPLE


def test_the_step_on_an_h100_is_predicted_within_5_percent() -> None:
    raw = json.loads((ROOT / "benchmarks/step-h100/steps.json").read_text())
    measured = raw["states"][-1]["peak_gib"] * 2**30
    cfg = preset("gpt2", vocab_size=50304, drop_rate=0.0)
    predicted = predict(cfg, 64, recompute=False, accumulates=False).total
    assert predicted == pytest.approx(measured, rel=0.05)
    # The parts matter: without what a block keeps in one place fewer, it is off.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_model, "KEPT_WIDTHS", memory_model.KEPT_WIDTHS - 1)
        less = predict(cfg, 64, recompute=False, accumulates=False).total
    assert abs(less / measured - 1) > 0.05


def test_a_step_that_recomputes_is_predicted_within_5_percent() -> None:
    raw = json.loads((ROOT / "benchmarks/plan/recomputed.json").read_text())["measured"]
    measured = max(raw["forward_bytes"], raw["rest_bytes"])
    cfg = preset("gpt2", vocab_size=50304, drop_rate=0.0)
    predicted = predict(cfg, raw["rows"], recompute=True, accumulates=False)
    assert predicted.total == pytest.approx(measured, rel=0.05)
    small = predict(cfg, 8, recompute=True)
    assert small.loss == memory_model.loss_bytes(cfg, 8)  # a block keeps less
    kept, inputs = (
        memory_model.activation_bytes(cfg, 128, recompute=again) / cfg.n_layers
        for again in (False, True)
    )
    block = kept - inputs + 128 * 1024 * cfg.emb_dim * 2
    assert predict(cfg, 128, recompute=True).loss == block > memory_model.loss_bytes(cfg, 128)


def test_recomputed_blocks_keep_their_input_alone() -> None:
    cfg = preset("gpt2")
    kept, recomputed = (
        memory_model.activation_bytes(cfg, 8, recompute=again) for again in (False, True)
    )
    inputs = 8 * 1024 * cfg.n_layers * cfg.emb_dim * 2
    last = 8 * 1024 * 2 * cfg.emb_dim * 2
    assert recomputed == inputs + last and kept > 8 * recomputed


def sample(rows: int, *, gradients: int = 400, tokens: int = 16) -> Sample:
    """A step of 1000 bytes and 50 a row, in backward 80; logits 7 a token up to 64 of them."""
    logits = 7 * min(rows * tokens, 64)
    forward, rest = 1000 + 50 * rows + logits + gradients, 900 + 80 * rows + gradients
    return Sample(rows, forward, rest, logits, gradients, 2e-3 + 1e-3 * rows)


def test_two_small_samples_predict_a_large_one() -> None:
    """Past the last chunk of logits, in another phase, and in a step without accumulation."""
    small = [sample(1), sample(2), sample(3)]
    for wanted in (sample(4), sample(8), sample(100), sample(100, gradients=0)):
        found = peak_at(small, wanted.rows, wanted.logits_bytes, wanted.gradients_bytes)
        assert found == pytest.approx(wanted.peak_bytes)
        assert seconds_at(small, wanted.rows) == pytest.approx(wanted.seconds)
    assert sample(4).peak_bytes == sample(4).forward_bytes
    assert sample(100).peak_bytes == sample(100).rest_bytes


@pytest.mark.parametrize(
    ("seconds", "at_8"),
    [
        ((1.0, 2.0, 4.0), 8.0),
        ((1.0, 2.2, 4.4), 8.6),
        ((2.0, 2.0, 2.0), 2.0),
        ((4.0, 3.0, 2.0), 2.6),
    ],
)
def test_neither_a_launch_nor_a_row_takes_less_than_no_time(
    seconds: tuple[float, ...], at_8: float
) -> None:
    timed = [
        dataclasses.replace(sample(rows), seconds=s)
        for rows, s in zip((1, 2, 4), seconds, strict=True)
    ]
    assert seconds_at(timed, 8) == pytest.approx(at_8, rel=0.05)
    assert seconds_at(timed, 1000) >= seconds_at(timed, 8) > 0


def test_on_the_cpu_a_chunk_is_what_the_loss_takes_at_once() -> None:
    cpu = torch.device("cpu")
    few, many, more = (
        loss.chunk_bytes(cpu, 8192, torch.float32, rows) for rows in (100, 1000, 10000)
    )
    assert few == 2 * 100 * 8192 * 4 and many == more == 3 * loss.CHUNK_MIN_ROWS * 8192 * 4
