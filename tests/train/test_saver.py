"""Saving in the background: a copy of that moment, and errors that come up.

pytest tests/train/test_saver.py
"""

from __future__ import annotations

import threading

import pytest
import torch

from flashgpt.train.saver import HostCopies, Saver


def test_jobs_run_beside_one_after_another() -> None:
    gate, order = threading.Event(), []

    def first() -> None:
        gate.wait(60)
        order.append("first")

    with Saver() as saver:
        saver.submit(first)
        saver.check()  # does not wait
        order.append("main")
        gate.set()
        saver.submit(lambda: order.append("second"))
    assert order == ["main", "first", "second"]


@pytest.mark.parametrize("where", ["check", "wait"])
def test_what_a_job_raises_comes_up_once(where: str) -> None:
    def fails() -> None:
        raise OSError("the disk is full")

    with Saver() as saver:
        saver.submit(fails)
        saver._jobs[0].exception()  # waits until it is done
        with pytest.raises(OSError, match="the disk is full"):
            getattr(saver, where)()
        saver.wait()


def test_copies_keep_what_was_there_and_their_memory() -> None:
    values = {"a": {"x": torch.arange(3.0)}, "b": {"x": torch.ones(2, dtype=torch.int64)}}
    copies = HostCopies()
    taken, ready = copies.take(values)
    ready()
    values["a"]["x"].add_(1)
    assert taken["a"]["x"].tolist() == [0, 1, 2] and taken["b"]["x"].tolist() == [1, 1]
    again, _ = copies.take(values)
    assert again["a"]["x"].data_ptr() == taken["a"]["x"].data_ptr()
    values["a"]["x"] = torch.zeros(5)
    assert copies.take(values)[0]["a"]["x"].tolist() == [0] * 5
