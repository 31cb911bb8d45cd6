"""The optimizers' script: what it writes, and how it reads steps off a curve.

pytest tests/test_benchmark_optimizers.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import optimizers
from benchmarks.optimizers import SEED, Bench, Run, best_rate, steps_to, summarise


@pytest.fixture
def options(tmp_path: Path, text: Path) -> list[str]:
    """A model of one layer on a text of 11 words, 6 steps a run."""
    sizes = "--vocab-size 270 --layers 1 --emb-dim 32 --context-length 16 --tokens-per-step 64"
    grid = "--steps 6 --every 2 --eval-tokens 64 --adamw-lr 1e-3 4e-3 --muon-lr 2e-3 8e-3"
    folders = ["--source", text, "--cache", tmp_path / "cache", "--out", tmp_path / "out"]
    return [*sizes.split(), *grid.split(), *map(str, folders)]


def test_a_tiny_comparison(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert optimizers.main(options) == 0
    record = json.loads((tmp_path / "out" / "optimizers.json").read_text())
    assert {"torch", "device", "date", "products", "compiled"} <= record["environment"].keys()
    runs = [(run["variant"], run["lr"], run["seed"]) for run in record["runs"]]
    grids = {"adamw": [1e-3, 4e-3], "muon-three": [2e-3, 8e-3], "muon-one": [2e-3, 8e-3]}
    assert runs[:6] == [(name, lr, SEED) for name, grid in grids.items() for lr in grid]
    best = {row["variant"]: row["best_lr"] for row in record["variants"]}
    assert runs[6:] == [(name, best[name], SEED + 1) for name in grids]
    for run in record["runs"]:
        steps, losses = zip(*run["curve"], strict=True)
        assert steps == (2, 4, 6) and losses[-1] < losses[0] < 6
        assert len(run["seconds"]) == 3 and min(run["seconds"]) > 0
    curves = [json.dumps(run["curve"]) for run in record["runs"]]
    assert len(set(curves)) == len(curves)  # no two variants, rates or seeds are the same run
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1]) == {"variants": record["variants"]}
    assert [line.split()[0] for line in out[-5:-2]] == list(grids)
    picture = (tmp_path / "out" / "optimizers.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and picture[-8:-4] == b"IEND"
    names = ["optimizers.json", "optimizers.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_a_wider_grid_repeats_no_run(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [*options, "--adamw-lr", "1e-3", "--muon-lr", "2e-3", "--seeds", "1"]
    assert optimizers.main(small) == 0
    done: list[tuple[str, float]] = []
    run = Bench.run

    def counted(self: Bench, variant: str, lr: float, seed: int) -> Run:
        done.append((variant, lr))
        return run(self, variant, lr, seed)

    monkeypatch.setattr(Bench, "run", counted)
    assert optimizers.main([*small, "--adamw-lr", "1e-3", "4e-3"]) == 0
    assert done == [("adamw", 4e-3)]
    record = json.loads((tmp_path / "out" / "optimizers.json").read_text())
    assert len(record["runs"]) == 4
    with pytest.raises(ValueError, match="is of another device, text, model or schedule"):
        optimizers.main([*small, "--steps", "8"])


def test_a_run_does_not_depend_on_those_before_it(options: list[str]) -> None:
    bench = Bench(optimizers._options(options))
    first = bench.run("muon-one", 2e-3, 1).curve
    for variant in ("adamw", "muon-three"):
        assert bench.run(variant, 2e-3, 1).curve != first
    assert bench.run("muon-one", 2e-3, 1).curve == first


def test_steps_to_a_loss_are_read_between_evaluations() -> None:
    curve = [(10, 5.0), (20, 4.0), (30, 4.5), (40, 2.5)]
    for target, expected in [(4.0, 20), (4.25, 17.5), (3.5, 35), (6.0, 10), (2.5, 40)]:
        assert steps_to(target, curve) == expected
    assert steps_to(2.4, curve) is None
    assert steps_to(math.nan, curve) is None


def run(variant: str, lr: float, losses: list[float], seed: int = SEED, ms: float = 1.0) -> Run:
    curve = [(10 * (i + 1), loss) for i, loss in enumerate(losses)]
    return Run(variant, lr, seed, curve, [9.0, ms / 1e3, ms / 1e3])


def test_a_variant_is_judged_at_its_best_rate_seed_by_seed() -> None:
    runs = [
        *(run("adamw", lr, [5, 4, last]) for lr, last in [(1, 3.2), (2, 3.0), (4, math.nan)]),
        *(run("muon-three", lr, [5, 3.5, last], ms=2.0) for lr, last in [(1, 2.5), (2, 2.6)]),
        run("adamw", 2, [5, 4, 3.3], seed=SEED + 1),
        run("muon-three", 1, [5, 3.5, 3.4], seed=SEED + 1, ms=2.0),
    ]
    assert best_rate(runs, "adamw") == 2 and best_rate(runs, "muon-three") == 1
    adamw, muon = summarise(runs)
    assert adamw["steps_to_adamw"] == [30, 30] and not adamw["at_the_edge_of_the_grid"]
    assert muon["steps_to_adamw"] == [25, None] and muon["at_the_edge_of_the_grid"]
    assert muon["final_loss"] == [2.5, 3.4]
    assert muon["seconds_per_step"] == pytest.approx(2e-3)  # the first stretch apart
    assert muon["seconds_to_adamw"] == [pytest.approx(25 * 2e-3)]
