"""The feed-forward layer's Triton kernels, against float64. pytest tests/model/test_triton_mlp.py

Without a GPU, in Triton's interpreter, in fp32 and fp16 (it is wrong in bf16).

Legend: M rows, D model width, F inner width.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from flashgpt.model import triton_mlp
from tests.model.mlp_limits import (
    DEVICE,
    HOPPER,
    SHAPES,
    U,
    backward_limits,
    case,
    excess,
    forward_limits,
    gpu,
)

ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(ON_GPU and not HOPPER, reason="the kernels are cut for Hopper")
DTYPES = [torch.float16, torch.bfloat16 if ON_GPU else torch.float32]
TANH = pytest.mark.parametrize("tanh", [False, True])


@TANH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_err_by_roundings_only(
    shape: tuple[int, int, int], dtype: torch.dtype, tanh: bool
) -> None:
    x, w1, b, dout, w2, pre = case(shape, dtype)
    found = triton_mlp.linear_gelu(x, w1, b, tanh)
    assert max(excess(found, forward_limits(x, w1, b, tanh)).values()) <= 1
    found = triton_mlp.matmul_dgelu(dout, w2, pre, tanh)
    assert max(excess(found, backward_limits(dout, w2, pre, tanh)).values()) <= 1
    assert found[0].dtype == found[1].dtype == dtype


@TANH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_limits_tell_faults_apart(dtype: torch.dtype, tanh: bool) -> None:
    x, w1, b, dout, w2, pre = case((65, 200, 248), dtype)
    forward, backward = triton_mlp.linear_gelu, triton_mlp.matmul_dgelu
    faults = {
        "other form": (forward(x, w1, b, not tanh), {"act"}),
        "no bias": (forward(x, w1, torch.zeros_like(b), tanh), {"act", "pre"}),
        "rows of the weight": (forward(x, w1.roll(1, 0), b, tanh), {"act", "pre"}),
        "not all is summed": (forward(x, F.pad(w1[:, :-8], (0, 8)), b, tanh), {"act", "pre"}),
    }
    for name, (found, wrong) in faults.items():
        parts = excess(found, forward_limits(x, w1, b, tanh))
        assert {part for part, over in parts.items() if over > 1} == wrong, (name, parts)
    dpre, db = backward(dout, w2, pre, tanh)
    faults = {
        "derivative of another place": (backward(dout, w2, pre.roll(1, 0), tanh), {"dpre", "db"}),
        "not all is summed": (backward(F.pad(dout[:, :-8], (0, 8)), w2, pre, tanh), {"dpre", "db"}),
        "one row less": ((dpre, dpre[:-1].float().sum(0).to(dtype)), {"db"}),
        "one tile less": ((dpre, dpre[:0].sum(0)), {"db"}),
    }
    for name, (found, wrong) in faults.items():
        parts = excess(found, backward_limits(dout, w2, pre, tanh))
        assert {part for part, over in parts.items() if over > 1} == wrong, (name, parts)
    other, _ = backward(dout, w2, pre, not tanh)
    assert excess((other, db), backward_limits(dout, w2, pre, tanh))["dpre"] > 1


@TANH
@pytest.mark.skipif(ON_GPU, reason="the kernels are for half precision; in fp32 on the CPU only")
def test_gelu_and_its_derivative_are_exact_to_fp32(tanh: bool) -> None:
    x = torch.cat([torch.linspace(-14, 14, 16 * 400 - 2), torch.tensor([0.0, 1e4])]).view(-1, 16)
    ones, unit = torch.zeros(len(x), 8), torch.zeros(8, 16)
    ones[:, 0] = unit[0] = 1
    slope, _ = triton_mlp.matmul_dgelu(ones, unit, x, tanh)
    act, pre = triton_mlp.linear_gelu(x, torch.eye(16), torch.zeros(16), tanh)
    assert torch.equal(pre, x)
    wide, approximate = x.double(), "tanh" if tanh else "none"
    exact = torch.ops.aten.gelu_backward(torch.ones_like(wide), wide, approximate=approximate)
    assert float((slope - exact).abs().max()) <= 7.5e-8 + 4 * U
    tail = (x < -1) & (x > -6)  # small values are right too; below, float64 cancels itself
    assert float(((slope - exact) / exact)[tail].abs().max()) <= 2.0**-11
    exact = F.gelu(wide, approximate=approximate)
    assert float(((act - exact).abs() - 12 * U * exact.abs()).max()) <= 3e-7


def test_what_is_not_finite_stays_in_its_row() -> None:
    *_, dout, w2, pre = case((65, 200, 248), torch.float16)
    good = triton_mlp.matmul_dgelu(dout, w2, pre, False)[0]
    dout[3, 5] = torch.nan
    bad, db = triton_mlp.matmul_dgelu(dout, w2, pre, False)
    assert bad[3].isnan().all() and db.isnan().all()
    others = torch.arange(len(pre), device=DEVICE) != 3
    assert torch.equal(bad[others], good[others])


def test_without_rows_there_is_nothing_to_add_up() -> None:
    x, w1, b, dout, w2, pre = case((0, 16, 24), torch.float16)
    assert triton_mlp.linear_gelu(x, w1, b, False)[0].shape == (0, 24)
    dpre, db = triton_mlp.matmul_dgelu(dout, w2, pre, False)
    assert dpre.shape == (0, 24) and db.shape == (24,) and not db.any()


@gpu
def test_bits_repeat() -> None:
    x, w1, b, dout, w2, pre = case((4096, 768, 3072), torch.bfloat16)

    def run() -> tuple[Tensor, ...]:
        forward = triton_mlp.linear_gelu(x, w1, b, False)
        return *forward, *triton_mlp.matmul_dgelu(dout, w2, pre, False)

    first = run()
    for _ in range(20):
        assert all(map(torch.equal, first, run()))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flashgpt.model.triton_mlp import CUT, _linear_gelu, _matmul_dgelu

m, f, d = CUT[:3]
half = (m, f // 2)
for kernel, shapes, last in (
    (_linear_gelu, dict(X=(m, d), W=(f, d), Bias="bf16", Act=(m, f), Pre=(m, f)), "Bias"),
    (_matmul_dgelu, dict(Dout=(m, d), W=(d, f), Pre=half, Dpre=half, Sums="fp32"), "Sums"),
):
    constants = dict(m=m, f=f, d=d, TANH=False)
    signature = {
        name: "*" + shape if isinstance(shape, str) else f"tensordesc<bf16{list(shape)}>"
        for name, shape in shapes.items()
    }
    signature |= dict(D="i32", F="i32", **dict.fromkeys(constants, "constexpr"))
    places = [list(signature).index(name) for name in (last, "D", "F")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in places}
    source = ASTSource(kernel, signature, constants, attributes)
    options = dict(num_warps=CUT.warps, num_stages=CUT.stages)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(made.metadata.shared, made.asm["ptx"].count("wgmma.mma_async"))
"""


def test_two_programs_fit_a_multiprocessor_of_hopper(tmp_path: Path) -> None:
    """By Triton's own assembler, without a GPU. The interpreter takes more than the compiler."""
    found = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        cwd=Path(triton_mlp.__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        check=False,
    )
    assert found.returncode == 0, found.stderr
    lines = [tuple(map(int, line.split())) for line in found.stdout.splitlines()]
    assert len(lines) == 2
    for shared, products in lines:
        assert 2 * (shared + 1024) <= 228 * 1024 and products
