"""The comparisons with nanoGPT: what they measure and write, and that they see what is wrong.

nanoGPT itself is not here: STAND_IN is a model of our own with the names that the scripts use.

pytest tests/test_benchmark_nanogpt.py
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import fit, nanogpt, nanogpt_claims, nanogpt_text, nanogpt_ways
from benchmarks import nanogpt_loss as loss
from benchmarks import nanogpt_speed as speed
from flashgpt.config import GPTConfig
from flashgpt.measure import failure
from flashgpt.measure.step_parts import PARTS
from flashgpt.model.gpt2 import GPTModel
from flashgpt.train import graph

STAND_IN = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.drop, self.flash = c.n_head, c.dropout, True
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, c.bias)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, c.bias)

    def forward(self, x):
        q, k, v = self.c_attn(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.flash:
            p = self.drop if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        else:
            count = x.shape[1]
            scores = q @ k.mT / q.shape[-1] ** 0.5
            scores = scores.masked_fill(self.bias[..., :count, :count] == 0, float("-inf"))
            out = F.dropout(scores.softmax(-1), self.drop, self.training) @ v
        return self.c_proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(c.n_embd), nn.LayerNorm(c.n_embd)
        self.attn, self.mlp = Attention(c), nn.Module()
        self.mlp.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd, c.bias)
        self.mlp.c_proj = nn.Linear(4 * c.n_embd, c.n_embd, c.bias)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        print("made")
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.transformer.wpe = nn.Embedding(c.block_size, c.n_embd)
        self.transformer.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.transformer.ln_f = nn.LayerNorm(c.n_embd)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, ids, targets):
        parts = self.transformer
        x = parts.wte(ids) + parts.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in parts.h:
            x = block(x)
        logits = self.lm_head(parts.ln_f(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, decay, lr, betas, device):
        groups = [
            {"params": [p for p in self.parameters() if (p.dim() > 1) == two],
             "weight_decay": decay if two else 0.0}
            for two in (True, False)
        ]
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=device == "cuda")
"""
LENGTH = 16
SIZES = f"--layers 2 --heads 2 --width 32 --length {LENGTH} --batch 2 --steps".split()
Main = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """A folder with a model.py."""
    folder = tmp_path / "peer"
    folder.mkdir()
    (folder / "model.py").write_text(STAND_IN)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1700 tokens: a walk that can be learnt."""
    folder = tmp_path_factory.mktemp("text")
    record: dict[str, Any] = {"tokenizer": {"vocab_size": 50}, "sources": ["a walk"]}
    rng = np.random.default_rng(0)
    for name, count in (("train", 1500), ("held_out", 200)):
        ids = (np.cumsum(rng.integers(1, 3, count)) % 50).astype("<u2")
        (folder / f"{name}.bin").write_bytes(ids.tobytes())
        digest = nanogpt_text.hashlib.sha256(ids.tobytes()).hexdigest()
        record[name] = {"tokens": count, "sha256": digest}
    (folder / "text.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def run_speed(tmp_path: Path, peer: Path) -> Main:
    """Runs the speed script: status and the object that it wrote."""

    def main(*more: str) -> tuple[int, dict[str, Any]]:
        size = [*SIZES, "2", "--vocab-size", "60", "--rounds", "3"]
        folders = ["--nanogpt", str(peer), "--out", str(tmp_path / "made" / "here")]
        status = speed.main([*size, *folders, *more])
        return status, json.loads((tmp_path / "made" / "here" / "speed.json").read_text())

    return main


@pytest.fixture
def run_loss(tmp_path: Path, peer: Path, prepared: Path) -> Main:
    """Runs the loss script: status and the object that it wrote."""

    def main(*more: str) -> tuple[int, dict[str, Any]]:
        size = [*SIZES, "30", "--vocab-size", "60", "--lr", "3e-3", "--compile", "off"]
        size += ["--warm-up", "2"]
        folders = ["--nanogpt", str(peer), "--text", str(prepared), "--out", str(tmp_path / "out")]
        status = loss.main([*size, *folders, *more])
        return status, json.loads((tmp_path / "out" / "loss.json").read_text())

    return main


def test_speed_is_measured_beside_each_of_nanogpts_ways(
    run_speed: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = ["nanogpt-eager", "ours-eager", "ours-off-eager"]
    batches = ["--batch", "2", "3"]
    status, record = run_speed("--ways", *ways, *batches, "--dropout", "0", "0.1")
    assert status == 0
    found = [(row["dropout"], row["batch"], row["way"]) for row in record["rows"]]
    assert found == [(p, batch, way) for p in (0, 0.1) for batch in (2, 3) for way in ways]
    for row in record["rows"]:
        assert len(row["ms"]) == 3 and min(row["ms"]) > 0 < row["peak_bytes"]
        middle = sorted(row["ms"])[1]
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * LENGTH / middle * 1e3)
        assert list(row["against"]) == ["nanogpt-eager"]
        same = (row["dropout"], row["batch"], "nanogpt-eager")
        base = record["rows"][found.index(same)]["tokens_per_second"]
        ratio = row["against"]["nanogpt-eager"]["tokens_per_second"]
        assert ratio == row["tokens_per_second"] / base
        assert (row["kernels"] == []) == (row["way"] == "nanogpt-eager")
        assert row["way"] != "ours-off-eager" or row["kernels"] == ["standard"]
    assert {"device", "torch", "revision"} <= record["machine"].keys()
    assert record["model"]["activation"] == "gelu" and record["model"]["qkv_bias"] is True
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert "made" in printed.err.splitlines() and "made" not in lines  # nanoGPT's own words
    assert [row["way"] for row in json.loads(lines[-1])["rows"]] == ways * 4
    assert [line.split()[0] for line in lines[-15:-3]] == ways * 4


def test_a_profile_says_where_a_step_goes(
    run_speed: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    _, record = run_speed("--ways", "nanogpt-eager", "ours-eager", "--profile")
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("milliseconds of a step"))
    assert lines[start].split()[-len(PARTS) :] == list(PARTS)
    for row, line in zip(record["rows"], lines[start + 1 :], strict=False):
        parts = row["profile"]["parts"]
        assert sum(parts.values()) == pytest.approx(sorted(row["ms"])[1])
        assert parts["products"] > 0 < parts["optimizer"]
        assert line.split()[0] == row["way"] and line.split()[3] == f"{parts['products']:.2f}"
        assert row["profile"]["kernels"] == []  # which are a GPU's


def test_compiled_ways_are_compiled_and_standard_attention_is_standard(
    run_speed: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []

    def compile(model: nn.Module) -> nn.Module:
        compiled.append(model)
        return model

    monkeypatch.setattr(torch, "compile", compile)
    assert run_speed("--ways", *nanogpt_ways.WAYS[:-1])[0] == 0
    assert len(compiled) == 4
    fused, standard, *_ = compiled
    flash = [m.flash for model in (fused, standard) for m in model.modules() if hasattr(m, "flash")]
    assert flash == [True, True, False, False]
    own = [model.cfg.use_flash for model in compiled if isinstance(model, GPTModel)]
    assert own == [True, False]


def test_what_fails_does_not_stop_the_others(
    run_speed: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors: list[Exception] = [torch.OutOfMemoryError("too large"), RuntimeError("broken")]
    for error, status in zip(errors, (0, 1), strict=True):

        def fail(*_: object, error: Exception = error) -> Tensor:
            raise error

        monkeypatch.setattr(GPTModel, "forward", fail)
        found, record = run_speed("--ways", "nanogpt-eager", "ours-eager")
        assert found == status
        theirs, ours = record["rows"]
        assert len(theirs["ms"]) == 3 and "ms" not in ours
        reason = failure.OUT_OF_MEMORY if status == 0 else "RuntimeError: broken"
        assert ours["failed"] == reason
        assert f"failed: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize("most", [0, 1, 3, 5, 8, 13, 40, 111, 640])
@pytest.mark.parametrize("extra", [0.0, 0.2])
def test_the_largest_batch_that_fits_is_found(most: int, extra: float) -> None:
    def peak(batch: int) -> float:
        return 5 + batch + extra * min(batch, 16)

    room = peak(most) / fit.USABLE
    found = fit.fit(lambda batch: peak(batch) if batch <= most else None, room)
    expected = {0: None, 3: 2, 5: 4}.get(most, most // 8 * 8 or most)
    assert (found["batch"], found["largest"]) == (expected, True)
    assert len(found["attempts"]) <= fit.ATTEMPTS


def test_a_guess_from_what_is_known_saves_attempts() -> None:
    found = fit.fit(lambda batch: 50.0 + batch if batch <= 64 else None, 114 / fit.USABLE, 50.0)
    assert [attempt["batch"] for attempt in found["attempts"]] == [8, 64, 72]


def test_attempts_are_bounded() -> None:
    found = fit.fit(float, 1e30)
    assert len(found["attempts"]) == fit.ATTEMPTS and not found["largest"]


def test_a_batch_that_fits_is_measured(peer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    sizes = [*SIZES, "2", "--vocab-size", "60", "--rounds", "3"]
    wanted = speed.options([*sizes, "--batch", "fit", "--nanogpt", str(peer)])
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 0))  # no guess: 8 by 8
    bench = speed.Bench(wanted, torch.device("cpu"))
    start = nanogpt_ways.start

    def limited(*args: Any) -> nanogpt_ways.Ready:
        if args[3] > 16:
            raise torch.OutOfMemoryError("too large")
        return start(*args)

    monkeypatch.setattr(speed, "start", limited)
    row: dict[str, Any] = {"way": "ours-eager", "dropout": 0.0, "asked": "fit"}
    bench._alone(row, 0.0, "fit")
    assert row["batch"] == 16 and row["fit"]["largest"] and len(row["ms"]) == 3


class StandIn:
    """What stands in for a CUDA stream; of replays it is told."""

    replays = 0

    def run(self, call: Callable[[], Any]) -> Any:
        return call()

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        return self.replay, None

    def replay(self) -> None:
        StandIn.replays += 1


@pytest.fixture
def wanted(peer: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Options of a tiny model with dropout, graphs being allowed."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        sizes = [*SIZES, "2", "--vocab-size", "60", "--dropout", "0.1", "--nanogpt", str(peer)]
        return speed.options([*sizes, "--ways", nanogpt_ways.GRAPH])


def test_a_step_is_one_graph_with_masks_of_its_own(
    wanted: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "Stream", StandIn)
    monkeypatch.setattr(StandIn, "replays", 0)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    ready = nanogpt_ways.start(nanogpt_ways.GRAPH, wanted, 0.1, 2, torch.device("cpu"))
    assert ready.graphed and StandIn.replays == 1
    model = ready.bare.model
    assert isinstance(model, GPTModel)
    seeds = [int(model.dropout_seed)]
    for _ in range(2):
        ready.step()
        seeds.append(int(model.dropout_seed))
    assert StandIn.replays == 3 and len(set(seeds)) == 3
    before = [p.clone() for p in model.parameters()]
    ready.plain()
    assert StandIn.replays == 3
    assert not all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("too large"), RuntimeError("broken")])
def test_a_step_that_cannot_be_captured_is_no_row(
    error: Exception, wanted: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> tuple[Callable[[], None], Any]:
        raise error

    monkeypatch.setattr(graph, "Stream", StandIn)
    monkeypatch.setattr(StandIn, "capture", fail)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    with pytest.raises(type(error), match=f"no CUDA graph of a step: .*{error}"):
        nanogpt_ways.start(nanogpt_ways.GRAPH, wanted, 0.1, 2, torch.device("cpu"))


def test_what_was_measured_is_written_before_the_end(
    run_speed: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = speed.Bench.rows

    def cut_off(self: speed.Bench) -> Any:
        yield next(rows(self))
        raise KeyboardInterrupt

    monkeypatch.setattr(speed.Bench, "rows", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run_speed("--ways", "nanogpt-eager", "ours-eager")
    record = json.loads((tmp_path / "made" / "here" / "speed.json").read_text())
    assert [row["way"] for row in record["rows"]] == ["nanogpt-eager"]
    assert record["rows"][0]["tokens_per_second"] > 0


def test_both_sides_reach_the_same_loss(
    run_loss: Main, tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, record = run_loss()
    assert status == 0 and record["claims_hold"]
    found = [(run["side"], run["seed"]) for run in record["runs"]]
    sides = ("nanogpt", "control", "ours")
    order = ("nanogpt", "control beside", "ours beside", "control", "ours")
    assert found == [(side, seed) for seed in (1337, 1338, 1339) for side in order]
    for run in record["runs"]:
        assert len(run["losses"]) == 30 and run["losses"][-1] < run["losses"][0]
        assert run["final"] == pytest.approx(sum(run["losses"][10:]) / 20, abs=1e-5)
        assert run["held_out"] < run["losses"][0] - 0.1  # it was learnt
    peer, control, own = (nanogpt_claims.of_side(record["runs"], side) for side in sides)
    for theirs, other in zip(peer, control, strict=True):
        assert theirs["losses"] != other["losses"] == pytest.approx(theirs["losses"], abs=1e-3)
    pairs = list(zip(peer, own, strict=True))
    for theirs, ours in pairs:
        assert abs(theirs["losses"][0] - ours["losses"][0]) <= 1e-5
        assert theirs["losses"] == pytest.approx(ours["losses"], abs=1e-3)
    assert len({theirs["losses"][0] for theirs, _ in pairs}) == 3  # seeds differ
    assert record["text"] == json.loads((prepared / "text.json").read_text())
    assert record["training"]["weight_decay"] == 0.1 and record["training"]["beta2"] == 0.95
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {name: record[name] for name in ("claims_hold", "claims")}
    picture = (tmp_path / "out" / "curves.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and picture[-8:-4] == b"IEND"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["curves.png", "loss.json"]


def test_the_models_agree_bit_for_bit_in_their_weights(peer: Path) -> None:
    module = nanogpt.load(peer)
    cfg = GPTConfig(60, 16, 32, 2, 2, 0.0, qkv_bias=True, activation="gelu")
    theirs, ours = nanogpt.peer(module, cfg), GPTModel(cfg)
    ours.load_state_dict(nanogpt.own_names(theirs.state_dict()))
    state = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(state[nanogpt.own_name(name)], tensor)


@pytest.mark.parametrize(
    ("right", "wrong", "failing"),
    [
        ("F.gelu(", "F.silu(", {"first_step"}),
        ("logits, F.cross", "logits, 1.01 * F.cross", {"final", "held_out", "first_step", "drift"}),
        ("lr=lr", "lr=lr * 0", set()),  # the script sets the rate
        ("betas=betas", "betas=(0.0, 0.95)", {"final", "held_out", "drift"}),
    ],
)
def test_another_model_or_optimizer_is_told(
    right: str,
    wrong: str,
    failing: set[str],
    run_loss: Main,
    peer: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss, "draw", lambda record, path: None)
    assert STAND_IN.count(right) == 1
    (peer / "model.py").write_text(STAND_IN.replace(right, wrong))
    status, record = run_loss()
    assert {name for name, claim in record["claims"].items() if not claim["holds"]} == failing
    assert status == bool(failing) and record["claims_hold"] is not bool(failing)


def test_other_decays_are_refused(run_loss: Main, peer: Path) -> None:
    (peer / "model.py").write_text(STAND_IN.replace("decay if two", "decay / 2 if two"))
    with pytest.raises(ValueError, match=r"both sides must decay .* alike"):
        run_loss()


def runs_of(theirs: list[float], ours: list[float]) -> list[dict[str, Any]]:
    return [
        {"side": side, "seed": seed, "losses": [9.0], "final": value, "held_out": value}
        for seed, (peer, own) in enumerate(zip(theirs, ours, strict=True))
        for side, value in (
            *(("nanogpt", peer), ("control beside", peer), ("ours beside", own)),
            *(("control", peer + 1), ("ours", own)),
        )
    ]


@pytest.mark.parametrize(
    ("theirs", "ours", "holds"),
    [
        ([3.0, 3.01], [3.004, 3.014], True),
        ([3.0, 3.01], [3.006, 3.016], False),  # above the limit
        ([3.0, 3.001], [3.004, 3.005], False),  # outside the spread
        ([3.0, 3.01], [2.99, 3.02], True),  # the mean counts
        ([3.0, 3.01], [3.0, math.nan], False),
        ([3.0, math.nan], [3.0, 3.0], False),
    ],
)
def test_claims_can_fail(theirs: list[float], ours: list[float], holds: bool) -> None:
    claims = nanogpt_claims.judge(runs_of(theirs, ours), 1e-5)
    assert claims["first_step"]["holds"]
    assert claims["final"]["control_differences"][0] == pytest.approx(1.0)
    assert claims["final"]["holds"] is claims["held_out"]["holds"] is holds


@pytest.mark.parametrize(
    ("steps", "apart", "drift"),
    [
        (
            20,
            {9: 0.001, 19: 0.002, 5: 1.0},
            0.003,
        ),  # only what has been added up since it was equal
        (25, {24: 0.004}, 0.004),
        (20, {9: 0.004, 19: -0.004}, 0.0),
        (500, dict.fromkeys(range(9, 500, 10), 2e-4), 0.01),
        (1, {0: math.nan}, math.nan),
    ],
)
def test_drift_is_what_is_apart_at_the_end_of_each_span(
    steps: int, apart: dict[int, float], drift: float
) -> None:
    runs = runs_of([3.0, 3.1], [3.0, 3.1])
    for run in runs:
        differs = apart if run["side"] == "ours beside" else {}
        run["losses"] = [9.0 + differs.get(step, 0.0) for step in range(steps)]
    claim = nanogpt_claims.judge(runs, 1e-5)["drift"]
    assert claim["differences"] == pytest.approx([drift] * 2, nan_ok=True)
    assert claim["control_differences"] == [0.0, 0.0]
    assert claim["holds"] is (abs(drift) <= 0.005)


def test_a_text_is_made_from_installed_packages(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "words"
    package.mkdir()
    lines = text.read_text().splitlines(keepends=True)
    for start in range(0, 300, 10):
        (package / f"part{start}.py").write_text("".join(lines[start : start + 10]))
    monkeypatch.setattr(nanogpt_text, "_place", lambda name: tmp_path / name)
    monkeypatch.setattr(nanogpt_text, "STANDARD_LIBRARY", ())
    monkeypatch.setattr(nanogpt_text.importlib.metadata, "version", lambda name: "1.0")
    sizes = "--tokenizer-size 270 --tokens 2000 --held-out 90"
    asked = [*sizes.split(), "--packages", "words", "--prepare"]
    made = [tmp_path / name for name in ("one", "two")]
    for folder in made:
        assert loss.main([*asked, str(folder)]) == 0
    one, two = map(nanogpt_text.read, made)
    assert one.record == two.record == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (len(one.train), len(one.held_out), one.vocab_size) == (2000, 90, 270)
    assert one.record["sources"][-1] == "words 1.0" and one.train.max() == 269  # documents end
    (made[0] / "train.bin").write_bytes(b"\x00\x00")
    with pytest.raises(ValueError, match=r"train.bin is damaged or missing"):
        nanogpt_text.read(made[0])
    with pytest.raises(ValueError, match="text must have 9,000,000 tokens for train"):
        loss.main([*asked, str(made[0]), "--tokens", "9000000"])


@pytest.mark.parametrize("script", [speed, loss])
def test_refusals(
    script: Any, tmp_path: Path, peer: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*more: object) -> str:
        with pytest.raises(SystemExit) as end:
            script.main([str(part) for part in more])
        assert end.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "folder with nanoGPT's model.py, got none" in refusal()
    for folder in (tmp_path / "none", tmp_path):
        assert f"model.py, got {folder}, which has none" in refusal("--nanogpt", folder)
    (tmp_path / "model.py").write_text("class GPT: ...")
    assert "must define GPTConfig" in refusal("--nanogpt", tmp_path)
    if script is speed:
        bad = {"--dropout": "1.5", "--batch": "0", "--rounds": "0", "--heads": "7"}
        says = (
            "drop_rate must be in",
            "--batch must be",
            "--rounds must be",
            "divisible by n_head",
        )
        if not torch.cuda.is_available():
            assert "no CUDA device" in refusal("--nanogpt", peer, "--batch", "fit")
            assert "no CUDA device" in refusal("--nanogpt", peer, "--ways", nanogpt_ways.GRAPH)
        for (name, value), words in zip(bad.items(), says, strict=True):
            assert words in refusal("--nanogpt", peer, name, value)
        return
    assert "--text must name a folder" in refusal("--nanogpt", peer)
    assert "no text.json" in refusal("--nanogpt", peer, "--text", tmp_path)
    given = ("--nanogpt", peer, "--text", prepared)
    assert "--vocab-size must be at least the text's 50" in refusal(*given, "--vocab-size", "40")
    assert "--seeds must be at least 2" in refusal(*given, "--seeds", "1", "1")
    assert "must leave a batch" in refusal(*given, "--length", "1024")


def test_options_name_a_shape(peer: Path) -> None:
    wanted: argparse.Namespace = speed.options(
        ["--nanogpt", str(peer), "--shape", "medium", "--layers", "3"]
    )
    cfg = wanted.cfg
    assert (cfg.n_layers, cfg.n_heads, cfg.emb_dim, cfg.vocab_size) == (3, 16, 1024, 50304)
