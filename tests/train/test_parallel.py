"""Several processes: the same run as in one. pytest tests/train/test_parallel.py

One launch of two processes on the CPU, whatever is looked at: it takes seconds to start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flashgpt.data.batches import Batches
from flashgpt.data.prepare import prepare
from flashgpt.data.shards import TokenSplit
from flashgpt.locks import alone
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import DataConfig, ModelConfig, RunConfig, TrainConfig
from flashgpt.tokenizer import Tokenizer
from flashgpt.toml import load_toml, to_toml
from flashgpt.train import parallel, parts
from flashgpt.train.evaluate import evaluate
from flashgpt.train.parallel import LostError, Parallel
from tests.train.processes import fit

ROOT = Path(__file__).parents[2]
STEPS = 50
CFG = {"vocab_size": 11, "context_length": 4, "emb_dim": 8, "n_heads": 1, "n_layers": 1}
CFG |= {"drop_rate": 0.0}
Cli = Callable[..., Any]
Results = list[dict[str, dict[str, Any]]]  # by rank, then run


def weights(folder: Path) -> dict[str, Tensor]:
    """Of the last checkpoint."""
    return load_file(max((folder / "checkpoints").iterdir()) / "model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    mine, others = weights(one), weights(other)
    assert mine.keys() == others.keys() and len(mine) > 20
    return max(float((mine[name] - others[name]).abs().max()) for name in mine)


def write_configs(folder: Path, text: Path) -> None:
    """A curve without dropout; prompts with it, in 3 steps of two micro-batches a process."""
    rng = random.Random(1)
    pairs = [
        {"prompt": "p" * rng.randrange(1, 40), "completion": "c" * rng.randrange(1, 40)}
        for _ in range(200)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "words.txt").write_text(text.read_text())
    model = ModelConfig(n_layers=2, emb_dim=32, n_heads=2, context_length=32, drop_rate=0.0)
    train = TrainConfig(steps=STEPS, tokens_per_step=128, lr=3e-3, eval_every=0)
    train = dataclasses.replace(train, checkpoint_every=10, final_eval_tokens=200)
    short = dataclasses.replace(train, steps=3, micro_batch=1, lr=1e-2, final_eval_tokens=None)
    words, prompts = (
        DataConfig((str(folder / name),), "bytes", cache=str(folder / "cache"))
        for name in ("words.txt", "pairs.jsonl")
    )
    dropping = dataclasses.replace(model, drop_rate=0.1)
    (folder / "curve.toml").write_text(to_toml(RunConfig(model, words, train)))
    (folder / "pairs.toml").write_text(to_toml(RunConfig(dropping, prompts, short)))


@contextlib.contextmanager
def two_processes(folder: Path) -> Iterator[None]:
    """tests/train/processes.py, by the command of docs/scaling.md; what it prints is kept.

    Runs beside what is done while entered.
    """
    page = (ROOT / "docs" / "scaling.md").read_text()
    command = re.findall(r"^torchrun (.* --max-restarts .*)$", page, re.MULTILINE)[0]
    command = command.replace("-m flashgpt", str(ROOT / "tests" / "train" / "processes.py"))
    command = command.replace("run.toml", str(folder / "curve.toml"))
    command = command.replace("runs/two", str(folder / "chain"))
    arguments = [*shlex.split(command), "--train.stop-at", "20"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # Some processors announce a unit for bf16 that they do not let be used.
    env["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
    with subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT,
    ) as running:  # fmt: skip
        try:
            yield
            out, err = running.communicate(timeout=300)
        finally:
            running.terminate()  # torchrun passes it on
    assert running.returncode == 1, out + err  # it was stopped
    (folder / "printed.txt").write_text(out)


def in_one_process(folder: Path) -> dict[str, dict[str, Any]]:
    """The same runs in this process, and the curve with the rows of each batch in another order."""
    curve, pairs = (load_toml(folder / f"{name}.toml") for name in ("curve", "pairs"))
    found = {"pairs": fit(pairs, folder / "pairs", double=True)}
    found["curve"] = fit(curve, folder / "curve")
    batch = Batches.batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "batch", lambda *rows: [x[::-1].copy() for x in batch(*rows)])
        found["control"] = fit(curve, folder / "control")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Where all runs are, made once, by whichever process of pytest comes first."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    made = base / "processes"
    made.mkdir(exist_ok=True)
    with alone(made, wait=lambda: None):
        if not (made / "alone.json").exists():
            write_configs(made, text)
            prepare(load_toml(made / "curve.toml").data)
            with two_processes(made):
                found = in_one_process(made)
            (made / "alone.json").write_text(json.dumps(found))
    return made


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """What tests/train/processes.py did, by process."""
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def one_process(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((folder / "alone.json").read_text())
    return found


@pytest.fixture(scope="module")
def pairs(one_process: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The prompts in one process, in float64."""
    return one_process["pairs"]


@pytest.fixture(scope="module")
def curve(one_process: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The curve in one process."""
    return one_process["curve"]


@pytest.fixture(scope="module")
def control(one_process: dict[str, dict[str, Any]]) -> float:
    """How far the curve drifts with the rows of each batch in another order."""
    losses = one_process["curve"]["loss"]
    assert losses[-1] < 0.8 * losses[0]
    found = drift(losses, one_process["control"]["loss"])
    assert 0 < found < 1e-3
    return found


def drift(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_steps_are_those_of_one_process(
    how: str, folder: Path, results: Results, pairs: dict[str, Any]
) -> None:
    """With dropout, targets that do not count, several micro-batches; under FSDP2 with blocks
    recomputed. Budgets: those of tests/train/test_step.py, for sums in another order."""
    for found in (rank[f"pairs-{how}"] for rank in results[:1]):
        assert found["step"] == [1, 2, 3]
        assert drift(found["loss"], pairs["loss"]) <= 4 * 2**-24 * 6
        assert drift(found["grad_norm"], pairs["grad_norm"]) <= 1e-7
        assert found["val_loss"] == pytest.approx(pairs["val_loss"], abs=1e-7)
        assert found["val_tokens"] == pairs["val_tokens"] > 32
    assert largest_difference(folder / "pairs", folder / f"pairs-{how}") <= 1e-7


@pytest.mark.parametrize(("machines", "gathered"), [(1, "float32"), (2, "bfloat16")])
def test_in_shards_weights_are_seen_whole_and_in_full_precision(
    machines: int, gathered: str, results: Results
) -> None:
    """Plain tensors, not DTensors, which operators of ours could not read. On several machines
    blocks are gathered in bf16."""
    seen = results[0][f"half-{machines}"]
    assert seen["head"] == ["Parameter", "torch.float32", [257, 32]]
    assert seen["block"] == ["Parameter", f"torch.{gathered}", [128, 32]]
    assert seen["gradient"] == ["Tensor", "torch.float32", [257, 32]]
    assert seen["tied"]


@pytest.mark.parametrize("wrong", ["alike", "rows_from_zero"])
def test_the_comparison_sees_wrong_weights_and_masks(
    wrong: str, folder: Path, results: Results, pairs: dict[str, Any]
) -> None:
    assert drift(results[0][wrong]["loss"], pairs["loss"]) > 1e-3
    assert largest_difference(folder / "pairs", folder / wrong) > 1e-3


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_losses_drift_no_further_than_those_of_permuted_rows(
    how: str, results: Results, curve: dict[str, Any], control: float
) -> None:
    """Limit: three times the drift of the control."""
    found = results[0][f"curve-{how}"]
    assert found["step"] == list(range(1, STEPS + 1))
    assert drift(found["loss"], curve["loss"]) <= 3 * control


def test_every_process_sees_the_same(results: Results) -> None:
    first, second = results
    assert len(first) == 14
    for name, found in first.items():
        for key in found:
            assert json.dumps(found[key]) == json.dumps(second[name][key]), (name, key)


def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(folder: Path) -> None:
    """torchrun starts both again, they go on by themselves; the first alone prints and writes."""
    printed = (folder / "printed.txt").read_text()
    shown = printed.splitlines()
    assert sum("training tokens" in line for line in shown) == 2  # at either start
    assert sum(line.startswith("goes on from") for line in shown) == 1
    assert f"goes on from {folder}/chain/checkpoints/step_00000010" in printed
    assert sum(line.startswith("step 20: validation loss") for line in shown) == 1


def test_torchrun_that_is_stopped_stops_all_after_the_same_step_for_good(folder: Path) -> None:
    """With restarts left; a third start would print a third time."""
    names = [path.name for path in (folder / "ended" / "checkpoints").iterdir()]
    assert names == ["step_00000003"]
    assert (folder / "printed.txt").read_text().count("training tokens") == 2


def test_a_run_goes_on_in_any_number_of_processes(
    folder: Path,
    results: Results,
    curve: dict[str, Any],
    control: float,
) -> None:
    """20 steps of DDP with a kill, 15 in one process, 15 of FSDP2: the curve of one process."""
    alone_from = "steps are of one process from here on, were of 2 processes (ddp)"
    assert any(note.startswith(alone_from) for note in results[0]["part"]["notes"])
    chain = results[0]["chain"]
    assert chain["step"] == list(range(36, STEPS + 1))
    assert chain["notes"][0] == f"goes on from {folder}/chain/checkpoints/step_00000035"
    assert "steps are of 2 processes (fsdp) from here on, were of one" in chain["notes"][1]
    lines = (folder / "chain" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in found] == list(range(1, STEPS + 1))
    assert drift([entry["loss"] for entry in found], curve["loss"]) <= 3 * control
    mine, others = (
        load_file(max((folder / name / "checkpoints").iterdir()) / "trainer/optimizer.safetensors")
        for name in ("chain", "curve")
    )
    assert {k: t.shape for k, t in mine.items()} == {k: t.shape for k, t in others.items()}


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_weights_to_start_from_reach_every_process(
    how: str, folder: Path, results: Results
) -> None:
    for rank in results:
        found = rank[f"tuned-{how}"]
        assert found["note"] == f"starts from the weights of {folder}/chain"
        assert (found["count"], found["apart"]) == (26, 0.0)


def test_a_bad_step_of_one_process_is_left_out_by_all(
    folder: Path, results: Results, curve: dict[str, Any], cli: Cli
) -> None:
    """And its incident has the whole batch and whole weights: one process can do it again."""
    first, second = (rank["broken"] for rank in results)
    assert first["steps"] == second["steps"] == 4
    assert [loss == loss for loss in first["loss"]] == [True, True, False, True]
    assert [loss == loss for loss in second["loss"]] == [True, True, False, True]
    (there,) = (folder / "broken" / "incidents").iterdir()
    kept = json.loads((there / "incident.json").read_text())
    assert [micro["first_row"] for micro in kept["micros"]] == [0, 2]
    shown = cli("train", "--replay", there).done()
    (line,) = (line for line in shown.splitlines() if line.startswith("loss "))
    then, now = map(float, line.split()[1:])
    assert then == pytest.approx(now, rel=1e-5)


def test_a_signal_to_one_process_ends_all_after_the_same_step(
    folder: Path, results: Results
) -> None:
    for rank in results:
        assert rank["stopping"]["interrupted"] == 15
        assert rank["stopping"]["steps"] == 3
    names = sorted(path.name for path in (folder / "stopping" / "checkpoints").iterdir())
    assert names == ["step_00000003"]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_windows_of_an_evaluation_are_shared(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each counts once, and every process runs the model as often, as FSDP2 needs it."""
    model = GPTModel(CFG)
    tokens = np.random.default_rng(0).integers(0, 11, 4 * 8 * 6 + 3).astype(np.uint16)
    split, lengths = TokenSplit([tokens], [np.zeros(1, np.int64)], 0), np.ones(11, np.int64)
    whole = evaluate(model, split, lengths)
    monkeypatch.setattr(Parallel, "totals", lambda _, *sums: sums)
    calls, found = [], []
    for rank in range(size):
        counted: list[int] = []
        hook = model.register_forward_hook(lambda *_, seen=counted: seen.append(1))
        found.append(evaluate(model, split, lengths, parallel=Parallel(rank, size)))
        hook.remove()
        calls.append(len(counted))
    assert len(set(calls)) == 1 and calls[0] == -(-7 // size)
    assert sum(part.tokens for part in found) == whole.tokens
    nats = sum(part.loss * part.tokens for part in found)
    assert nats / whole.tokens == pytest.approx(whole.loss, rel=1e-9)


def test_shapes_that_do_not_divide_are_refused_before_any_work() -> None:
    train = TrainConfig(tokens_per_step=6 * 32, micro_batch=2)
    assert [train.rows_at_once(32, count) for count in (1, 3, 6)] == [2, 2, 1]
    with pytest.raises(ValueError, match=r"tokens_per_step must be a multiple of 128 for 4 proc"):
        train.rows_at_once(32, 4)
    with pytest.raises(ValueError, match=r"micro_batch must divide the 3 sequences .* of 2 proc"):
        train.rows_at_once(32, 2)


def test_muon_is_refused_in_shards() -> None:
    config = TrainConfig(optimizer="muon", parallel="fsdp")
    with pytest.raises(ValueError, match=r"optimizer must be adamw with .* fsdp"):
        parts.build(GPTModel(CFG), Tokenizer.bytes(), config, Parallel(0, 2, sharded=True))
    RunConfig(train=config).check(processes=1)
    with pytest.raises(ValueError, match=r"optimizer must be adamw with .* fsdp"):
        RunConfig(train=config).check(processes=2)


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment that torchrun gives the second process."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize(
    ("said", "is_lost"),
    [
        ("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1", True),
        ("Connection reset by peer", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_a_process_says_that_another_is_gone(
    second_of_two: pytest.MonkeyPatch, said: str, is_lost: bool
) -> None:
    second_of_two.setattr(parallel, "_join", lambda *_: None)
    second_of_two.setattr(parallel.dist, "new_group", lambda **_: None)
    wanted = pytest.raises(LostError, match="another process of this run has ended")
    error = wanted if is_lost else pytest.raises(RuntimeError, match="illegal memory access")
    with error, parallel.started("ddp", torch.device("cpu")) as found:
        assert (found.rank, found.size, found.is_first) == (1, 2, False)
        raise RuntimeError(said)


def test_a_gpu_for_each_process(
    second_of_two: pytest.MonkeyPatch,
) -> None:
    second_of_two.setenv("LOCAL_RANK", "1")
    second_of_two.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(ValueError, match="--nproc-per-node must be at most the 1 GPUs"),
        contextlib.ExitStack() as stack,
    ):
        stack.enter_context(parallel.started("ddp", torch.device("cuda")))
