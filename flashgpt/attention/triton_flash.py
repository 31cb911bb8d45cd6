"""Flash attention in Triton: the shared dropout, documents, any T <= S, packed q, k and v.

Owns the kernels and their launches. What is served, the operator and its gradient are in
triton_op.py; this file is imported when the first CUDA tensor comes, for it needs Triton.

With x = q k^T / sqrt(H), p = exp(x - lse), z the dropout mask over its keep probability (1 without
dropout), and g = dout:

    out = (p z) v                      lse = log(sum of exp(x)) over the visible keys
    delta = rowsum(g * out)            ds = p (z (g v^T) - delta)
    dq = ds k / sqrt(H)                dk = ds^T q / sqrt(H)           dv = (p z)^T g

Three kernels. None adds up in memory, so results repeat bit for bit:

    _forward       a tile of queries over its keys: online softmax (Dao et al., "FlashAttention",
                   NeurIPS 2022)
    _backward_q    a tile of queries over its keys: delta and dq
    _backward_kv   a tile of keys over its queries: dk and dv

Exponentials are powers of two: `scale` holds log2(e) / sqrt(H). 1 / P(keep) stays out of the loops:
delta is divided by it and each result multiplied by it at the end. `low` is what out lost by being
rounded to half precision: where keys have much in common, ds is a small difference of large terms,
and a rounded delta would spoil it.

Legend: B batch, T query positions, S key positions, N heads, H head dim, G = B * N; t and s tiles
of T and S; h is H padded to a power of two.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flashgpt.attention import triton_launch
from flashgpt.attention.dropout import HALF, keep_scale
from flashgpt.attention.triton_launch import launch

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
INTERPRETED = tl.constexpr(triton_launch.INTERPRETED)
SMALLEST = tl.constexpr(-126.0)  # exponent of the smallest normal number of fp32
EXP2_TERMS = tl.constexpr(8)  # of exp's series at up to ln(2) / 2; the next is below 1e-9


@triton.jit
def _tile(X, b, n, first, ROWS: tl.constexpr, h: tl.constexpr):
    """Rows `first` on of sequence (b, n) as [ROWS, h]; 0 past the last row and feature."""
    return X.load([b, n, first, 0]).reshape([ROWS, h])


@triton.jit
def _store(X, stride_b, stride_n, stride_row, b, n, first, limit, value, H: tl.constexpr):
    """Writes [ROWS, h] as rows `first` on of sequence (b, n), below row `limit` and feature H."""
    row, feature = tl.arange(0, value.shape[0])[:, None], tl.arange(0, value.shape[1])[None, :]
    X += tl.cast(b, tl.int64) * stride_b + tl.cast(n, tl.int64) * stride_n
    X += tl.cast(first, tl.int64) * stride_row
    value = value.to(X.dtype.element_ty)
    tl.store(X + row * stride_row + feature, value, (row < limit - first) & (feature < H))


@triton.jit
def _exp2(x, FP32: tl.constexpr):
    """2^x; for results in fp32 by a polynomial, as the GPU's own is off by two units there."""
    if not FP32:
        return tl.exp2(x)
    whole = tl.floor(tl.maximum(x, SMALLEST) + 0.5)
    part = (x - whole) * LN_2
    y = tl.full(x.shape, 1.0, tl.float32)
    for i in tl.static_range(EXP2_TERMS):
        y = 1.0 + y * (part * (1.0 / (EXP2_TERMS - i)))
    y *= ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < SMALLEST, 0.0, y)


@triton.jit
def _drop(p, a, b, c, threshold):
    """p where a * c + b >= threshold (int32, wrapping), else 0.

    Written out for the GPU, because LLVM would first gather the comparisons of a whole tile into a
    vector of bits, which takes twice as many instructions.
    """
    draw = a * c + b
    if INTERPRETED:
        return tl.where(draw >= threshold, p, 0.0)
    return tl.inline_asm_elementwise(
        "{ .reg .pred keep; setp.ge.s32 keep, $2, $3; selp.f32 $0, $1, 0f00000000, keep; }",
        "=f,f,r,r",
        [p, draw, threshold],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _drop_ds(p, dp, delta, a, b, c, threshold):
    """p (dp - delta) where a * c + b >= threshold, else -p delta; as `_drop`."""
    draw = a * c + b
    if INTERPRETED:
        return tl.where(draw >= threshold, p * dp, 0.0) - p * delta
    return tl.inline_asm_elementwise(
        """{
        .reg .pred keep;
        .reg .f32 less;
        setp.ge.s32 keep, $4, $5;
        neg.f32 less, $3;
        mul.f32 $0, $1, less;
        @keep fma.rn.f32 $0, $1, $2, $0;
        }""",
        "=&f,f,f,f,r,r",
        [p, dp, delta, draw, threshold],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _keys_of(t0, queries, keys, first_t, T: tl.constexpr, S: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Keys [begin, clear) are seen by a whole tile of queries, [clear, end) by a part of it."""
    begin, clear = 0, (keys - queries + t0 + 1) // S * S
    if DOCUMENTS:
        begin = tl.min(first_t) // S * S
        clear = begin
    return begin, clear, tl.minimum(keys, keys - queries + t0 + T)


@triton.jit(do_not_specialize=["threshold"])
def _forward(
    Q, K, V, Out, Low, Lse, A, B, C, First,
    heads, queries, keys, scale, keep_scale, threshold,
    H: tl.constexpr, h: tl.constexpr, T: tl.constexpr, S: tl.constexpr, DROPOUT: tl.constexpr,
    DOCUMENTS: tl.constexpr, LOW: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    PRECISION: tl.constexpr = "ieee" if FP32 else "tf32"
    blocks = tl.cdiv(queries, T)
    t0 = (blocks - 1 - tl.program_id(0) % blocks) * T  # tiles with most keys first
    g = tl.program_id(0) // blocks
    b, n, offset = g // heads, g % heads, keys - queries
    t, s = t0 + tl.arange(0, T), tl.arange(0, S)
    row_t = tl.cast(g, tl.int64) * queries + t
    q_th = _tile(Q, b, n, t0, T, h)
    first_t = t
    if DOCUMENTS:
        First += tl.cast(b, tl.int64) * keys
        first_t = tl.load(First + offset + t, t < queries, other=2147483647)
    if DROPOUT:
        a_t = tl.load(A + row_t, t < queries, other=0)
        b_t = tl.load(B + row_t, t < queries, other=0)
    begin, clear, end = _keys_of(t0, queries, keys, first_t, T, S, DOCUMENTS)
    acc_th = tl.zeros([T, h], tl.float32)
    m_t = tl.full([T], float("-inf"), tl.float32)
    l_t = tl.zeros([T], tl.float32)
    for HIDE in tl.static_range(2):
        for s0 in tl.range(clear if HIDE else begin, end if HIDE else clear, S):
            k_sh = _tile(K, b, n, s0, S, h)
            x_ts = tl.dot(q_th, tl.trans(k_sh), input_precision=PRECISION)
            if HIDE:
                x_ts = tl.where((s0 + s)[None, :] <= (offset + t)[:, None], x_ts, float("-inf"))
            if HIDE and DOCUMENTS:
                first_s = tl.load(First + s0 + s, s0 + s < keys, other=-1)
                x_ts = tl.where(first_t[:, None] == first_s[None, :], x_ts, float("-inf"))
            m_new = tl.maximum(m_t, tl.max(x_ts, 1) * scale)
            m_safe = m_new
            if DOCUMENTS:  # a row may see none of its first keys, and -inf - -inf is NaN
                m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            p_ts = _exp2(x_ts * scale - m_safe[:, None], FP32)
            alpha_t = _exp2(m_t - m_safe, FP32)
            l_t = l_t * alpha_t + tl.sum(p_ts, 1)
            if DROPOUT:
                c_s = C.load([s0])
                p_ts = _drop(p_ts, a_t[:, None], b_t[:, None], c_s[None, :], threshold)
            v_sh = _tile(V, b, n, s0, S, h)
            acc_th *= alpha_t[:, None]
            acc_th = tl.dot(p_ts.to(v_sh.dtype), v_sh, acc_th, input_precision=PRECISION)
            m_t = m_new
    out_th = acc_th * (keep_scale / l_t)[:, None]
    tl.store(Lse + row_t, m_t * LN_2 + tl.log(l_t), t < queries)
    wide = heads * H
    whole = tl.cast(queries, tl.int64) * wide
    _store(Out, whole, H, wide, b, n, t0, queries, out_th, H)
    if LOW:
        out_th -= out_th.to(Out.dtype.element_ty).to(tl.float32)
        _store(Low, whole, H, wide, b, n, t0, queries, out_th, H)


@triton.jit(do_not_specialize=["threshold"])
def _backward_q(
    Q, Dout, Out, Low, K, V, Lse, Rows, A, B, C, First, Dq, dq_b, dq_n, dq_t,
    heads, queries, keys, scale, keep_scale, threshold, rows_part, rows_g,
    H: tl.constexpr, h: tl.constexpr, T: tl.constexpr, S: tl.constexpr, DROPOUT: tl.constexpr,
    DOCUMENTS: tl.constexpr, LOW: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    PRECISION: tl.constexpr = "ieee" if FP32 else "tf32"
    blocks = tl.cdiv(queries, T)
    t0 = (blocks - 1 - tl.program_id(0) % blocks) * T  # tiles with most keys first
    g = tl.program_id(0) // blocks
    b, n, offset = g // heads, g % heads, keys - queries
    t, s = t0 + tl.arange(0, T), tl.arange(0, S)
    row_t = tl.cast(g, tl.int64) * queries + t
    q_th, g_th = _tile(Q, b, n, t0, T, h), _tile(Dout, b, n, t0, T, h)
    out_th = _tile(Out, b, n, t0, T, h).to(tl.float32)
    if LOW:
        out_th += _tile(Low, b, n, t0, T, h).to(tl.float32)
    delta_t = tl.sum(g_th.to(tl.float32) * out_th, 1) / keep_scale
    lse_t = tl.load(Lse + row_t, t < queries, other=float("inf")) * LOG2_E
    # What _backward_kv needs of each row, where its descriptor finds it.
    Rows += tl.cast(g, tl.int64) * rows_g + t
    rows_part = tl.cast(rows_part, tl.int64)
    tl.store(Rows, lse_t, t < queries)
    tl.store(Rows + rows_part, delta_t, t < queries)
    if DROPOUT:
        a_t = tl.load(A + row_t, t < queries, other=0)
        b_t = tl.load(B + row_t, t < queries, other=0)
        tl.store(Rows + 2 * rows_part, a_t.to(tl.float32, bitcast=True), t < queries)
        tl.store(Rows + 3 * rows_part, b_t.to(tl.float32, bitcast=True), t < queries)
    first_t = t
    if DOCUMENTS:
        First += tl.cast(b, tl.int64) * keys
        first_t = tl.load(First + offset + t, t < queries, other=2147483647)
    begin, clear, end = _keys_of(t0, queries, keys, first_t, T, S, DOCUMENTS)
    dq_th = tl.zeros([T, h], tl.float32)
    for HIDE in tl.static_range(2):
        for s0 in tl.range(clear if HIDE else begin, end if HIDE else clear, S):
            k_sh, v_sh = _tile(K, b, n, s0, S, h), _tile(V, b, n, s0, S, h)
            x_ts = tl.dot(q_th, tl.trans(k_sh), input_precision=PRECISION)
            dp_ts = tl.dot(g_th, tl.trans(v_sh), input_precision=PRECISION)
            if HIDE:
                x_ts = tl.where((s0 + s)[None, :] <= (offset + t)[:, None], x_ts, float("-inf"))
            if HIDE and DOCUMENTS:
                first_s = tl.load(First + s0 + s, s0 + s < keys, other=-1)
                x_ts = tl.where(first_t[:, None] == first_s[None, :], x_ts, float("-inf"))
            p_ts = _exp2(x_ts * scale - lse_t[:, None], FP32)
            if DROPOUT:
                a_t1, b_t1, c_1s = a_t[:, None], b_t[:, None], C.load([s0])[None, :]
                ds_ts = _drop_ds(p_ts, dp_ts, delta_t[:, None], a_t1, b_t1, c_1s, threshold)
            else:
                ds_ts = p_ts * (dp_ts - delta_t[:, None])
            dq_th = tl.dot(ds_ts.to(k_sh.dtype), k_sh, dq_th, input_precision=PRECISION)
    dq_th *= scale * LN_2 * keep_scale
    _store(Dq, dq_b, dq_n, dq_t, b, n, t0, queries, dq_th, H)


@triton.jit(do_not_specialize=["threshold"])
def _backward_kv(
    Q, Dout, K, V, Rows, C, First, Last, Dk, Dv, dk_b, dk_n, dk_s, dv_b, dv_n, dv_s,
    heads, queries, keys, scale, keep_scale, threshold,
    H: tl.constexpr, h: tl.constexpr, T: tl.constexpr, S: tl.constexpr, DROPOUT: tl.constexpr,
    DOCUMENTS: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    PRECISION: tl.constexpr = "ieee" if FP32 else "tf32"
    blocks = tl.cdiv(keys, S)
    s0 = tl.program_id(0) % blocks * S  # the first keys are seen by most queries
    g = tl.program_id(0) // blocks
    b, n, offset = g // heads, g % heads, keys - queries
    s = s0 + tl.arange(0, S)
    k_sh, v_sh = _tile(K, b, n, s0, S, h), _tile(V, b, n, s0, S, h)
    if DROPOUT:
        c_s1 = tl.load(C + s, s < keys, other=0)[:, None]
    # Of the queries, [begin, clear) see a part of the tile, [clear, end) all of it.
    begin, end = tl.maximum(s0 - offset, 0) // T * T, queries
    clear = tl.minimum(tl.maximum(tl.cdiv(s0 + S - 1 - offset, T) * T, begin), queries)
    if DOCUMENTS:
        document = tl.cast(b, tl.int64) * keys
        First, Last = First + document, Last + document
        first_s = tl.load(First + s, s < keys, other=-1)
        last_s = tl.load(Last + s, s < keys, other=0)
        end = tl.minimum(queries, tl.max(last_s) - offset + 1)
        clear = end
    dk_sh = tl.zeros([S, h], tl.float32)
    dv_sh = tl.zeros([S, h], tl.float32)
    # Tiles are [S, T]: so p and ds are in registers where products take them from.
    for SEEN in tl.static_range(2):
        for t0 in tl.range(clear if SEEN else begin, end if SEEN else clear, T):
            t = t0 + tl.arange(0, T)
            q_th, g_th = _tile(Q, b, n, t0, T, h), _tile(Dout, b, n, t0, T, h)
            x_st = tl.dot(k_sh, tl.trans(q_th), input_precision=PRECISION)
            dp_st = tl.dot(v_sh, tl.trans(g_th), input_precision=PRECISION)
            if not SEEN:
                x_st = tl.where(s[:, None] <= (offset + t)[None, :], x_st, float("-inf"))
            if not SEEN and DOCUMENTS:
                first_t = tl.load(First + offset + t, t < queries, other=-2)
                x_st = tl.where(first_s[:, None] == first_t[None, :], x_st, float("-inf"))
            lse_1t = Rows.load([0, g, t0]).reshape([1, T])
            delta_1t = Rows.load([1, g, t0]).reshape([1, T])
            p_st = _exp2(x_st * scale - lse_1t, FP32)
            if DROPOUT:
                a_1t = Rows.load([2, g, t0]).reshape([1, T]).to(tl.int32, bitcast=True)
                b_1t = Rows.load([3, g, t0]).reshape([1, T]).to(tl.int32, bitcast=True)
                kept_st = _drop(p_st, a_1t, b_1t, c_s1, threshold)
                ds_st = kept_st * dp_st - p_st * delta_1t
            else:
                kept_st = p_st
                ds_st = p_st * (dp_st - delta_1t)
            dv_sh = tl.dot(kept_st.to(g_th.dtype), g_th, dv_sh, input_precision=PRECISION)
            dk_sh = tl.dot(ds_st.to(q_th.dtype), q_th, dk_sh, input_precision=PRECISION)
    dk_sh *= scale * LN_2 * keep_scale
    _store(Dk, dk_b, dk_n, dk_s, b, n, s0, keys, dk_sh, H)
    _store(Dv, dv_b, dv_n, dv_s, b, n, s0, keys, dv_sh * keep_scale, H)


class Tiles(NamedTuple):
    """How a kernel is cut: queries and keys of a tile, warps, stages of its load pipeline."""

    t: int
    s: int
    warps: int
    stages: int
    registers: int | None = None


# By kernel and h, measured on an H100 (benchmarks/tiles.py); fp32 takes no tensor cores.
HALF_TILES = {
    "forward": {64: Tiles(64, 128, 4, 2), 128: Tiles(64, 64, 4, 3)},
    "backward_q": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 2)},
    "backward_kv": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 2)},
}
FP32_TILES = Tiles(32, 32, 8, 1)
# Three programs a multiprocessor, where dropout's registers would leave room for two; pays at
# T 1024 and not at 4096.
DROPOUT_KV = Tiles(64, 64, 4, 2, 168)
DROPOUT_KV_UP_TO = 2048  # tokens


def tiles(kernel: str, q_BNTH: Tensor, dropout: bool) -> Tiles:
    """The cut of a kernel; fixed, so that equal calls give equal bits."""
    if q_BNTH.dtype == torch.float32:
        return FP32_TILES
    h = max(64, _padded(q_BNTH.shape[3]))
    if kernel == "backward_kv" and dropout and h == 64 and q_BNTH.shape[2] <= DROPOUT_KV_UP_TO:
        return DROPOUT_KV
    return HALF_TILES[kernel][h]


def _padded(head_dim: int) -> int:
    """h, the least power of two that holds H. (Triton's own function takes 10 us on the host.)"""
    return max(16, 1 << (head_dim - 1).bit_length())


class Masks(NamedTuple):
    """What a call drops and hides beside the causal mask; None where it does not.

    Attributes:
        a_BNT, b_BNT, c_S: keys of the dropout law (int32).
        threshold: of the dropout law.
        first_BS, last_BS: first and last position of each key's document (int32).
    """

    a_BNT: Tensor | None = None
    b_BNT: Tensor | None = None
    c_S: Tensor | None = None
    threshold: int = 0
    first_BS: Tensor | None = None
    last_BS: Tensor | None = None


def _columns(masks: Masks, columns: int) -> TensorDescriptor | None:
    """For tiles of c_S."""
    if masks.c_S is None:
        return None
    return TensorDescriptor(masks.c_S, list(masks.c_S.shape), [1], [columns])


@functools.lru_cache(maxsize=4096)
def _steps(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> list[int] | None:
    """Strides as descriptors want them, multiples of 16 bytes and above 0, or None."""
    sized = zip(strides[:3], shape[:3], strict=True)
    steps = [stride if size > 1 else shape[3] for stride, size in sized]
    fit = all(step > 0 and step * itemsize % 16 == 0 for step in steps) and strides[3] == 1
    return [*steps, 1] if fit else None


def _described(x_BNTH: Tensor, rows: int, h: int) -> TensorDescriptor:
    """For tiles of [rows, h]; of a copy where the layout does not fit."""
    steps = _steps(x_BNTH.shape, x_BNTH.stride(), x_BNTH.itemsize)
    if steps is None or x_BNTH.data_ptr() % 16:
        return _described(x_BNTH.clone(memory_format=torch.contiguous_format), rows, h)
    return TensorDescriptor(x_BNTH, x_BNTH.shape, steps, [1, 1, rows, h])


def _launch(kernel, cut: Tiles, tiles: int, tensors: list, q_BNTH: Tensor, keys: int, masks: Masks,
            *more: int, **flags: bool) -> None:  # fmt: skip
    """One program for each of the `tiles` of queries or keys of each sequence."""
    batch, heads, queries, H = q_BNTH.shape
    scales = (LOG2_E.value / math.sqrt(H), keep_scale(masks.threshold))
    numbers = (heads, queries, keys, *scales, masks.threshold - HALF, *more)
    masked = (masks.a_BNT is not None, masks.first_BS is not None)
    sizes = (H, _padded(H), cut.t, cut.s)
    launch(
        kernel,
        batch * heads * tiles,
        (*tensors, *numbers),
        (*sizes, *masked, *flags.values(), q_BNTH.dtype == torch.float32),
        q_BNTH.device,
        num_warps=cut.warps,
        num_stages=cut.stages,
        maxnreg=cut.registers,
    )


def forward(
    q_BNTH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, masks: Masks, need_low: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out_BNTH (heads of a position side by side), lse_BNT in fp32, and low like out, or empty."""
    (batch, heads, queries, H), keys = q_BNTH.shape, k_BNSH.shape[2]
    out_BTNH = q_BNTH.new_empty(batch, queries, heads, H)
    low_BTNH = torch.empty_like(out_BTNH) if need_low else q_BNTH.new_empty(0)
    lse_BNT = q_BNTH.new_empty(batch, heads, queries, dtype=torch.float32)
    if batch:
        cut, h = tiles("forward", q_BNTH, masks.a_BNT is not None), _padded(H)
        tensors = [
            _described(q_BNTH, cut.t, h),
            _described(k_BNSH, cut.s, h),
            _described(v_BNSH, cut.s, h),
            *(out_BTNH, low_BTNH, lse_BNT),
            *(masks.a_BNT, masks.b_BNT, _columns(masks, cut.s), masks.first_BS),
        ]
        count = math.ceil(queries / cut.t)
        _launch(_forward, cut, count, tensors, q_BNTH, keys, masks, LOW=need_low)
    return out_BTNH.transpose(1, 2), lse_BNT, low_BTNH.transpose(1, 2) if need_low else low_BTNH


def backward(
    dout_BNTH: Tensor,
    q_BNTH: Tensor,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    out_BNTH: Tensor,
    lse_BNT: Tensor,
    low_BNTH: Tensor,
    masks: Masks,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Writes dq_BNTH, dk_BNSH and dv_BNSH into the tensors `into`, of any strides but the last."""
    (batch, heads, queries, H), keys = q_BNTH.shape, k_BNSH.shape[2]
    if not batch:
        return
    dq_BNTH, dk_BNSH, dv_BNSH = into
    h, low, dropout = _padded(H), low_BNTH.numel() > 0, masks.a_BNT is not None
    # lse, delta and, with dropout, a and b of each row; descriptors want multiples of 16 bytes.
    parts, padded = 4 if dropout else 2, (queries + 3) // 4 * 4
    rows = lse_BNT.new_empty(parts, batch * heads, padded)
    cut = tiles("backward_q", q_BNTH, dropout)
    tensors = [
        _described(q_BNTH, cut.t, h),
        _described(dout_BNTH, cut.t, h),
        _described(out_BNTH, cut.t, h),
        _described(low_BNTH, cut.t, h) if low else None,
        _described(k_BNSH, cut.s, h),
        _described(v_BNSH, cut.s, h),
        *(lse_BNT, rows, masks.a_BNT, masks.b_BNT, _columns(masks, cut.s), masks.first_BS),
        *(dq_BNTH, *dq_BNTH.stride()[:3]),
    ]
    count, more = math.ceil(queries / cut.t), rows.stride()[:2]
    _launch(_backward_q, cut, count, tensors, q_BNTH, keys, masks, *more, LOW=low)
    cut = tiles("backward_kv", q_BNTH, dropout)
    shape = [parts, batch * heads, queries]
    tensors = [
        _described(q_BNTH, cut.t, h),
        _described(dout_BNTH, cut.t, h),
        _described(k_BNSH, cut.s, h),
        _described(v_BNSH, cut.s, h),
        TensorDescriptor(rows, shape, list(rows.stride()), [1, 1, cut.t]),
        *(masks.c_S, masks.first_BS, masks.last_BS),
        *(dk_BNSH, dv_BNSH, *dk_BNSH.stride()[:3], *dv_BNSH.stride()[:3]),
    ]
    _launch(_backward_kv, cut, math.ceil(keys / cut.s), tensors, q_BNTH, keys, masks)
