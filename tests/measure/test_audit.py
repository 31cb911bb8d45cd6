"""The audit of a model: right passes, broken fails. pytest tests/measure/test_audit.py"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgpt.attention import kernels
from flashgpt.attention.kernels import KERNELS
from flashgpt.attention.verify import Case
from flashgpt.generation.cache import LayerKV
from flashgpt.measure import audit
from flashgpt.model.gpt2 import GPTModel

CPU = torch.device("cpu")
CASES = [Case(32, 4, 33, 33, 16), Case(32, 4, 33, 40, 16, 0.1)]
CFG: dict[str, Any] = {
    "vocab_size": 67,
    "context_length": 40,
    "emb_dim": 32,
    "n_heads": 2,
    "n_layers": 2,
    "drop_rate": 0.0,
}


@pytest.fixture(autouse=True)
def _small(short_audit: None) -> None:
    """All closed forms are in tests/attention/test_properties.py."""


@pytest.fixture
def model() -> GPTModel:
    """Weights large enough that attention matters to the logits."""
    torch.manual_seed(0)
    made = GPTModel({**CFG, "drop_rate": 0.3})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def test_a_right_model_passes_and_stays_as_it_was(model: GPTModel) -> None:
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.eval()
    cfg = model.cfg
    notes: list[str] = []
    found = audit.run(model, CPU, notes.append, CASES)
    assert found.passed
    every = {"standard": True, "blocked": True, "sdpa:cpu": True}
    assert found.checks == {
        audit.MASKS: {"standard": True, "blocked": True},
        audit.CAUSAL: every,
        audit.REPEATED: every,
        audit.LINEAR: {"blocked": True, "sdpa:cpu": True},
        audit.GREEDY: {"model": True},
    }
    whole = [row for row in found.rows if row.kernel == "use_flash=True"]
    assert [row.tensor for row in whole] == ["logits", "loss", "gradients"] * 2 + ["logits"]
    assert [row.case.split(", ")[-1] for row in whole] == (
        ["dropout 0 float32"] * 3 + ["dropout 0.1 float32"] * 3 + ["2 layers float32"]
    )
    assert {row.kernel for row in found.rows} == {*every, "definition", "use_flash=True"}
    assert len(notes) == len(CASES) + 5
    assert (model.training, model.cfg) == (False, cfg)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_both_paths_really_run(model: GPTModel) -> None:
    kernels.clear_receipt()
    list(audit.audit_model(model, 0.0, CPU))
    list(audit.audit_model(model, 0.1, CPU))
    served = {(line.split()[0], "dropout" in line.split("(")[0]) for line in kernels.receipt()}
    assert served == {
        ("sdpa:cpu", False),
        ("blocked", True),
        ("standard", False),
        ("standard", True),
    }


def test_the_audited_dropout_holds_in_every_layer(model: GPTModel) -> None:
    assert model.cfg.drop_rate == 0.3
    ids = torch.arange(40)[None]
    for p in (0.0, 0.1):
        clone = audit._copy(model, p, CPU)
        assert clone.training
        assert clone.cfg.drop_rate == p
        assert torch.equal(clone(ids), clone(ids)) == (p == 0)


def broken(name: str, change: Callable[..., dict[str, Any]]) -> Any:
    """A kernel whose arguments were changed on the way in."""
    entry = KERNELS[name]

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        given = change(q=q, k=k, v=v, **options)
        return entry.attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)

    return dataclasses.replace(entry, attention=attention)


def no_scale(q: Tensor, **given: Any) -> dict[str, Any]:
    return {"q": q * math.sqrt(q.shape[-1]), **given}


def keys_one_late(k: Tensor, **given: Any) -> dict[str, Any]:
    return {"k": k.roll(1, dims=2), **given}


def no_dropout(dropout: Any, **given: Any) -> dict[str, Any]:
    return {"dropout": None, **given}


def next_row(dropout: Any, **given: Any) -> dict[str, Any]:
    if dropout is not None:
        dropout = dataclasses.replace(dropout, first_row=dropout.first_row + 1)
    return {"dropout": dropout, **given}


def next_row_of_squares(q: Tensor, k: Tensor, **given: Any) -> dict[str, Any]:
    change = next_row if q.shape[2] == k.shape[2] else dict
    return change(q=q, k=k, **given)


@pytest.mark.parametrize("change", [no_scale, keys_one_late])
def test_a_broken_flash_path_fails_in_the_whole_model(
    change: Callable[..., dict[str, Any]], model: GPTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KERNELS, "sdpa:cpu", broken("sdpa:cpu", change))
    assert [row.passed for row in audit.audit_model(model, 0.0, CPU)] == [False] * 3
    assert all(row.passed for row in audit.audit_model(model, 0.1, CPU))  # blocked serves it
    found = audit.run(model, CPU, cases=[])
    assert not found.passed


@pytest.mark.parametrize(
    "change", [no_scale, keys_one_late, no_dropout, next_row, next_row_of_squares]
)
def test_a_broken_dropout_path_fails_in_the_whole_model(
    change: Callable[..., dict[str, Any]], model: GPTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KERNELS, "blocked", broken("blocked", change))
    assert [row.passed for row in audit.audit_model(model, 0.1, CPU)] == [False] * 3
    found = audit.run(model, CPU, cases=[])
    assert not found.passed
    assert found.checks[audit.MASKS]["blocked"] == (change in (no_scale, keys_one_late))


def test_every_part_decides(model: GPTModel) -> None:
    good = audit.run(model, CPU, cases=CASES[:1])
    assert good.passed
    bad_row = dataclasses.replace(good.rows[0], max_used=1.01)
    assert not dataclasses.replace(good, rows=[*good.rows, bad_row]).passed
    for what, results in good.checks.items():
        for name in results:
            checks = {**good.checks, what: {**results, name: False}}
            assert not dataclasses.replace(good, checks=checks).passed


@pytest.mark.parametrize("fault", ["no scale", "stale cache row", "none"])
def test_decoding_and_greedy_tokens_tell_faults_apart(
    fault: str, model: GPTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "no scale":
        monkeypatch.setitem(KERNELS, "sdpa:cpu", broken("sdpa:cpu", no_scale))
    elif fault == "stale cache row":
        extend = LayerKV.extend

        def stale(self: LayerKV, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = extend(self, k, v)
            if k.shape[2] == 1 and keys.shape[2] > 1:
                keys = keys.clone()
                keys[:, :, -1] = keys[:, :, -2]
            return keys, values

        monkeypatch.setattr(LayerKV, "extend", stale)
    assert audit.greedy_equal(model, CPU) == (fault == "none")
    (decoded,) = audit.audit_decoding(model, CPU)
    assert decoded.passed == (fault == "none")


def test_a_tiny_context_can_be_audited() -> None:
    model = GPTModel({**CFG, "context_length": 2})
    assert audit.run(model, CPU, cases=[]).passed


def test_memory_that_grows_with_the_square_is_seen() -> None:
    case = Case(1, 2, 256, 256, 16)
    assert audit._growth("standard", case, CPU) > audit.GROWTH
    assert audit._growth("sdpa:cpu", case, CPU) < audit.GROWTH


def test_a_full_audit_takes_the_full_grid(model: GPTModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(audit.verify, "full_cases", lambda dtype: CASES[:1])
    monkeypatch.setattr(audit.verify, "quick_cases", lambda dtype: [])
    monkeypatch.setattr(
        audit.properties, "repeats", lambda name, case, device, times: bool(seen.append(times) or 1)
    )
    for full in (False, True):
        rows = audit.run(model, CPU, full=full).rows
        assert any(row.case == str(CASES[0]) for row in rows) == full
    assert set(seen) == {audit.REPEATS, audit.FULL_REPEATS}
