"""Logits of GPT-2's four shapes, and greedy tokens, beside transformers.

pytest tests/test_benchmark_greedy.py
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import greedy
from flashgpt.attention import kernels
from flashgpt.measure import peer
from flashgpt.model.gpt2 import GPTModel

CFG = dict(
    vocab_size=61, context_length=16, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0
)  # fmt: skip
SMALL = ["--prompts", "4", "--tokens", "8", "--layers", "1", "--vocab-size", "300"]


def test_all_shapes_and_texts_are_those_of_transformers(
    tmp_path: Path, trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made"
    assert greedy.main([str(trained.folder), *SMALL, "--out", str(out)]) == 0
    record = json.loads((out / "greedy.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record["claims"]
    assert record["claims"]["shapes_hold"] and record["claims"]["texts_equal"] == 8
    assert {"torch", "transformers", "device", "date"} <= record["environment"].keys()
    widths = {name: shape["shape"]["emb_dim"] for name, shape in record["logits"].items()}
    assert widths == {"gpt2": 768, "gpt2-medium": 1024, "gpt2-large": 1280, "gpt2-xl": 1600}
    for shape in record["logits"].values():
        assert shape["shape"]["context_length"] == 1024 and shape["shape"]["qkv_bias"]
        # A rule that a wrong model could keep would be none.
        assert 0 < shape["transformers"] < 1e-5 * shape["largest_logit"]
        assert max(shape["ours"].values()) <= 2 * shape["transformers"]
    assert [text["equal"] for text in record["greedy"]] == [{"on": 8, "off": 8}] * 4


Attention = Callable[..., tuple[Any, ...]]


def without_scale(attention: Attention) -> Attention:
    def broken(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Any:
        return attention(q * q.shape[-1] ** 0.5, k, v, **rest)

    return broken


def test_a_broken_path_fails_in_logits_and_in_texts(
    tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, kernel in kernels.KERNELS.items():
        if name != "standard":
            broken = dataclasses.replace(kernel, attention=without_scale(kernel.attention))
            monkeypatch.setitem(kernels.KERNELS, name, broken)
    monkeypatch.setattr(greedy, "SHAPES", ("gpt2",))
    assert greedy.main([str(trained.folder), *SMALL, "--out", str(tmp_path)]) == 1
    record = json.loads((tmp_path / "greedy.json").read_text())
    errs = record["logits"]["gpt2"]
    assert not errs["holds"] and errs["ours"]["on"] > 100 * errs["ours"]["off"]


def test_a_token_that_is_another_is_found() -> None:
    torch.manual_seed(0)
    model = GPTModel(CFG).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("h.") and parameter.dim() == 2:
                parameter.normal_(std=0.4)
    (same,) = greedy.greedy(model, [[1, 2, 3]], 10)
    assert same["equal"] == {"on": 10, "off": 10} and same["distinct"] > 2
    other = peer.with_weights_of(model)
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight.normal_(std=0.4)  # type: ignore[union-attr]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer, "with_weights_of", lambda own: other)
        (found,) = greedy.greedy(model, [[1, 2, 3]], 10)
    assert max(found["equal"].values()) < 10


def test_the_chapter_on_interchange_says_what_was_found() -> None:
    root = Path(greedy.__file__).parents[1]
    record = json.loads((root / "benchmarks" / "greedy" / "greedy.json").read_text())
    page = (root / "docs" / "interchange.md").read_text().split("### Beside transformers")[1]
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line[:1] == "|"][2:]
    for (name, *cells), shape in zip(lines, record["logits"].values(), strict=True):
        errs = [shape["transformers"], shape["ours"]["on"], shape["ours"]["off"]]
        assert cells == [f"{value:.1e}" for value in errs], name
        assert shape["holds"] and shape["shape"]["n_layers"] == 4
    assert [line[0] for line in lines] == list(record["logits"]) == list(greedy.SHAPES)
    texts, whole = record["greedy"], record["tokens"]
    assert all(text["equal"] == {"on": whole, "off": whole} for text in texts)
    assert f"{len(texts)} texts of {whole} greedy tokens" in " ".join(page.split())
    seen = [text["distinct"] for text in texts]
    assert f"({min(seen)} to {max(seen)} different ones in each)" in " ".join(page.split())
    where = record["environment"]
    assert f"`transformers` {where['transformers']}" in page and where["date"] == "2026-11-25"
