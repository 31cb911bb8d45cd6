"""The feed-forward layer's kernels for Hopper. pytest tests/model/test_gluon_mlp.py

Without a GPU they are compiled, for nothing interprets them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashgpt.model import mlp
from tests.model.mlp_limits import SHAPES, backward_limits, case, excess, forward_limits, gpu

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

import triton

from flashgpt.model import gluon_mlp, triton_mlp

pytestmark = pytest.mark.skipif(
    not triton.__version__.startswith(mlp.GLUON), reason="the Gluon of this Triton is not known"
)

USUAL = (1000, 768, 3072)
# Several rounds of tiles for each multiprocessor, the last one not full.
LARGE = [(9000, 768, 3072), (40000, 8, 1024)]
# Each kind of size is compiled anew, so not all kinds in all dtypes and forms.
CASES = [
    *((USUAL, dtype, tanh) for dtype in (torch.float16, torch.bfloat16) for tanh in (False, True)),
    *((shape, torch.bfloat16, False) for shape in SHAPES + LARGE),
]


@gpu
@pytest.mark.parametrize(("shape", "dtype", "tanh"), CASES, ids=str)
def test_they_are_tritons_bit_for_bit_and_err_by_roundings_only(
    shape: tuple[int, int, int], dtype: torch.dtype, tanh: bool
) -> None:
    x, w1, b, dout, w2, pre = case(shape, dtype)
    forward = gluon_mlp.linear_gelu(x, w1, b, tanh)
    assert all(map(torch.equal, forward, triton_mlp.linear_gelu(x, w1, b, tanh)))
    assert max(excess(forward, forward_limits(x, w1, b, tanh)).values()) <= 1
    backward = gluon_mlp.matmul_dgelu(dout, w2, pre, tanh)
    assert torch.equal(backward[0], triton_mlp.matmul_dgelu(dout, w2, pre, tanh)[0])
    assert max(excess(backward, backward_limits(dout, w2, pre, tanh)).values()) <= 1


@gpu
def test_faults_are_seen() -> None:
    x, w1, b, dout, w2, pre = case(SHAPES[2], torch.bfloat16)
    forward = gluon_mlp.linear_gelu(x, w1, torch.zeros_like(b), False)
    assert min(excess(forward, forward_limits(x, w1, b, False)).values()) > 1
    backward = gluon_mlp.matmul_dgelu(dout, w2, pre.roll(1, 0), False)
    assert min(excess(backward, backward_limits(dout, w2, pre, False)).values()) > 1


@gpu
def test_what_is_not_finite_stays_in_its_row() -> None:
    *_, dout, w2, pre = case((1023, 72, 264), torch.bfloat16)
    good = gluon_mlp.matmul_dgelu(dout, w2, pre, False)[0]
    dout[300, 5] = torch.nan
    bad, db = gluon_mlp.matmul_dgelu(dout, w2, pre, False)
    assert bad[300].isnan().all() and db.isnan().all()
    others = torch.arange(len(pre), device=pre.device) != 300
    assert torch.equal(bad[others], good[others])


@gpu
def test_without_rows_there_is_nothing_to_add_up() -> None:
    x, w1, b, dout, w2, pre = case((0, 16, 24), torch.float16)
    assert gluon_mlp.linear_gelu(x, w1, b, False)[0].shape == (0, 24)
    dpre, db = gluon_mlp.matmul_dgelu(dout, w2, pre, False)
    assert dpre.shape == (0, 24) and db.shape == (24,) and not db.any()


@gpu
def test_bits_repeat_beside_other_work() -> None:
    x, w1, b, dout, w2, pre = case((4096, 768, 3072), torch.bfloat16)

    def run() -> tuple[Tensor, ...]:
        forward = gluon_mlp.linear_gelu(x, w1, b, False)
        return *forward, *gluon_mlp.matmul_dgelu(dout, w2, pre, False)

    first, other = run(), torch.cuda.Stream()
    for _ in range(100):
        with torch.cuda.stream(other):
            dout @ w2
        assert all(map(torch.equal, first, run()))


@gpu
def test_a_thread_may_begin_with_them() -> None:
    *_, dout, w2, pre = case(USUAL, torch.bfloat16)
    # Twice: the memory of the second call stays with PyTorch, so the thread's first call to CUDA is
    # the launch, of a kernel that is loaded.
    wanted = gluon_mlp.matmul_dgelu(dout, w2, pre, False)
    gluon_mlp.matmul_dgelu(dout, w2, pre, False)
    found: list[tuple[Tensor, ...]] = []
    thread = threading.Thread(
        target=lambda: found.append(gluon_mlp.matmul_dgelu(dout, w2, pre, False))
    )
    thread.start()
    thread.join()
    assert all(map(torch.equal, *found, wanted))


COMPILE = """
import itertools, subprocess, sys, types
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget

utils = types.SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 227 * 1024})
triton.runtime.driver.set_active(types.SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32), utils=utils,
    get_current_device=lambda: 0, get_current_stream=lambda device: 0,
))
from flashgpt.model.gluon_mlp import CUT, REGISTERS, _descriptor, _gemm_gelu

def empty(*sizes, dtype=torch.bfloat16):
    return torch.empty(sizes, dtype=dtype)

m, f, d, warps, stages = CUT
M, F, D = 4096, 3072, 768
ends = _descriptor(empty(M, F), m, f), _descriptor(empty(M, F), m, f)
for backward, tanh in itertools.product((False, True), repeat=2):
    weight = _descriptor(empty(D, F), d, f) if backward else _descriptor(empty(F, D), f, d)
    vector = empty(4, F, dtype=torch.float32) if backward else empty(F)
    made = _gemm_gelu.warmup(
        _descriptor(empty(M, D), m, d), weight, *ends, vector, M, F, D, stages, tanh, backward,
        grid=(1,), num_warps=warps, maxnreg=REGISTERS,
    )
    ptx = made.asm["ptx"]
    print(made.metadata.shared, *map(ptx.count, ("wgmma.mma_async", "setmaxnreg.inc")), end=" ")
    binary = Path(sys.argv[1], "kernel.cubin")
    binary.write_bytes(made.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", binary]
    used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(used.partition("STACK:")[2].split()[0])
"""
SPILLED = {False: 0, True: 64}  # bytes of a thread, at most; forward and backward


@pytest.mark.slow
def test_a_program_fits_a_multiprocessor_of_hopper(tmp_path: Path) -> None:
    """By the assembler that comes with Triton, without a GPU."""
    found = subprocess.run(
        [sys.executable, "-c", COMPILE, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(gluon_mlp.__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        check=False,
    )
    assert found.returncode == 0, found.stderr
    lines = [tuple(map(int, line.split())) for line in found.stdout.splitlines()]
    assert len(lines) == 4
    for i, (shared, products, grown, spilled) in enumerate(lines):
        # Each of two groups: two halves of a tile's rows, a depth of 16 at a time.
        assert shared <= 227 * 1024 and products == 2 * 2 * (64 // 16) and grown
        assert spilled <= SPILLED[i >= 2]
