"""Predictions for GPUs that are not here: sums by hand, and what must be true of any of them.

pytest tests/measure/test_scaling_model.py
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from flashgpt.config import preset
from flashgpt.measure import scaling_model
from flashgpt.measure.memory_model import parameters
from flashgpt.measure.scaling_model import (
    ENGINES,
    Cluster,
    Engine,
    memory,
    step,
    table,
    traffic,
)

ROOT_FOLDER = Path(__file__).parents[2]
GPT2 = preset("gpt2")
P = 124_439_808
ROOT = (50257 + 1024 + 2) * 768
STANDARD = Cluster()


def test_what_each_gpu_sends_is_counted_by_hand() -> None:
    assert parameters(GPT2) == P
    for gpus in (2, 8, 64):
        part = (gpus - 1) / gpus
        sent, hideable = traffic(GPT2, "DDP", gpus, STANDARD)
        assert sent == pytest.approx(part * 8 * P)
        assert sent - hideable == pytest.approx(part * 8 * (ROOT if gpus > 8 else P))
        sent, hideable = traffic(GPT2, "FSDP2", gpus, STANDARD)
        gathers = 4 if gpus > 8 else 8  # for forward and for backward, in bf16 or fp32
        assert sent == pytest.approx(part * ((gathers + 4) * (P - ROOT) + 8 * ROOT))
        assert sent - hideable == pytest.approx(part * 8 * ROOT)
    for engine in ENGINES:
        assert traffic(GPT2, engine, 1, STANDARD) == (0, 0)


def test_memory_of_fsdp_is_shared_out_and_that_of_ddp_is_not() -> None:
    alone = memory(GPT2, "DDP", 1, 8, STANDARD)
    assert alone.weights + alone.moments == 12 * P and alone.gradients == 0
    ddp = memory(GPT2, "DDP", 64, 8, STANDARD)
    assert ddp.total == alone.total + 4 * P
    shares = [memory(GPT2, "FSDP2", gpus, 8, STANDARD) for gpus in (8, 64)]
    for gpus, found in zip((8, 64), shares, strict=True):
        assert found.weights == 4 * P / gpus and found.moments == 8 * P / gpus
        assert found.activations == ddp.activations and found.loss == ddp.loss
    assert shares[1].total < shares[0].total < ddp.total


def test_what_computing_does_not_hide_is_waited_for() -> None:
    fast = step("gpt2", GPT2, "DDP", 64, STANDARD, 0.1)
    slow = step("gpt2", GPT2, "DDP", 64, dataclasses.replace(STANDARD, network_bandwidth=1.0), 0.1)
    assert fast.compute_seconds == slow.compute_seconds
    sent, hideable = traffic(GPT2, "DDP", 64, STANDARD)
    assert fast.exposed_seconds == pytest.approx((sent - hideable) / 50e9)
    assert slow.exposed_seconds == pytest.approx(sent / 1e9 - slow.compute_seconds * 2 / 3)
    assert slow.efficiency < fast.efficiency < 1
    assert fast.tokens_per_second == pytest.approx(
        64 * 64 * 1024 / (fast.compute_seconds + fast.exposed_seconds)
    )
    near = step("gpt2", GPT2, "DDP", 8, STANDARD, 0.1)
    seconds = traffic(GPT2, "DDP", 8, STANDARD)[0] / 200e9
    assert near.communication_seconds == near.exposed_seconds == pytest.approx(seconds)


def test_what_is_assumed_of_links_and_compiling_is_measured() -> None:
    rows = json.loads((ROOT_FOLDER / "benchmarks/scaling/scaling.json").read_text())["rows"]
    ms = {row["way"]: statistics.median(row["ms"]) for row in rows}
    assert ms["blocks"] / ms["single"] == pytest.approx(scaling_model.BLOCKWISE, abs=0.005)
    nccl = {row["way"]: (row["communication"] or {}).get("nccl_ms") for row in rows}
    ddp, fsdp = (
        traffic(GPT2, engine, 2, STANDARD)[0] / nccl[way] / 1e6
        for engine, way in zip(ENGINES, ("ddp", "fsdp"), strict=True)
    )
    assert ddp == pytest.approx(STANDARD.node_bandwidth, rel=0.05)
    assert fsdp == pytest.approx(ddp / 3, rel=0.2)


def test_predictions_of_one_and_two_gpus_are_what_was_measured() -> None:
    """Memory within 5 %, speed within 10 %."""
    found = json.loads((ROOT_FOLDER / "benchmarks/scaling/scaling.json").read_text())
    engines: dict[str, tuple[Engine, int]] = {
        "single": ("DDP", 1),
        "ddp": ("DDP", 2),
        "fsdp": ("FSDP2", 2),
    }
    measured = {row["way"]: row for row in found["rows"] if row["way"] in engines}
    assert measured.keys() == engines.keys() and found["rows_per_device"] == 64
    for way, row in measured.items():
        predicted = step("gpt2", GPT2, *engines[way], STANDARD, 0.1)
        assert predicted.rows == 64
        assert predicted.memory.total == pytest.approx(row["peak_bytes"], rel=0.05)
        assert predicted.tokens_per_second == pytest.approx(row["tokens_per_second"], rel=0.1)


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
