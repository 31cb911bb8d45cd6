"""The products of a decoding step on the CPU: what is measured, and that all ways agree.

pytest tests/test_benchmark_rows_cpu.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import rows_cpu
from flashgpt.generation import forward


def test_all_ways_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--layers", "1", "--width", "16", "--vocab-size", "50", "--rounds", "3"]
    assert rows_cpu.main([*sizes, "--rows", "1", "2", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    ways = ["read", "linear", "onednn", "packed"]
    assert [(row["rows"], row["way"]) for row in found["rows"]] == [
        (rows, way) for rows in (1, 2) for way in ways
    ]
    size = 4 * (12 * 16**2 + 50 * 16)
    for row in found["rows"]:
        assert row["ms"] == sorted(row["all_ms"])[1] > 0
        assert row["gb_s"] == pytest.approx(size / row["ms"] / 1e6)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["ms"] for row in last["rows"]] == [row["ms"] for row in found["rows"]]


def test_every_product_of_the_model_is_there() -> None:
    made = rows_cpu.layers(2, 8, 30)
    shapes = [list(layer.weight.shape) for layer in made]
    assert shapes == [[24, 8], [8, 8], [32, 8], [8, 32]] * 2 + [[30, 8]]
    for layer in made:
        x = torch.randn(3, layer.in_features)
        for product in (forward.OneDNNProduct, forward.PackedProduct):
            torch.testing.assert_close(product(layer)(x), layer(x))
