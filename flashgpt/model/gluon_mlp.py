"""Products of the feed-forward layer with GELU, or its derivative, at their end: in Gluon.

What triton_mlp.py computes, bit for bit but for sums of columns, and faster. There a program has
one tile of the result, and what follows the product is hidden behind that of another program at
best. Here, on Hopper, one program stays on each multiprocessor, and its warps divide the work:

    one warp             loads tiles of both factors, in stages, ahead of all others
    two groups of four   take tiles of the result in turns: while one adds up the products of its
                         tile, the other one ends the tile before

`turn` keeps them apart: a group begins when the other one has issued its last product. Without it
a group might be two rounds of the stages behind, which barriers do not tell from none.

Gluon is the language below Triton's, of layouts and barriers; experimental, so mlp.py names the
versions that are known. Triton's interpreter does not run it.

Legend: M rows, D model width, F inner width; m, d, f of a tile; P parts of the rows, four a tile.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashgpt.attention.triton_launch import launch
from flashgpt.model.triton_mlp import Cut, dgelu, gelu

GROUPS, WARPS = gl.constexpr(2), gl.constexpr(4)  # and warps of a group
CUT = Cut(128, 128, 64, WARPS.value, 5)
# Of a thread. The 2^16 of a multiprocessor are shared out evenly among both groups and a third one,
# of which the warp that loads is part; then each says what it needs.
REGISTERS = 168
GROUP_REGISTERS, LOAD_REGISTERS = gl.constexpr(240), gl.constexpr(24)


@gluon.jit
def _load(factors, buffers, barriers, F, D, count, BACKWARD: gl.constexpr):
    """Keeps the stages full."""
    A, B = factors
    a_stages, b_stages, ends = buffers
    full, empty, _, _ = barriers
    stages: gl.constexpr = a_stages.type.shape[0]
    m: gl.constexpr = ends.type.shape[1]
    f: gl.constexpr = ends.type.shape[2]
    d: gl.constexpr = a_stages.type.shape[2]
    at = 0  # stages so far
    for tile in range(gl.program_id(0), count, gl.num_programs(0)):
        row = tile // gl.cdiv(F, f) * m
        column = tile % gl.cdiv(F, f) * f
        for start in range(0, D, d):  # descriptors give zeros past the ends
            stage = at % stages
            mbarrier.wait(empty.index(stage), (at // stages & 1) ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, A.block_type.nbytes + B.block_type.nbytes)
            tma.async_copy_global_to_shared(A, [row, start], ready, a_stages.index(stage))
            if BACKWARD:
                tma.async_copy_global_to_shared(B, [start, column], ready, b_stages.index(stage))
            else:
                tma.async_copy_global_to_shared(B, [column, start], ready, b_stages.index(stage))
            at += 1


@gluon.jit
def _multiply(
    which: gl.constexpr, results, buffers, barriers, F, D, count, TANH: gl.constexpr,
    BACKWARD: gl.constexpr,
):  # fmt: skip
    """Every second tile: its product, and what follows it."""
    Pre, Out, Vector = results
    a_stages, b_stages, ends = buffers
    full, empty, turn, read = barriers
    stages: gl.constexpr = a_stages.type.shape[0]
    m: gl.constexpr = ends.type.shape[1]
    f: gl.constexpr = ends.type.shape[2]
    d: gl.constexpr = a_stages.type.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, f, 16])
    end = ends.index(which)
    steps = gl.cdiv(D, d)
    at = which * steps  # stages so far, the other group's too
    done = 0  # tiles
    first = gl.program_id(0) + which * gl.num_programs(0)
    for tile in range(first, count, GROUPS * gl.num_programs(0)):
        row = tile // gl.cdiv(F, f) * m
        column = tile % gl.cdiv(F, f) * f
        if BACKWARD:
            tma.store_wait(0)
            mbarrier.expect(read.index(which), Pre.block_type.nbytes)
            tma.async_copy_global_to_shared(Pre, [row, column], read.index(which), end)
        mbarrier.wait(turn.index(which), (done & 1) ^ (1 - which))
        sums = gl.zeros([m, f], gl.float32, layout)
        for step in range(steps):
            stage = at % stages
            mbarrier.wait(full.index(stage), at // stages & 1)
            a, b = a_stages.index(stage), b_stages.index(stage)
            if not BACKWARD:
                b = b.permute((1, 0))
            sums = warpgroup_mma(a, b, sums, use_acc=step > 0, is_async=True)
            sums = warpgroup_mma_wait(1, (sums,))
            if step > 0:
                mbarrier.arrive(empty.index((at - 1) % stages))
            at += 1
        mbarrier.arrive(turn.index(1 - which))
        product = warpgroup_mma_wait(0, (sums,))
        mbarrier.arrive(empty.index((at - 1) % stages))
        at += steps
        if BACKWARD:
            mbarrier.wait(read.index(which), done & 1)
            _end_backward(product, Out, Vector, end, row, column, F, TANH)
        else:
            _end_forward(product, Pre, Out, Vector, end, row, column, F, TANH)
        done += 1  # noqa: SIM113  # there is no enumerate
    tma.store_wait(0)


@gluon.jit
def _end_forward(product, Pre, Act, Bias, end, row, column, F, TANH: gl.constexpr):
    layout: gl.constexpr = product.type.layout
    at = column + gl.arange(0, product.type.shape[1], gl.SliceLayout(0, layout))
    pre = product + gl.load(Bias + at, at < F, other=0.0).to(gl.float32)[None, :]
    tma.store_wait(0)
    _store(Pre, pre, end, row, column)
    act = gelu(pre, TANH)
    tma.store_wait(0)
    _store(Act, act, end, row, column)


@gluon.jit
def _end_backward(product, Dpre, Sums, end, row, column, F, TANH: gl.constexpr):
    m: gl.constexpr = product.type.shape[0]
    f: gl.constexpr = product.type.shape[1]
    pre = end.load(product.type.layout).to(gl.float32)
    dpre = product * dgelu(pre, TANH)
    _store(Dpre, dpre, end, row, column)
    # Rows 16 w to 16 w + 15 of each 64 are those of warp w, so nothing goes between warps.
    by_warp = gl.sum(gl.sum(dpre.reshape([m // 16 // WARPS, WARPS, 16, f]), 0), 1)
    layout: gl.constexpr = by_warp.type.layout
    part = row // m * WARPS + gl.arange(0, WARPS, gl.SliceLayout(1, layout))
    at = column + gl.arange(0, f, gl.SliceLayout(0, layout))
    gl.store(Sums + part[:, None] * F + at[None, :], by_warp, (at < F)[None, :])


@gluon.jit
def _store(Descriptor, values, end, row, column):
    """By way of `end`."""
    end.store(values.to(Descriptor.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(Descriptor, [row, column], end)


@gluon.jit
def _buffers(Descriptor, count: gl.constexpr):
    m: gl.constexpr = Descriptor.block_type.shape[0]
    n: gl.constexpr = Descriptor.block_type.shape[1]
    return gl.allocate_shared_memory(Descriptor.dtype, [count, m, n], Descriptor.layout)


@gluon.jit
def _barriers(count: gl.constexpr):
    made = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(made.index(i), count=1)
    return made


@gluon.jit
def _gemm_gelu(
    A, B, Pre, Out, Vector, M, F, D, stages: gl.constexpr, TANH: gl.constexpr,
    BACKWARD: gl.constexpr,
):  # fmt: skip
    """Forward: A x, B weight, Out act, Vector bias. Backward: A dout, Out dpre, Vector sums."""
    a_stages = _buffers(A, stages)
    b_stages = _buffers(B, stages)
    ends = _buffers(Out, GROUPS)
    full, empty = _barriers(stages), _barriers(stages)
    turn, read = _barriers(GROUPS), _barriers(GROUPS)
    count = gl.cdiv(M, Out.block_type.shape[0]) * gl.cdiv(F, Out.block_type.shape[1])
    results, buffers = (Pre, Out, Vector), (a_stages, b_stages, ends)
    barriers = (full, empty, turn, read)
    gl.warp_specialize(
        [
            (_multiply, (0, results, buffers, barriers, F, D, count, TANH, BACKWARD)),
            (_multiply, (1, results, buffers, barriers, F, D, count, TANH, BACKWARD)),
            (_load, ((A, B), buffers, barriers, F, D, count, BACKWARD)),
        ],
        [WARPS, 1],
        [GROUP_REGISTERS, LOAD_REGISTERS],
    )


def linear_gelu(
    x_MD: Tensor, w_FD: Tensor, b_F: Tensor, tanh: bool, cut: Cut = CUT
) -> tuple[Tensor, Tensor]:
    """As triton_mlp.linear_gelu."""
    act_MF = x_MD.new_empty(len(x_MD), len(w_FD))
    pre_MF = torch.empty_like(act_MF)
    if len(x_MD):
        factors = _descriptor(x_MD, cut.m, cut.d), _descriptor(w_FD, cut.f, cut.d)
        _launch(factors, pre_MF, act_MF, b_F, tanh, cut, backward=False)
    return act_MF, pre_MF


def matmul_dgelu(
    dout_MD: Tensor, w_DF: Tensor, pre_MF: Tensor, tanh: bool, cut: Cut = CUT
) -> tuple[Tensor, Tensor]:
    """As triton_mlp.matmul_dgelu."""
    dpre_MF = pre_MF.new_empty(pre_MF.shape)
    parts = cut.warps * math.ceil(len(pre_MF) / cut.m)
    sums_PF = pre_MF.new_empty(parts, pre_MF.shape[1], dtype=torch.float32)
    if len(pre_MF):
        factors = _descriptor(dout_MD, cut.m, cut.d), _descriptor(w_DF, cut.d, cut.f)
        _launch(factors, pre_MF, dpre_MF, sums_PF, tanh, cut, backward=True)
    return dpre_MF, sums_PF.sum(0).to(pre_MF.dtype)


def _launch(
    factors: tuple[TensorDescriptor, TensorDescriptor],
    pre_MF: Tensor,
    out_MF: Tensor,
    vector: Tensor,
    tanh: bool,
    cut: Cut,
    *,
    backward: bool,
) -> None:
    assert cut.warps == WARPS.value, f"a group has {WARPS.value} warps, got {cut.warps}"
    (rows, columns), width = out_MF.shape, factors[0].shape[1]
    ends = (_descriptor(t, cut.m, cut.f) for t in (pre_MF, out_MF))
    launch(
        _gemm_gelu,
        min(_processors(out_MF.device), math.ceil(rows / cut.m) * math.ceil(columns / cut.f)),
        (*factors, *ends, vector, rows, columns, width),
        (cut.stages, tanh, backward),
        out_MF.device,
        num_warps=cut.warps,
        maxnreg=REGISTERS,
    )


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    kind = gl.float16 if x.dtype == torch.float16 else gl.bfloat16
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], kind)
    return TensorDescriptor(x, list(x.shape), [x.shape[1], 1], [rows, columns], layout)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
