"""What docs/attention.md says is what was measured.

pytest tests/docs/test_attention.py
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from flashgpt.attention import fa4, kernels, verify
from flashgpt.attention.request import Request
from tests.docs.pages import FENCE, ROOT

ON_A_GPU = {
    "training": {},
    "training with dropout": {"dropout": True},
    "training on packed documents": {"documents": True},
    "training that repeats": {"deterministic": True},
    "training in fp32": {"dtype": torch.float32},
    "a whole prompt": {"gradient": False},
    "a chunk of a prompt": {"gradient": False, "shape": "chunk"},
    "a single token": {"gradient": False, "shape": "single", "t_bucket": 1},
}


def test_the_receipts_of_a_page_are_what_choose_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fa4, "_missing", lambda: "needs the package flash-attn-4")
    kernels.choose.cache_clear()
    usual = Request("cuda", torch.bfloat16, 64, 1024, "square", False, False, True, False)
    served = []
    for what, change in ON_A_GPU.items():
        choice = kernels.choose(dataclasses.replace(usual, **change))
        served.append(f"{what + ':':29} {choice.kernel}")
        served += [f"    not {name}: {why}" for name, why in choice.refused]
    kernels.choose.cache_clear()
    shown = dict(FENCE.findall((ROOT / "docs/attention.md").read_text()))["receipts"]
    assert shown == "\n".join(served) + "\n"


def test_the_figures_of_the_h100_are_those_of_the_raw_data() -> None:
    found = json.loads((ROOT / "benchmarks/attention-h100/attention.json").read_text())
    rows = {(row["dropout"], row["length"], row["kernel"]): row for row in found["rows"]}
    page = (ROOT / "docs/attention.md").read_text().split("## Speed and memory on an H100")[1]
    cells = 0
    for dropout, part in enumerate(page.split("Dropout 0.1;")):
        table = [line.strip("| ").split(" | ") for line in part.splitlines() if line[:1] == "|"]
        (_, *kernels_), _, *lines = table[:9]
        for length, *values in lines:
            for kernel, value in zip(kernels_, values, strict=True):
                row = rows.get((bool(dropout), int(length), kernel))
                timed = row and row["forward_backward"]
                speed = timed and f"{timed['ms']:.2f} ({timed['flop_per_second'] / 1e12:.0f})"
                assert value == (speed or "-"), (dropout, length, kernel)
                cells += 1
    assert cells == 7 * 8 + 7 * 6


def test_the_errors_of_the_h100_are_those_of_the_raw_data() -> None:
    found = json.loads((ROOT / "benchmarks/attention-h100/verify.json").read_text())
    hard = (*verify.VALUES, *verify.SAME_KEYS.values())
    used: dict[tuple[str, bool, str], float] = {}
    for row in (row for audit in found.values() for row in audit["rows"]):
        if "layers" not in row["case"]:
            kind = any(f" {values} " in row["case"] for values in hard)
            key = (row["kernel"], kind, row["tensor"])
            used[key] = max(used.get(key, 0.0), row["max_used"], row["rms_used"])
    assert sum(len(audit["rows"]) for audit in found.values()) == 7151
    page = (ROOT / "docs/attention.md").read_text().split("### What the audit found")[1]
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line[:1] == "|"][2:7]
    for kernel, *shares in lines:
        if kernel.startswith("sdpa:cudnn"):
            kernel, shares = "sdpa:cudnn", shares[:2]
        for tensor, share in zip(verify.TENSORS, shares, strict=False):
            assert float(share) == round(used[kernel, False, tensor], 2), (kernel, tensor)
        if len(shares) == 6:
            assert float(shares[5]) == round(used[kernel, True, "dq"], 2), kernel
    assert [line[0] for line in lines[:2]] == ["blocked", "triton"]
