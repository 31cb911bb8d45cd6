"""What the tests of training share: the tiny run as a config, its data."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashgpt.data.prepare import prepare
from flashgpt.data.shards import TokenData
from flashgpt.runconfig import DataConfig, ModelConfig, RunConfig, SampleConfig, TrainConfig
from flashgpt.train import record


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are empty files: drawing one takes as long as a tiny run."""
    monkeypatch.setattr(record, "draw_loss", lambda metrics, path, title: path.touch())


@pytest.fixture
def run(shared: Path, text: Path) -> RunConfig:
    """The tiny run as a config, without evaluations on the way."""
    return RunConfig(
        ModelConfig(n_layers=2, emb_dim=32, n_heads=2, context_length=32, drop_rate=0.1),
        DataConfig((str(text),), "bytes", cache=str(shared / "cache")),
        TrainConfig(steps=3, tokens_per_step=128, lr=1e-2, eval_every=0),
        SampleConfig(max_new_tokens=1),
    )


@pytest.fixture
def data(run: RunConfig) -> TokenData:
    return TokenData.open(prepare(run.data))
