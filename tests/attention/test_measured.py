"""What a user's device measured decides the order of kernels.

pytest tests/attention/test_measured.py
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flashgpt.attention import kernels, measured
from flashgpt.attention.attend import attend
from flashgpt.attention.measured import Row
from flashgpt.attention.request import Request

CPU = torch.device("cpu")
SHORT = Request("cpu", torch.float32, 64, 64, "square", False, False, True, False)
LONG = dataclasses.replace(SHORT, t_bucket=4096)
SDPA, BLOCKED = {"sdpa:cpu": 1.0, "blocked": 2.0}, {"sdpa:cpu": 2.0, "blocked": 1.0}


def forget() -> None:
    """What a process keeps of the file."""
    measured._here.cache_clear()
    kernels.choose.cache_clear()
    kernels.clear_receipt()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FLASHGPT_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache" / "attention.json"
    forget()


def test_nothing_measured_leaves_the_order_as_built_in() -> None:
    assert measured.order(SHORT) is None
    assert kernels.choose(SHORT) == kernels.Choice("sdpa:cpu", ())


def test_the_nearest_measured_length_decides() -> None:
    rows = [Row("float32", 64, False, True, SDPA), Row("float32", 4096, False, True, BLOCKED)]
    path = measured.save(rows, CPU)
    assert path == measured.path() and path.exists()
    chosen = [kernels.choose(dataclasses.replace(SHORT, t_bucket=t)) for t in (64, 256, 1024, 4096)]
    assert [choice.kernel for choice in chosen] == ["sdpa:cpu", "sdpa:cpu", "blocked", "blocked"]
    assert all(choice.order.startswith("order measured on 20") for choice in chosen)


def test_only_calls_of_the_same_kind_count() -> None:
    measured.save([Row("float32", 64, False, True, BLOCKED)], CPU)
    assert kernels.choose(SHORT).kernel == "blocked"
    for other in (
        dataclasses.replace(SHORT, gradient=False),
        dataclasses.replace(SHORT, dtype=torch.float64),
    ):
        assert kernels.choose(other) == kernels.Choice("sdpa:cpu", ())


def test_what_a_kernel_cannot_serve_stays_refused_however_fast() -> None:
    measured.save([Row("float32", 64, True, True, SDPA)], CPU)
    choice = kernels.choose(dataclasses.replace(SHORT, dropout=True))
    assert choice.kernel == "blocked"
    assert [name for name, _ in choice.refused] == ["sdpa:cpu"]


def test_kernels_without_a_measurement_come_last_and_unknown_ones_are_passed_over() -> None:
    times = {"standard": 0.1, "fa9": 0.2, "blocked": 1.0}
    measured.save([Row("float32", 64, False, True, times)], CPU)
    assert kernels.choose(SHORT).kernel == "blocked"
    measured.save([Row("float32", 64, False, True, {"fa9": 1.0})], CPU)
    forget()
    assert kernels.choose(SHORT).kernel == "sdpa:cpu"


def test_attend_takes_it_and_the_receipt_says_so() -> None:
    measured.save([Row("float32", 64, False, False, BLOCKED)], CPU)
    q = torch.randn(1, 1, 9, 8)
    attend(q, q, q)
    (line,) = kernels.receipt()
    assert line.startswith("blocked served cpu, float32, H 8, T <= 64, square (order measured on ")


@pytest.mark.parametrize("what", ["torch", "threads"])
def test_another_torch_or_thread_count_is_another_device(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured.save([Row("float32", 64, False, True, BLOCKED)], CPU)
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    else:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert kernels.choose(SHORT).kernel == "sdpa:cpu"
    measured.save([Row("float32", 64, False, True, BLOCKED)], CPU)
    forget()
    assert kernels.choose(SHORT).kernel == "blocked"


def test_a_second_device_leaves_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    measured.save([Row("float32", 64, False, True, BLOCKED)], CPU)
    with monkeypatch.context() as patch:
        patch.setattr(measured, "device_name", lambda _: "another")
        measured.save([Row("float32", 64, False, True, SDPA)], CPU)
    assert kernels.choose(SHORT).kernel == "blocked"


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"format": 1}', '{"format": 99, "devices": {}}'),
        '{"format": 1, "devices": {"x": {"torch": "2", "date": ""}}}',
        '{"format": 1, "devices": {"x": {"torch": "2", "date": "", "rows": [{}]}}}',
    ],
)
def test_a_damaged_file_is_named_and_not_used(text: str, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text(text)
    with pytest.warns(UserWarning, match=r"attention\.json is not used: .*--save writes it anew"):
        choice = kernels.choose(SHORT)
    assert choice.kernel == "sdpa:cpu"
    with pytest.warns(UserWarning, match="is not used"):
        measured.save([Row("float32", 64, False, True, BLOCKED)], CPU)
    assert json.loads(cache.read_text())["format"] == measured.FORMAT


def test_it_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHGPT_CACHE", "/somewhere")
    assert measured.path() == Path("/somewhere/attention.json")
