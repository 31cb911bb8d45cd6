"""What the benchmark of writing measures, beside whom, and what it says of the rest.

No assertion here depends on a time. pytest tests/measure/test_bench_generate.py
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgpt.config import GPTConfig
from flashgpt.measure import bench_generate as bench
from flashgpt.measure import clock, generate_ways
from flashgpt.measure.bench_generate import measure
from flashgpt.measure.generate_record import Result, Setup, record
from flashgpt.measure.generate_ways import DYNAMIC, OURS, STATIC
from flashgpt.model.gpt2 import GPTModel
from flashgpt.train import runtime

CPU = torch.device("cpu")
CFG = GPTConfig(96, 32, 32, 2, 2, 0.0, qkv_bias=True)
SETUP = Setup(
    cfg=CFG, dtype=torch.float32, ways=(OURS, DYNAMIC), batches=(1, 3), compiled_batches=(),
    prompt=6, new_tokens=10, rounds=3, device=CPU,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(clock.MEMORY_BYTES, "cpu", 2**12)


def _setup(**changes: Any) -> Setup:
    return dataclasses.replace(SETUP, **changes)


def _reasons(found: Result) -> dict[tuple[str, int | None], str]:
    return {(refused.way, refused.batch): refused.reason for refused in found.refused}


@pytest.fixture(scope="module")
def found() -> Iterator[Result]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(clock.MEMORY_BYTES, "cpu", 2**12)
        yield measure(SETUP)


def test_every_way_writes_the_same_tokens(found: Result) -> None:
    assert [(row.way, row.batch) for row in found.rows] == [
        (way, batch) for batch in (1, 3) for way in (OURS, DYNAMIC)
    ]
    assert all((row.differing, row.differs_at) == (0, None) for row in found.rows)
    assert [one.way for one in found.first] == [OURS, DYNAMIC]
    assert {one.prompt for one in found.first} == {31}  # what the context has before one more
    assert found.refused == []


@pytest.mark.parametrize("changes", [{"qkv_bias": False}, {"tie_weights": False}])
def test_every_shape_goes_to_the_peer(changes: dict[str, Any]) -> None:
    found = measure(_setup(cfg=dataclasses.replace(CFG, **changes), batches=(3,)))
    assert [(row.way, row.differing) for row in found.rows] == [(OURS, 0), (DYNAMIC, 0)]


def test_numbers_of_a_row_agree(found: Result) -> None:
    for row in found.rows:
        assert 0 < row.ms <= row.ms_max and row.ms_min <= row.ms and row.rounds == 3
        assert row.ms * row.tokens_per_second == pytest.approx(1e3 * row.batch)
        moved = found.weight_bytes + row.batch * found.cache_bytes
        limit = row.batch * found.bytes_per_second / moved
        assert row.limit_tokens_per_second == pytest.approx(limit)
        assert row.share == pytest.approx(row.tokens_per_second / limit)
        assert row.first_call_seconds > 0


def test_the_limit_counts_what_a_step_must_read(found: Result) -> None:
    model = GPTModel(CFG)
    read = [p for name, p in model.named_parameters() if not name.startswith("wpe")]
    assert found.parameters == model.n_parameters
    assert found.weight_bytes == 4 * sum(p.numel() for p in read)
    # Keys and values, 2 layers, width 32, fp32; 7 to 15 positions, as steps 2 to 10 see.
    assert found.cache_bytes == 2 * 2 * 32 * 4 * sum(range(7, 16)) / 9
    apart = measure(_setup(cfg=dataclasses.replace(CFG, tie_weights=False), ways=(OURS,)))
    assert apart.weight_bytes == found.weight_bytes  # the embedding is looked up, the head is read


def test_the_better_of_two_speeds_of_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for speeds in ((1e9, 4e9), (4e9, 1e9)):
        measured = iter(speeds)
        monkeypatch.setattr(bench, "device_bandwidth", lambda _, measured=measured: next(measured))
        assert measure(_setup(ways=(OURS,), batches=(1,))).bytes_per_second == 4e9


def test_the_text_of_the_weights_goes_on_changing() -> None:
    """Else other tokens would hardly be noticed."""
    model = generate_ways.model(CFG, CPU, torch.float32)
    prompt = torch.randint(96, (3, 6), generator=torch.Generator().manual_seed(0))
    for text in generate_ways.ours(model)(prompt, 20).tolist():
        assert len(set(text)) > 4


def _changed(monkeypatch: pytest.MonkeyPatch, way: str, change: Any) -> None:
    """The way's tokens, changed on the way back."""
    make = generate_ways.hugging_face

    def made(own: GPTModel) -> dict[str, generate_ways.Write]:
        writers = make(own)
        write = writers[way]
        return {**writers, way: lambda prompt, count: change(write(prompt, count))}

    monkeypatch.setattr(generate_ways, "hugging_face", made)


def test_other_tokens_are_counted_and_the_first_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(ids: Tensor) -> Tensor:
        ids[-1, 5:] += 1
        ids[0, 7:] += 1
        return ids

    _changed(monkeypatch, DYNAMIC, change)
    found = measure(_setup(batches=(3,)))
    told = {row.way: (row.differing, row.differs_at) for row in found.rows}
    assert told == {OURS: (0, None), DYNAMIC: (2, 5)}
    alone = measure(_setup(batches=(3,), ways=(DYNAMIC,)))
    assert [(row.differing, row.differs_at) for row in alone.rows] == [(None, None)]


def test_a_peer_that_stops_early_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    _changed(monkeypatch, DYNAMIC, lambda ids: ids[:, :4])
    found = measure(_setup(batches=(3,)))
    assert [row.way for row in found.rows] == [OURS]
    assert "wrote [3, 4] tokens, not 10" in _reasons(found)[DYNAMIC, 3]


def test_the_compiled_way_goes_through_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the compiler, which takes a minute; the static cache is the real one."""
    seen: list[Any] = []

    def compiled(call: Any, **how: Any) -> Any:
        seen.append(how["mode"])
        return lambda *args, **kwargs: call(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(runtime, "cannot_compile", lambda device: None)
    found = measure(_setup(ways=(OURS, STATIC), compiled_batches=(3,)))
    assert [(row.way, row.batch, row.differing) for row in found.rows] == [
        (OURS, 1, 0), (OURS, 3, 0), (STATIC, 3, 0)
    ]  # fmt: skip
    assert seen == ["reduce-overhead"]
    assert _reasons(found) == {(STATIC, 1): "left out by --compiled-batches"}


def test_what_cannot_be_tried_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "cannot_compile", lambda device: "no C++ compiler was found")
    found = measure(_setup(ways=(OURS, STATIC), batches=(1,)))
    assert [row.way for row in found.rows] == [OURS]
    assert _reasons(found) == dict.fromkeys(
        [(STATIC, 1), (STATIC, None)], "no C++ compiler was found"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = measure(_setup(ways=(OURS, DYNAMIC), batches=(1,)))
    assert [row.way for row in missing.rows] == [OURS]
    assert "transformers is not installed" in _reasons(missing)[DYNAMIC, 1]
    assert "transformers" not in record(SETUP, missing, {})["environment"]


@pytest.mark.parametrize("at", [1, 3, 5])  # a warm-up, the first round, the second
def test_a_peer_that_fails_later_is_no_row(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def change(ids: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise RuntimeError("overwritten by a later run")
        return ids

    _changed(monkeypatch, DYNAMIC, change)
    found = measure(_setup(batches=(3,)))
    assert [row.way for row in found.rows] == [OURS]
    assert _reasons(found) == {(DYNAMIC, 3): "RuntimeError: overwritten by a later run"}


def _failing(error: Exception) -> Any:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def test_a_peer_that_fails_is_named_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_ways, "hugging_face", lambda own: {DYNAMIC: _failing(KeyError(7))})
    found = measure(_setup(batches=(1,)))
    assert [row.way for row in found.rows] == [OURS]
    assert _reasons(found) == {(DYNAMIC, 1): "KeyError: 7", (DYNAMIC, None): "KeyError: 7"}
    monkeypatch.setattr(generate_ways, "hugging_face", _failing(ImportError("too old")))
    found = measure(_setup(batches=(1,)))
    assert [row.way for row in found.rows] == [OURS]
    assert _reasons(found)[DYNAMIC, None] == "ImportError: too old"


def test_ours_may_run_out_of_memory_and_fail_in_no_other_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generate_ways, "ours", lambda own: _failing(torch.OutOfMemoryError("...")))
    found = measure(_setup(batches=(1,)))
    assert [row.way for row in found.rows] == [DYNAMIC] and found.rows[0].differing is None
    assert _reasons(found) == dict.fromkeys([(OURS, 1), (OURS, None)], "out of memory")
    monkeypatch.setattr(generate_ways, "ours", lambda own: _failing(RuntimeError("bug")))
    with pytest.raises(RuntimeError, match="bug"):
        measure(_setup(batches=(1,)))


def test_texts_too_short_to_be_timed_are_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "milliseconds", lambda call, device: 1.0)
    found = measure(_setup(ways=(OURS,), batches=(1,)))
    assert found.rows == [] and _reasons(found)[OURS, 1].startswith("too few new tokens")


def test_note_and_progress_reach_the_end() -> None:
    notes: list[str] = []
    ticks: list[tuple[int, int]] = []
    measure(_setup(), notes.append, lambda *tick: ticks.append(tick))
    assert notes == [
        "speed of memory",
        *(f"{name}, batch {b}" for b in (1, 3) for name in ("flashgpt", bench.WAYS[DYNAMIC])),
        "first token after 31",
    ]
    total = 3 * (1 + 3)
    assert ticks[0] == (0, total) and ticks[-1] == (total, total) and ticks == sorted(ticks)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batches": ()}, "batches must name at least one, got none"),
        ({"batches": (1, 0)}, "batches must be at least 1, got 0"),
        ({"ways": ()}, "ways must name at least one"),
        ({"prompt": 0}, "prompt must be at least 1, got 0"),
        ({"new_tokens": 1}, "new_tokens must be at least 2, got 1"),
        ({"prompt": 23}, "must be at most context_length 32 together, got 23 and 10"),
        ({"rounds": 2}, "rounds must be at least 3, got 2"),
        ({"dtype": torch.bfloat16}, "dtype must be fp32 on the CPU, got bf16"),
    ],
)
def test_a_setup_that_cannot_be_measured(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        _setup(**changes)
