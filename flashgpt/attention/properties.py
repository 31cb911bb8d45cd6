"""What holds of a kernel exactly, or from a formula: masks, causality, repeats, closed forms.

Errors against float64 are judged in verify.py; nothing here compares two kernels with each other.

Legend: B batch, T query positions, S key positions, N heads, H head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from flashgpt.attention import verify
from flashgpt.attention.attend import attend
from flashgpt.attention.dropout import attention_keep
from flashgpt.attention.kernels import KERNELS, refusal
from flashgpt.attention.verify import Case, Error, Verdict, judge

UNIFORM = ("out", "lse", "dq")
DEFINITION = "definition"  # standard attention in float64
ROUNDINGS = 8  # that the definition in float64 may take to reach a closed form


def masks_equal(case: Case, device: torch.device) -> dict[str, bool]:
    """Per kernel: the dropout mask it applies equals the definition, bit for bit.

    With q = k = 0 every visible key weighs the same, and v = identity columns make the weights
    visible as outputs: out[i, j] > 0 exactly where weight (i, j) was kept.
    """
    shape = (case.batch, case.heads)
    q = torch.zeros(*shape, case.queries, case.keys, dtype=case.dtype, device=device)
    k = torch.zeros(*shape, case.keys, case.keys, dtype=case.dtype, device=device)
    v = torch.eye(case.keys, dtype=case.dtype, device=device).expand_as(k)
    dropout = verify.dropout_of(case, 0, device)
    assert dropout is not None, "a mask needs dropout"
    keep = attention_keep(dropout, *shape, case.queries, case.keys)
    expected = keep.tril(case.keys - case.queries)
    request = dataclasses.replace(case, head_dim=case.keys).request(device)
    found = {}
    for name, kernel in KERNELS.items():
        if kernel.supports(request) is None:
            out = attend(q, k, v, kernel=name, use_flash=name != "standard", dropout=dropout)
            assert isinstance(out, Tensor)
            found[name] = torch.equal(out > 0, expected)
    return found


def is_causal(kernel: str, case: Case, device: torch.device) -> bool:
    """Whether a change of the later half of k and v leaves every earlier output bit for bit."""
    inputs = verify.inputs_of(case, 0, device)[:3]
    middle = case.keys // 2
    changed = [inputs[0]] + [x.clone() for x in inputs[1:]]
    for x in changed[1:]:
        x[:, :, middle:] += 1
    before, after = (
        verify.attend_case(kernel, case, 0, q, k, v).out_BNTH for q, k, v in (inputs, changed)
    )
    rows = max(0, middle - (case.keys - case.queries))
    later_changed = not torch.equal(before[:, :, rows:], after[:, :, rows:])
    return later_changed and torch.equal(before[:, :, :rows], after[:, :, :rows])


def repeats(kernel: str, case: Case, device: torch.device, times: int) -> bool:
    """Whether out, lse and gradients are the same, bit for bit, each time."""
    inputs = verify.inputs_of(case, 0, device)
    first = verify.run_case(kernel, case, 0, inputs)
    for _ in range(times - 1):
        again = verify.run_case(kernel, case, 0, inputs)
        if any(not torch.equal(first[name], again[name]) for name in first):
            return False
    return True


def closed_forms(device: torch.device, dtype: torch.dtype) -> Iterator[Verdict]:
    """Judges every kernel, and the definition itself, where the result is known without attention.

    With identical keys a query weighs all that it sees alike: out is the mean of the values so far,
    lse = score + log(count), dq = 0. Scores lie at 1, 120 and -120. The definition in float64 must
    agree within ROUNDINGS roundings of float64, so an error in the definition itself shows here.
    """
    for values in verify.SAME_KEYS.values():
        for queries in (130, 100):
            case = Case(16, 4, queries, 130, 16, dtype=dtype, values=values)
            yield from _judge_uniform(case, device)


def _judge_uniform(case: Case, device: torch.device) -> Iterator[Verdict]:
    names = [name for name in KERNELS if refusal(name, case.request(device)) is None]
    pooled = {name: {tensor: Error() for tensor in UNIFORM} for name in (DEFINITION, *names)}
    for seed in range(verify.MIN_SEEDS):
        inputs = verify.inputs_of(case, seed, device)
        wide = [x.double() for x in inputs]
        exact, terms = _uniform(case, wide), verify.terms_of(case, seed, wide)
        for name in pooled:
            kernel, given = ("standard", wide) if name == DEFINITION else (name, inputs)
            found = verify.run_case(kernel, case, seed, given)
            for tensor, error in pooled[name].items():
                error.add(found[tensor], exact[tensor], terms[tensor])
    for tensor in UNIFORM:
        own = pooled[DEFINITION][tensor]
        share = own.max / (ROUNDINGS * own.floor_max)
        yield Verdict(DEFINITION, str(case), tensor, own.max, own.max, share, share)
        for name in names:
            yield judge(name, case, tensor, pooled[name][tensor], pooled["standard"][tensor])


def _uniform(case: Case, inputs: list[Tensor]) -> dict[str, Tensor]:
    """out, lse and dq for identical keys, by running means."""
    q_BNTH, k_BNSH, v_BNSH, _ = inputs
    count_T = torch.arange(case.keys - case.queries, case.keys, device=q_BNTH.device) + 1.0
    means_BNSH = v_BNSH.cumsum(2)[:, :, case.keys - case.queries :] / count_T.double()[:, None]
    score_BNT = (q_BNTH * k_BNSH[:, :, :1]).sum(-1) * case.head_dim**-0.5
    return {
        "out": means_BNSH,
        "lse": score_BNT + count_T.double().log(),
        "dq": torch.zeros_like(q_BNTH),
    }
