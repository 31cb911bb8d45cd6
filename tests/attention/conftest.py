"""Oracles for the attention tests: float64 attention row by row, and the dropout law in uint64.

Neither calls flashgpt: they are written from the definition, one query at a time and word by word.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashgpt.attention import blocked, standard
from flashgpt.attention.dropout import Dropout
from flashgpt.attention.kernels import KERNELS, Kernel

Float = NDArray[np.float64]
Bool = NDArray[np.bool_]
NAMES = ("out", "lse", "dq", "dk", "dv")
ROUNDINGS = 4  # of the sum of absolute terms; 1.5 is the most that was seen, mutants err by 4e5


@dataclasses.dataclass(frozen=True)
class Exact:
    """Attention in float64, and the scale that its roundings have.

    Attributes:
        results: out, lse, dq, dk, dv.
        terms: the same with each term that is added up replaced by its absolute value.
        weights: [B, N, T, S], after dropout.
    """

    results: dict[str, Float]
    terms: dict[str, Float]
    weights: Float

    def check(self, found: dict[str, Tensor]) -> None:
        """Each element errs by at most ROUNDINGS roundings of what was added up to it."""
        for name, got in found.items():
            exact, terms = self.results[name], self.terms[name]
            assert tuple(got.shape) == exact.shape, name
            error = np.abs(got.detach().double().numpy() - exact)
            limits = torch.finfo(got.dtype)
            budget = ROUNDINGS * (limits.eps * terms + limits.tiny)  # tiny: where weights underflow
            assert np.isfinite(error).all(), name
            assert (error <= budget).all(), f"{name}: {(error / budget).max():.3g} of its budget"


def attention_by_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    *,
    keep: Bool | None = None,
    scale: float = 1.0,
    documents: Tensor | None = None,
) -> Exact:
    """Causal attention and its gradients, one query at a time, over the keys that it may see."""
    q_BNTH, k_BNSH, v_BNSH, dout_BNTH = (x.detach().double().numpy() for x in (q, k, v, dout))
    (batch, heads, queries, head_dim), keys = q_BNTH.shape, k_BNSH.shape[2]
    root = np.sqrt(head_dim)
    zeros = {
        "out": np.zeros_like(q_BNTH),
        "lse": np.zeros(q_BNTH.shape[:3]),
        "dq": np.zeros_like(q_BNTH),
        "dk": np.zeros_like(k_BNSH),
        "dv": np.zeros_like(k_BNSH),
    }
    results = {name: zero.copy() for name, zero in zeros.items()}
    terms = {name: zero.copy() for name, zero in zeros.items()}
    weights = np.zeros((batch, heads, queries, keys))
    for b, n, t in np.ndindex(batch, heads, queries):
        here = keys - queries + t
        seen = np.arange(here + 1)
        if documents is not None:
            seen = seen[documents[b, seen].numpy() == documents[b, here].item()]
        q_H, dout_H, k_sH, v_sH = q_BNTH[b, n, t], dout_BNTH[b, n, t], k_BNSH[b, n], v_BNSH[b, n]
        k_sH, v_sH = k_sH[seen], v_sH[seen]
        score_s = k_sH @ q_H / root
        lse = score_s.max() + np.log(np.exp(score_s - score_s.max()).sum())
        p_s = np.exp(score_s - lse)
        z_s = np.ones_like(p_s) if keep is None else keep[b, n, t, seen] * scale
        weights[b, n, t, seen] = p_s * z_s
        out_H = (p_s * z_s) @ v_sH
        dp_s = z_s * (v_sH @ dout_H)
        ds_s = p_s * (dp_s - p_s @ dp_s)
        put = {"out": out_H, "lse": lse, "dq": ds_s @ k_sH / root}
        for name, value in put.items():
            results[name][b, n, t] = value
        results["dk"][b, n, seen] += np.outer(ds_s, q_H) / root
        results["dv"][b, n, seen] += np.outer(p_s * z_s, dout_H)
        # A rounding of score and lse moves p by as much as |score| and |lse| say.
        size = (np.abs(k_sH) @ np.abs(q_H)).max() / root + abs(lse) + 1
        out_terms = (p_s * z_s) @ np.abs(v_sH) * size
        dp_terms = p_s * (z_s * (np.abs(v_sH) @ np.abs(dout_H)) + np.abs(dout_H) @ out_terms) * size
        put = {"out": out_terms, "lse": size, "dq": dp_terms @ np.abs(k_sH) / root}
        for name, value in put.items():
            terms[name][b, n, t] = value
        terms["dk"][b, n, seen] += np.outer(dp_terms, np.abs(q_H)) / root
        terms["dv"][b, n, seen] += np.outer(p_s * z_s, np.abs(dout_H)) * size
    return Exact(results, terms, weights)


def philox_words(
    counter: tuple[Any, Any, Any, Any], seed: int, rounds: int = 7
) -> list[NDArray[np.uint64]]:
    """Philox4x32 in uint64, counter words broadcast against each other."""
    low = np.uint64(0xFFFFFFFF)
    x = [np.asarray(c).astype(np.uint64) & low for c in counter]
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(rounds):
        p0, p1 = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        high0, high1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        x = [high1 ^ x[1] ^ np.uint64(k0), p1 & low, high0 ^ x[3] ^ np.uint64(k1), p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x


def _kept(a: Any, b: Any, c: Any, p: float) -> Bool:
    """(a c + b) mod 2^32 >= floor(p 2^32), in uint64: the product wraps modulo 2^64."""
    draw = (a * c + b) & np.uint64(0xFFFFFFFF)
    kept: Bool = draw >= np.uint64(int(p * 2**32))
    return kept


@dataclasses.dataclass(frozen=True)
class Law:
    """The dropout law of design section 5, word by word."""

    p: float
    seed: int
    first_row: int
    layer: int

    def attention(self, batch: int, heads: int, queries: int, keys: int) -> Bool:
        """keep[B, N, T, S]."""
        i = np.arange(keys - queries, keys)[None, None, :, None]
        row = self.first_row + np.arange(batch)[:, None, None, None]
        bh = row * heads + np.arange(heads)[None, :, None, None]
        words = philox_words((i, bh, self.layer, 0), self.seed)
        columns = philox_words((np.arange(keys), 0, self.layer, 1), self.seed)
        return _kept(words[0] | np.uint64(1), words[1], columns[0], self.p)

    def element(self, site: int, batch: int, start: int, count: int, dim: int) -> Bool:
        """keep[B, T, D]."""
        t = np.arange(start, start + count)[None, :, None]
        row = self.first_row + np.arange(batch)[:, None, None]
        words = philox_words((t, row, self.layer, 2 + 2 * site), self.seed)
        columns = philox_words((np.arange(dim), 0, self.layer, 3 + 2 * site), self.seed)
        return _kept(words[0] | np.uint64(1), words[1], columns[0], self.p)

    @property
    def dropout(self) -> Dropout:
        """The same as a Dropout."""
        return Dropout(
            self.p,
            torch.tensor(self.seed, dtype=torch.int64),
            torch.tensor(self.first_row, dtype=torch.int64),
            self.layer,
        )


class Recorder(TorchDispatchMode):
    """Notes every operator that runs, also inside the two operators of blocked attention.

    Attributes:
        ops: names, in order.
        largest: elements of the largest tensor that any operator gave out.
        flops: of the matrix products bmm and baddbmm.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.largest = 0
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.name()
        self.ops.append(name)
        inner = {
            "flashgpt::blocked": blocked.forward,
            "flashgpt::blocked_backward": blocked.backward,
        }.get(name)
        if inner is not None:
            with self:
                return inner._init_fn(*args)
        if name in ("aten::bmm", "aten::baddbmm", "aten::baddbmm_"):
            left, right = args[-2:]
            self.flops += 2 * left.numel() * right.shape[-1]
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return found


Attention = Callable[..., tuple[Tensor, Tensor]]


def _mutant(change: str) -> Attention:
    """Standard attention with one fault; `none` has none."""

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        dropout: Dropout | None,
        documents_BS: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        mask = standard.causal_mask(q.shape[2], k.shape[2], q.device)
        if change == "no scale":
            q = q * q.shape[-1] ** 0.5
        elif change == "scale a little low":
            q = q * (1 - 2**-16)
        elif change == "sees the next token":
            mask = torch.ones_like(mask).tril(k.shape[2] - q.shape[2] + 1)
        elif change == "misses itself":
            mask = torch.ones_like(mask).tril(k.shape[2] - q.shape[2] - 1)
            mask[:, 0] = True
        elif change == "mask transposed":
            mask = torch.ones_like(mask).triu(k.shape[2] - q.shape[2])
        elif change == "top-left":
            mask = torch.ones_like(mask).tril()
        elif change == "no mask":
            mask = torch.ones_like(mask)
        elif change == "no dropout":
            dropout = None
        elif dropout is not None and change == "dropout of the next row":
            dropout = dataclasses.replace(dropout, first_row=dropout.first_row + 1)
        elif dropout is not None and change == "dropout of another layer":
            dropout = dropout.at(dropout.layer + 1)
        elif dropout is not None and change == "dropout of the top-left":
            rows = standard.attention_keep(dropout, *q.shape[:3], q.shape[2])
            pad = torch.ones(*rows.shape[:3], k.shape[2] - q.shape[2], dtype=torch.bool)
            keep = torch.cat((rows, pad), -1)
            _, lse, weights = standard.attention(q, k, v, dropout=None, documents_BS=documents_BS)
            weights = torch.where(keep, weights * dropout.scale, 0)
            return weights @ v, lse
        elif dropout is not None and change == "dropout not rescaled":
            v = v / dropout.scale
        elif documents_BS is not None and change == "documents end late":
            documents_BS = documents_BS.roll(1, dims=1)
        elif change == "no documents":
            documents_BS = None
        out, lse, _ = standard.attention(
            q, k, v, dropout=dropout, documents_BS=documents_BS, mask_TS=mask
        )
        if change == "lse in base 2":
            lse = lse / math.log(2)
        elif change == "lse a little low":
            lse = lse - 1e-3
        elif change == "dv twice":
            out = out + (v - v.detach()).sum()
        return out, lse

    return attention


def serves_all(request: Any) -> None:
    """A `supports` that refuses nothing."""


@pytest.fixture
def mutant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """mutant(change) puts standard attention with that fault into the table, as "mutant"."""

    def put(change: str) -> None:
        monkeypatch.setitem(KERNELS, "mutant", Kernel("mutant", serves_all, _mutant(change)))

    return put


@pytest.fixture(scope="session")
def oracle() -> Callable[..., Exact]:
    """Attention in float64 by plain loops: q, k, v, dout, keep=, scale=, documents= -> Exact."""
    return attention_by_rows


@pytest.fixture(scope="session")
def philox_numpy() -> Callable[..., list[NDArray[np.uint64]]]:
    """Philox4x32: (counter words), seed, rounds=7 -> four words."""
    return philox_words


@pytest.fixture(scope="session")
def law() -> type[Law]:
    """The dropout law: Law(p, seed, first_row, layer)."""
    return Law


@pytest.fixture(scope="session")
def recorder() -> type[Recorder]:
    """Context manager that notes operators, sizes and FLOPs."""
    return Recorder
