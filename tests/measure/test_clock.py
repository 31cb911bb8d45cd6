"""The order and the end of alternating measurements. pytest tests/measure/test_clock.py"""

from __future__ import annotations

import math

import pytest
import torch

from flashgpt.measure import clock
from flashgpt.measure.clock import (
    MIN_ROUNDS,
    Call,
    alternate,
    device_bandwidth,
    device_peak,
    milliseconds,
)

CPU = torch.device("cpu")


def _heard(calls: list[str], name: str) -> Call:
    return lambda: calls.append(name)


def _timer(call: Call) -> float:
    call()
    return 2.0


def test_every_other_round_goes_backwards() -> None:
    heard: list[str] = []
    ticks: list[int] = []
    calls = {name: _heard(heard, name) for name in "abc"}
    found = alternate(calls, 4, _timer, ticks.append)
    assert "".join(heard) == "abccbaabccba"
    assert found == {name: [2.0] * 4 for name in "abc"}
    assert ticks == [1, 2, 3, 4]
    assert alternate({}, 4, _timer) == {}


def test_a_slow_case_ends_after_the_least_rounds() -> None:
    for seconds, rounds in ((-1.0, MIN_ROUNDS), (math.inf, 7)):
        found = alternate({"a": lambda: None}, 7, _timer, seconds=seconds)
        assert len(found["a"]) == rounds


def test_milliseconds_are_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([5.0, 5.25])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    assert milliseconds(lambda: None, CPU) == 250.0


def test_the_peak_is_the_best_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(clock.PEAK_SIZE, "cpu", 8)
    times = iter([4.0, 2.0, 8.0, 4.0, 4.0, 4.0, 4.0])
    monkeypatch.setattr(clock, "milliseconds", lambda call, device: next(times))
    assert device_peak(torch.float32, CPU) == 2 * 8**3 / 2e-3


def test_the_speed_of_memory_is_the_better_of_reading_and_copying(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(clock.MEMORY_BYTES, "cpu", 4000)
    for read, copy, best in ((2.0, 8.0, 4000 / 2e-3), (2.0, 3.0, 2 * 4000 / 3e-3)):
        times = iter([9.0] * 6 + [read] + [copy] + [9.0] * 6)
        monkeypatch.setattr(clock, "milliseconds", lambda call, device, times=times: next(times))
        assert device_bandwidth(CPU) == best
