"""Standard attention: the definition, and that it stays itself when compiled.

pytest tests/attention/test_standard.py
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flashgpt.attention.attend import Attended, attend
from flashgpt.attention.standard import causal_mask


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (4, 4), (1, 5), (3, 7)])
def test_the_last_query_sees_the_last_key(queries: int, keys: int) -> None:
    mask = causal_mask(queries, keys, torch.device("cpu"))
    for t in range(queries):
        for s in range(keys):
            assert mask[t, s].item() == (s <= keys - queries + t)


def test_the_softmax_of_half_precision_is_computed_in_fp32() -> None:
    """Whole-number scores are exact in fp16, so only the softmax can err: by the last rounding."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-3, 4, (2, 2, 40, 16), generator=generator)
    k = torch.randint(-3, 4, (2, 2, 40, 16), generator=generator)
    half = (q * 4).half(), k.half(), k.half()
    found = attend(*half, use_flash=False, return_weights=True, return_lse=True)
    assert isinstance(found, Attended)
    assert found.weights_BNTS is not None and found.lse_BNT is not None
    assert (found.out_BNTH.dtype, found.weights_BNTS.dtype) == (torch.float16, torch.float16)
    assert found.lse_BNT.dtype == torch.float32
    scores = (q @ k.mT).double().masked_fill(~causal_mask(40, 40, q.device), -math.inf)
    exact = torch.softmax(scores, -1)
    rounding = exact * 2**-11 + 2**-25  # half the distance of two fp16 numbers, subnormal ones too
    assert ((found.weights_BNTS.double() - exact).abs() <= rounding * 1.001).all()
    torch.testing.assert_close(found.lse_BNT.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-5)


def test_only_plain_operators_run(recorder: type[Any]) -> None:
    qkv = [torch.randn(2, 2, 9, 8, requires_grad=True) for _ in range(3)]
    with recorder() as seen:
        attend(*qkv, use_flash=False).sum().backward()
    assert seen.ops.count("aten::_softmax") == 1
    assert seen.ops.count("aten::_softmax_backward_data") == 1
    assert seen.ops.count("aten::bmm") == 2 + 4
    assert not [op for op in seen.ops if "scaled_dot" in op or op.startswith("flashgpt::")]


def fused_operators(function: Any, *arguments: Tensor) -> list[str]:
    """Fused attention operators that a call really runs, forward and backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*arguments).sum().backward()
    return [event.key for event in profile.key_averages() if "scaled_dot_product" in event.key]


def test_standard_stays_standard_when_compiled() -> None:
    """Inductor rewrites plain attention into a fused kernel; here it must not, and is seen to."""

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v

    qkv = [torch.randn(2, 2, 16, 8, requires_grad=True) for _ in range(3)]
    standard = functools.partial(attend, use_flash=False)
    eager = standard(*qkv)
    counters = torch._dynamo.utils.counters
    options = dict(compile_threads=1, fx_graph_cache=False)
    with (
        torch._inductor.config.patch(options),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        counters.clear()
        compiled = torch.compile(standard, fullgraph=True)
        torch.testing.assert_close(compiled(*qkv), eager, rtol=1e-5, atol=1e-6)
        assert fused_operators(compiled, *qkv) == []
        assert counters["inductor"]["fuse_attention"] == 0

        assert fused_operators(torch.compile(plain), *qkv)
        assert counters["inductor"]["fuse_attention"] > 0
