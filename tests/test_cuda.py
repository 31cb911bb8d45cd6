"""What only a GPU can show. On a machine with one: pytest -m gpu

The same promises as on the CPU: every kernel within the rule in every precision, masks equal to the
CPU's bit for bit, training and generation on either setting of the switch.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flashgpt import GPTModel
from flashgpt.attention import verify
from flashgpt.attention.dropout import Dropout, attention_keep, element_keep
from flashgpt.attention.kernels import choose
from flashgpt.attention.request import Request
from flashgpt.cli import main
from flashgpt.measure import audit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
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
    half = {"sdpa:flash", "sdpa:efficient"} if dtype != torch.float32 else set()
    assert served == {"standard", "blocked"} | half


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
    assert found.checks[audit.MASKS] == {"standard": True, "blocked": True}


@pytest.mark.parametrize(("gradient", "kernel"), [(True, "sdpa:flash"), (False, "sdpa:cudnn")])
def test_cudnn_serves_only_without_a_gradient(gradient: bool, kernel: str) -> None:
    request = Request(
        "cuda", torch.bfloat16, 64, 1024, "square", False, False, gradient, deterministic=False
    )
    assert choose(request).kernel == kernel


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
