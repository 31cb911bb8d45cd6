"""From one cfg to a working system. pytest tests/test_orchestrator.py"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flashgpt import orchestrator
from flashgpt.attention import kernels
from flashgpt.config import GPTConfig
from flashgpt.data.prepare import prepare
from flashgpt.data.shards import TokenData
from flashgpt.orchestrator import CFG, build
from flashgpt.runconfig import DataConfig, RunConfig, SampleConfig

SMALL: dict[str, Any] = {
    **CFG,
    **dict(vocab_size=300, context_length=16, emb_dim=16, n_heads=2, n_layers=1),
    "train": {"tokens_per_step": 32, "steps": 2, "device": "cpu"},
}


def test_the_module_shows_four_lines() -> None:
    """Once, in a process of its own: this builds the model of 124 million parameters."""
    done = subprocess.run(
        [sys.executable, "-m", "flashgpt.orchestrator"], capture_output=True, text=True, check=True
    )
    assert re.fullmatch(
        rf"PyTorch version: {re.escape(torch.__version__)}\n"
        r"Flash attention available: True\n"
        r"Input shape: \[2, 256\]\n"
        r"Logits shape: \[2, 256, 50257\]\n",
        done.stdout,
    ), done.stdout
    assert done.stderr == ""


def test_cfg_is_gpt2_and_every_key_of_it_is_explained() -> None:
    extra = {"tokenizer", "train"}
    cfg = GPTConfig.from_dict({k: v for k, v in CFG.items() if k not in extra})
    assert (cfg.emb_dim, cfg.n_layers, cfg.context_length) == (768, 12, 1024)
    assert set(CFG) == set(cfg.to_dict()) | extra
    source = Path(orchestrator.__file__).read_text()
    for name in CFG:
        assert re.search(rf'^    "{name}": .*,  # \w', source, re.MULTILINE), name


def test_a_system_writes_and_trains(tmp_path: Path, text: Path) -> None:
    system = build(SMALL)
    config = SampleConfig(max_new_tokens=5)
    assert isinstance(system.generator("ab", config), str)
    run = RunConfig(data=DataConfig((str(text),), "bytes", cache=str(tmp_path / "cache")))
    data = TokenData.open(prepare(run.data))
    before = system.model.wte.weight.detach().clone()
    result = system.trainer.fit(data, tmp_path / "run", run)
    assert result.step == 2 and result.interrupted is None
    assert not torch.equal(system.model.wte.weight, before)
    assert result.evaluation is not None and result.evaluation.loss > 0
    assert result.checkpoint == tmp_path / "run" / "checkpoints" / "step_00000002"


def test_weights_come_from_the_seed() -> None:
    models = [build({**SMALL, "train": {"seed": seed}}).model for seed in (1, 1, 2)]
    first, second, third = (model.wte.weight for model in models)
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_the_switch_reaches_the_model() -> None:
    for use_flash in (True, False):
        system = build({**SMALL, "use_flash": use_flash})
        kernels.clear_receipt()
        system.generator("ab", SampleConfig(max_new_tokens=1))
        served = {line.split()[0] for line in kernels.receipt()}
        assert served == ({"standard"} if not use_flash else served - {"standard"}) != set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 1}, "unknown key 'n_layer'; did you mean 'n_layers'"),
        ({"vocab_size": 256}, "vocab_size must be at least the tokenizer's 257, got 256"),
        ({"n_heads": 3}, "emb_dim must be divisible by n_heads"),
        ({"tokenizer": "nosuch"}, "tokenizer must be bytes, gpt2"),
        ({"train": {"stepz": 1}}, "train has an unknown key 'stepz'; did you mean 'steps'"),
        ({"train": {"steps": 0}}, "train.steps must be at least 1"),
        ({"train": {"tokens_per_step": 33}}, "train.tokens_per_step must be a multiple"),
    ],
)
def test_a_wrong_cfg_is_explained(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build({**SMALL, **change})


def test_a_missing_key_is_explained() -> None:
    with pytest.raises(ValueError, match="lacks 'drop_rate'"):
        build({k: v for k, v in SMALL.items() if k != "drop_rate"})


def test_flash_is_available_when_a_fused_kernel_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.clear_receipt()
    assert orchestrator.flash_available()
    kernels.clear_receipt()
    kernels.choose.cache_clear()
    monkeypatch.setattr(kernels, "FASTEST", {})
    assert not orchestrator.flash_available()
    kernels.choose.cache_clear()
    kernels.clear_receipt()
