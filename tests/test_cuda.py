"""What only a GPU can show. On a machine with one: pytest -m gpu

The same promises as on the CPU: every kernel within the rule in every precision, masks equal to the
CPU's bit for bit, training and generation on either setting of the switch.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from flashgpt import GPTModel
from flashgpt.attention import fa4, kernels, verify
from flashgpt.attention.dropout import Dropout, attention_keep, element_keep
from flashgpt.attention.kernels import choose
from flashgpt.attention.request import Request
from flashgpt.cli import main
from flashgpt.config import GPTConfig
from flashgpt.measure import audit, bench_train
from flashgpt.measure.memory import peak_bytes
from flashgpt.runconfig import TrainConfig
from flashgpt.train import optimizer, runtime
from flashgpt.train.feed import Feed
from flashgpt.train.muon import Muon
from flashgpt.train.step import Forward, Stepper, dropout_seed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
FA4 = {"fa4"} if torch.cuda.is_available() and not fa4._missing() else set()
CFG = {
    "vocab_size": 300,
    "context_length": 128,
    "emb_dim": 128,
    "n_heads": 2,
    "n_layers": 2,
    "drop_rate": 0.1,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_kernel_is_within_the_rule(dtype: torch.dtype) -> None:
    rows = list(verify.audit(verify.quick_cases(dtype), CUDA))
    over = [
        f"{r.kernel} {r.case} {r.tensor}: {r.max_used:.2f} {r.rms_used:.2f}"
        for r in rows
        if not (r.passed or r.known)
    ]
    assert not over, "\n".join(over)
    served = {row.kernel for row in rows}
    half = {"sdpa:flash", "sdpa:efficient", "sdpa:cudnn", *FA4} if dtype.itemsize == 2 else set()
    assert served == {"standard", "blocked", "triton"} | half


@pytest.mark.parametrize("seed", [0, 1, -(2**63), 2**63 - 1])
def test_masks_equal_those_of_the_cpu(seed: int) -> None:
    masks = []
    for device in ("cpu", "cuda"):
        words = torch.tensor([seed, 5], device=device)
        dropout = Dropout(0.1, words[0], words[1], layer=3)
        masks.append(attention_keep(dropout, 2, 3, 65, 130).cpu())
        masks.append(element_keep(dropout, 1, 2, 7, 65, 48).cpu())
    assert torch.equal(masks[0], masks[2])
    assert torch.equal(masks[1], masks[3])


def test_a_whole_model_passes_the_audit() -> None:
    torch.manual_seed(0)
    found = audit.run(GPTModel(CFG), CUDA, cases=[])
    assert found.passed, [row for row in found.rows if not row.passed]
    assert found.checks[audit.MASKS] == {"standard": True, "blocked": True, "triton": True}


@pytest.mark.parametrize(("gradient", "kernel"), [(True, "triton"), (False, "sdpa:cudnn")])
@pytest.mark.parametrize("deterministic", [True, False])
def test_cudnn_serves_only_without_a_gradient(
    gradient: bool, deterministic: bool, kernel: str
) -> None:
    """And where FlashAttention-4 does not come first."""
    request = Request(
        "cuda", torch.bfloat16, 64, 1024, "square", False, False, gradient, deterministic
    )
    fa4_serves = FA4 and not (deterministic and gradient)
    assert choose(request).kernel == ("fa4" if fa4_serves else kernel)
    assert choose(dataclasses.replace(request, dropout=True)).kernel == "triton"


def weights_after_muon(
    device: torch.device, dtype: torch.dtype, theirs: bool, lr: float = 0.02, steps: int = 3
) -> torch.Tensor:
    """All weights, float64 on the CPU, after a few steps of PyTorch's Muon or of ours."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(96, 32), (32, 96), (64, 64), (96, 32)]
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    parameters = [torch.nn.Parameter(weight.to(device, dtype)) for weight in start]
    options: dict[str, Any] = {"lr": lr, "weight_decay": 0.1}
    muon: torch.optim.Optimizer
    if theirs:
        muon = torch.optim.Muon(parameters, adjust_lr_fn="match_rms_adamw", **options)
    else:
        muon = Muon(parameters, **options)
    for _ in range(steps):
        for parameter, shape in zip(parameters, shapes, strict=True):
            gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
            parameter.grad = gradient.to(device, dtype)
        muon.step()
    return torch.cat([parameter.detach().double().cpu().flatten() for parameter in parameters])


def test_muon_is_as_exact_as_pytorchs() -> None:
    """Rule: twice the error of torch.optim.Muon, whose products are bf16 too, and a bf16 rounding
    of each step's update (entries below 1.21 * 0.2 sqrt(96)), both against float64 on the CPU."""
    oracle = weights_after_muon(torch.device("cpu"), torch.float64, theirs=False)
    theirs = weights_after_muon(CUDA, torch.float32, theirs=True) - oracle
    ours = weights_after_muon(CUDA, torch.float32, theirs=False) - oracle
    rounding = 3 * 0.02 * 1.21 * 0.2 * 96**0.5 * 2**-9
    limit = 2 * (float(theirs.abs().max()) + rounding)
    limit_rms = 2 * float(theirs.square().mean().sqrt()) + rounding
    assert ours.abs().max() <= limit and ours.square().mean().sqrt() <= limit_rms
    for change in ({"lr": 0.03}, {"steps": 2}):
        wrong = weights_after_muon(CUDA, torch.float32, theirs=False, **change) - oracle
        assert wrong.square().mean().sqrt() > limit_rms, change


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_or_its_refusal_does_not_wait_for_the_device(
    kind: Literal["adamw", "muon"],
) -> None:
    model = GPTModel(CFG).to(CUDA)
    made = optimizer.build(model, TrainConfig(optimizer=kind))
    for refused in (0.0, 1.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, torch.nan) if refused else torch.randn_like(p)
        before = [p.detach().clone() for p in model.parameters()]
        flag = torch.tensor(refused, device=CUDA)
        torch.cuda.set_sync_debug_mode("error")
        try:
            made.step(flag)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        same = [torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        assert all(same) if refused else not any(same)


@pytest.mark.parametrize("use_flash", [True, False])
def test_activation_checkpointing_changes_no_bit_and_takes_less_memory(use_flash: bool) -> None:
    ids = torch.arange(8 * 128, device=CUDA).view(8, 128) % 300
    found, peaks = [], []
    for on in (False, True):
        torch.manual_seed(0)
        model = GPTModel({**CFG, "n_layers": 8, "use_flash": use_flash}).to(CUDA)
        model.set_attention(deterministic=True)
        model.set_checkpointing(on)
        model.set_dropout(3)

        def step(model: GPTModel = model) -> None:
            with runtime.casting(CUDA, torch.bfloat16):
                loss = model(ids, ids)
            loss.backward()

        kernels.clear_receipt()
        with runtime.repeating(True):
            step()
            (line,) = kernels.receipt()
            assert line.startswith(f"{'triton' if use_flash else 'standard'} served cuda, bfloat16")
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            peaks.append(peak_bytes(step, CUDA))
    assert all(map(torch.equal, *found))
    assert peaks[1] < 0.5 * peaks[0], peaks


def test_activation_checkpointing_takes_less_memory_compiled_too() -> None:
    ids = torch.arange(8 * 128, device=CUDA).view(8, 128) % 300
    peaks = []
    for on in (False, True):
        torch.manual_seed(0)
        model = GPTModel({**CFG, "n_layers": 8}).to(CUDA)
        model.set_checkpointing(on)
        forward = torch.compile(model, dynamic=False)

        def step(forward: Forward = forward) -> None:
            with runtime.casting(CUDA, torch.bfloat16):
                loss = forward(ids, ids)
            loss.backward()

        step()
        peaks.append(peak_bytes(step, CUDA))
    assert peaks[1] < 0.6 * peaks[0], peaks


TRAIN = (
    "train --data.source my.txt --data.tokenizer bytes --model.context-length 128 "
    "--model.n-layers 2 --model.drop-rate 0.1 --train.tokens-per-step 2048"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a folder with a text to learn."""
    text = "\n".join(f"line {i % 10} of the text says {i % 7}" for i in range(3000))
    (tmp_path / "my.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("compile_", ["on", "off"])
@pytest.mark.parametrize("use_flash", ["True", "False"])
def test_training_learns_and_resumes(compile_: str, use_flash: str, here: Path) -> None:
    command = (
        f"{TRAIN} --train.steps 60 "
        f"--train.lr 3e-3 --train.compile {compile_} --model.use-flash {use_flash} --out runs/a"
    ).split()
    assert main([*command, "--train.stop-at", "30"]) == 0
    assert main(["train", "--resume", "--out", "runs/a", "--train.stop-at", "60"]) == 0
    metrics = [json.loads(line) for line in (here / "runs/a/metrics.jsonl").open()]
    assert [m["step"] for m in metrics] == list(range(1, 61))
    assert metrics[-1]["loss"] < 0.6 * metrics[0]["loss"]
    assert main(["generate", "runs/a", "--prompt", "line 1", "--max-new-tokens", "200"]) == 0


@pytest.mark.parametrize("compile_", ["on", "off"])
@pytest.mark.parametrize("use_flash", ["True", "False"])
@pytest.mark.usefixtures("here")
def test_a_deterministic_run_resumes_bit_for_bit(compile_: str, use_flash: str) -> None:
    command = (
        f"{TRAIN} --train.steps 40 "
        f"--train.deterministic True --train.compile {compile_} --model.use-flash {use_flash}"
    ).split()
    assert main([*command, "--out", "runs/whole"]) == 0
    assert main([*command, "--out", "runs/halves", "--train.stop-at", "20"]) == 0
    assert main(["train", "--resume", "--out", "runs/halves"]) == 0
    name = "checkpoints/step_00000040"
    for file in ("model.safetensors", "trainer/optimizer.safetensors"):
        halves, whole = (load_file(Path("runs", run, name, file)) for run in ("halves", "whole"))
        assert all(torch.equal(halves[key], whole[key]) for key in whole | halves)


def run(name: str, *more: str) -> Path:
    """Trains by the CLI into runs/NAME; every step can be repeated."""
    exact = "--train.deterministic True --train.steps 40 --train.compile off --out"
    assert main([*TRAIN.split(), *exact.split(), f"runs/{name}", *more]) == 0
    return Path("runs", name)


def checkpoint(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights, moments and the guard's memory."""
    place = folder / "checkpoints" / f"step_{step:08d}"
    files = ("model", "trainer/optimizer", "trainer/guard")
    return {
        f"{file}.{name}": tensor
        for file in files
        for name, tensor in load_file(place / f"{file}.safetensors").items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one | other)


@pytest.mark.usefixtures("here")
def test_a_checkpoint_written_beside_the_training_is_of_its_step() -> None:
    """The steps behind it change the weights while they are copied and written."""
    whole = run("whole", "--train.checkpoint-every", "10", "--train.keep-checkpoints", "0")
    for stop in (10, 30):
        stopped = run(f"stopped-{stop}", "--train.stop-at", str(stop))
        assert same(checkpoint(stopped, stop), checkpoint(whole, stop))
    assert not same(checkpoint(whole, 10), checkpoint(whole, 20))


@pytest.mark.usefixtures("here")
def test_a_step_that_is_refused_while_others_are_under_way_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = {dropout_seed(1337, step): step for step in (5, 6, 20)}

    def compiled(model: GPTModel, *_: object) -> Forward:
        def forward(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = model(ids, targets)
            return loss * torch.nan if int(model.dropout_seed) in bad else loss

        return forward

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "compiled", compiled)
        refused = run("refused")
    update, calls = optimizer.Optimizer.step, iter(range(100))

    def without(self: optimizer.Optimizer, refused: torch.Tensor | None = None) -> None:
        if next(calls) not in bad.values():
            update(self)

    monkeypatch.setattr(optimizer.Optimizer, "step", without)
    reference = run("reference")
    weights = [checkpoint(folder, 40) for folder in (refused, reference)]
    guards = [{n: v.pop(n) for n in list(v) if "guard" in n} for v in weights]
    assert same(*weights) and not same(*guards)
    names = sorted(path.name for path in (refused / "incidents").iterdir())
    assert names == [f"step_{step + 1:08d}" for step in bad.values()]


@pytest.mark.usefixtures("here")
def test_no_step_waits_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Stepper._launch

    def strict(self: Stepper, step: int, feed: Feed) -> object:
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            return launch(self, step, feed)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Stepper, "_launch", strict)
    for precision in ("bf16", "fp16"):
        run(precision, "--train.precision", precision, "--train.deterministic", "False")


@pytest.mark.parametrize("use_flash", ["True", "False"])
@pytest.mark.usefixtures("here")
def test_fp16_scales_its_loss_and_goes_on_with_the_scale(use_flash: str) -> None:
    options = ("--train.precision", "fp16", "--model.use-flash", use_flash, "--train.lr", "3e-3")
    whole = run("whole", *options)
    metrics = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    halves = run("halves", *options, "--train.stop-at", "20")
    assert main(["train", "--resume", "--out", "runs/halves"]) == 0
    assert same(checkpoint(halves, 40), checkpoint(whole, 40))
    assert float(checkpoint(whole, 40)["trainer/guard.scale"]) > 1


@pytest.mark.parametrize("compile_", ["off", "on"])
def test_a_benchmarked_step_has_all_its_parts(compile_: Literal["off", "on"]) -> None:
    setup = bench_train.Setup(
        cfg=GPTConfig.from_dict({**CFG, "qkv_bias": True}),
        batch=4,
        dropouts=(0.1,),
        compile=compile_,
        peers=True,
        steps=2,
        rounds=3,
        device=CUDA,
    )
    found = bench_train.measure(setup)
    assert found.refused == [] and len(found.rows) == 3 and not found.alternated
    for row in found.rows:
        assert sum(row.parts.values()) == pytest.approx(row.ms)
        apart = not row.model.startswith("use_flash")  # ours computes GELU in the products
        assert all(ms > 0 for name, ms in row.parts.items() if apart or name != "activation"), row
        assert row.peak_bytes > 4 * 4 * found.parameters
