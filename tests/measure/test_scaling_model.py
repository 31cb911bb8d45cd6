"""Predictions for GPUs that are not here: sums by hand, and what must be true of any of them.

pytest tests/measure/test_scaling_model.py
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from flashgpt.config import preset
from flashgpt.measure.memory_model import parameters
from flashgpt.measure.scaling_model import Cluster, memory, step, table, traffic

GPT2 = preset("gpt2")
P = 124_439_808
ROOT = (50257 + 1024 + 2) * 768
STANDARD = Cluster()


def test_what_each_gpu_sends_is_counted_by_hand() -> None:
    assert parameters(GPT2) == P
    for gpus in (2, 8):
        part = (gpus - 1) / gpus
        sent, hideable = traffic(GPT2, "DDP", gpus)
        assert sent == pytest.approx(part * 8 * P)
        assert sent - hideable == pytest.approx(part * 8 * ROOT)
        sent, hideable = traffic(GPT2, "FSDP2", gpus)
        assert sent == pytest.approx(part * (8 * (P - ROOT) + 6 * ROOT))
        assert sent - hideable == pytest.approx(part * 6 * ROOT)
    assert traffic(GPT2, "DDP", 1) == traffic(GPT2, "FSDP2", 1) == (0, 0)


def test_memory_of_fsdp_is_shared_out_and_that_of_ddp_is_not() -> None:
    alone = memory(GPT2, "DDP", 1, 8)
    assert alone.weights + alone.moments == 12 * P and alone.gradients == 0
    ddp = memory(GPT2, "DDP", 64, 8)
    assert ddp.total == alone.total + 4 * P
    shares = [memory(GPT2, "FSDP2", gpus, 8) for gpus in (8, 64)]
    for gpus, found in zip((8, 64), shares, strict=True):
        assert found.weights == 4 * P / gpus and found.moments == 8 * P / gpus
        assert found.activations == ddp.activations and found.loss == ddp.loss
    assert shares[1].total < shares[0].total < ddp.total


def test_what_computing_does_not_hide_is_waited_for() -> None:
    fast = step("gpt2", GPT2, "DDP", 64, STANDARD, 0.1)
    slow = step("gpt2", GPT2, "DDP", 64, dataclasses.replace(STANDARD, network_bandwidth=1.0), 0.1)
    assert fast.compute_seconds == slow.compute_seconds
    sent, hideable = traffic(GPT2, "DDP", 64)
    assert fast.exposed_seconds == pytest.approx((sent - hideable) / 50e9)
    assert slow.exposed_seconds == pytest.approx(sent / 1e9 - slow.compute_seconds * 2 / 3)
    assert slow.efficiency < fast.efficiency < 1
    assert fast.tokens_per_second == pytest.approx(
        64 * 64 * 1024 / (fast.compute_seconds + fast.exposed_seconds)
    )
    near = step("gpt2", GPT2, "DDP", 8, STANDARD, 0.1)
    assert near.communication_seconds == pytest.approx(traffic(GPT2, "DDP", 8)[0] / 450e9)


def test_the_table_has_every_size_and_fits() -> None:
    found = table(STANDARD, 0.1)
    assert len(found) == 4 * (1 + 2 * 4)
    for p in found:
        assert p.memory.total <= 0.9 * 79 * 2**30 and p.rows in (1, 2, 4, 8, 16, 32, 64)
        assert 0 < p.efficiency <= 1 and p.exposed_seconds <= p.communication_seconds
    small = {(p.model, p.engine, p.gpus): p.rows for p in table(Cluster(memory_gib=16), 0.1)}
    assert small["gpt2-xl", "DDP", 64] == 0 < small["gpt2-xl", "FSDP2", 64]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tflops": 0.0}, "cluster.tflops must be positive, got 0"),
        ({"node_gpus": -1}, "cluster.node_gpus must be positive, got -1"),
        ({"utilization": 1.5}, "cluster.utilization must be at most 1, got 1.5"),
    ],
)
def test_a_cluster_that_cannot_be(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Cluster(**changes)


def test_a_gpu_that_holds_no_sequence_has_none() -> None:
    none = step("gpt2", GPT2, "DDP", 8, Cluster(memory_gib=1.0), 0.1)
    assert none.rows == none.tokens_per_second == none.efficiency == 0
