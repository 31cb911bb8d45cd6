"""When a kernel is compiled again, and when launched as it was. No GPU and no Triton kernel here.

pytest tests/attention/test_triton_launch.py
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flashgpt.attention import triton_launch
from flashgpt.attention.triton_launch import launch

CUDA = torch.device("cuda", 0)


class Kernel:
    """Stands in for a Triton kernel, and for what it was compiled to.

    Attributes:
        compiled: options of each compilation.
        launched: (grid, arguments) of each launch of compiled code.
        begun: (device, the current one, kernels launched before) of each launch of something else
            for the sake of a context.
    """

    def __init__(self) -> None:
        self.begun: list[tuple[torch.device, Any, int]] = []
        self.compiled: list[dict[str, Any]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_(*_: Any, **options: Any) -> Any:
            self.compiled.append(options)
            return self.Compiled(self, len(self.compiled))

        return compile_

    class Compiled:
        def __init__(self, kernel: Kernel, number: int) -> None:
            self.kernel, self.number = kernel, number

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *given: self.kernel.launched.append((self.number, grid, given))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton_launch, "_thread", threading.local())
    made = Kernel()

    def begin(device: torch.device) -> None:
        launches = len(made.compiled) + len(made.launched)
        made.begun.append((device, torch.cuda.current_device(), launches))

    monkeypatch.setattr(triton_launch, "_launch_any", begin)
    return made


def test_each_thread_has_a_context_on_each_device_before_a_launch(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "current_device", lambda: device.index)
            yield

    monkeypatch.setattr(torch.cuda, "device", on)
    other = torch.device("cuda", 1)

    def run() -> None:
        for device in (CUDA, other, CUDA, other):
            launch(kernel, 1, (torch.zeros(8),), (), device)

    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert kernel.begun == [(CUDA, 0, 0), (other, 1, 1), (CUDA, 0, 4), (other, 1, 5)]


def test_an_equal_call_is_launched_as_it_was_compiled(kernel: Kernel) -> None:
    x = torch.zeros(8)
    for programs, size in ((3, 32), (5, 48)):  # divisible by 16 both
        launch(kernel, programs, (x, size, 0.5, None), (64, True), CUDA, num_warps=4)
    assert kernel.compiled == [{"num_warps": 4}]
    ((number, grid, given),) = kernel.launched
    assert (number, grid) == (1, (5, 1, 1))
    assert given[0] is x and given[1:] == (48, 0.5, None, 64, True)


@pytest.mark.parametrize(
    "change",
    [
        {"arguments": (torch.zeros(8, dtype=torch.float16), 32, None)},
        {"arguments": (torch.zeros(8)[1:], 32, None)},  # 4 bytes past 16
        {"arguments": (torch.zeros(8), 33, None)},
        {"arguments": (torch.zeros(8), 2**31, None)},
        {"arguments": (torch.zeros(8), 32, torch.zeros(8))},
        {"constants": (128,)},
        {"num_warps": 8},
        {"num_stages": 3},
        {"device": torch.device("cuda", 1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_a_kernel_is_compiled_for_compiles_anew(
    kernel: Kernel, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    usual = {"arguments": (torch.zeros(8), 32, None), "constants": (64,), "device": CUDA}
    usual |= {"num_warps": 4, "num_stages": 2}
    for call in (usual, usual | change, usual, usual | change):
        given = dict(call)
        where = (given.pop("arguments"), given.pop("constants"), given.pop("device"))
        launch(kernel, 1, *where, **given)
    assert len(kernel.compiled) == 2
    assert [number for number, *_ in kernel.launched] == [1, 2]


def test_one_and_other_odd_numbers_are_different_kernels(kernel: Kernel) -> None:
    for size in (1, 3, 5, 1):
        launch(kernel, 1, (size,), (), CUDA)
    assert len(kernel.compiled) == 2 and [number for number, *_ in kernel.launched] == [2, 1]


def test_it_launches_where_the_tensors_are(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(wanted.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    seen = []
    monkeypatch.setattr(Kernel, "__getitem__", lambda *_: lambda *_: seen.append(current[-1]))
    for index in (0, 1):
        launch(kernel, 1, (1,), (), torch.device("cuda", index))
    assert seen == [0, 1]
