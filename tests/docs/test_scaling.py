"""What docs/scaling.md and planning.md say of several GPUs is what was measured.

pytest tests/docs/test_scaling.py
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from flashgpt.config import preset
from flashgpt.measure import scaling_model
from tests.docs.pages import ROOT, raw, table


def test_what_a_plan_predicts_on_gpus_is_said_as_it_was_measured() -> None:
    found = raw("plan/plan.json")
    assert found["claims"]["hold"] and not found["missing"]
    assert table("planning.md", "On one H100, GPT-2 124M") == [
        [
            *(row["way"], " and ".join(str(one["rows"]) for one in row["from"])),
            *(str(row["micro_batch"]), f"{row['peak_bytes'] / 2**30:.2f}"),
            *(f"{row['memory_error']:+.1%}", f"{row['tokens_per_second']:,.0f}"),
            f"{row['speed_error']:+.1%}",
        ]
        for row in found["rows"]
    ]
    samples = [one for row in found["rows"] for one in (*row["from"], row["measured"])]
    seconds = [one["preparing"] for one in samples]
    said = f"Compiling took {min(seconds):.0f} to {max(seconds):.0f} seconds a size"
    assert said in (ROOT / "docs/planning.md").read_text()
    cfg, measured = preset("gpt2"), {row["way"]: row for row in raw("scaling/scaling.json")["rows"]}
    ways: dict[str, tuple[scaling_model.Engine, int]]
    ways = {"single": ("DDP", 1), "ddp": ("DDP", 2), "fsdp": ("FSDP2", 2)}
    rows = []
    for way, (engine, gpus) in ways.items():
        row, cluster = measured[way], scaling_model.Cluster()
        predicted = scaling_model.step("gpt2", cfg, engine, gpus, cluster, 0.1)
        memory = predicted.memory.total / row["peak_bytes"] - 1
        speed = predicted.tokens_per_second / row["tokens_per_second"] - 1
        rows.append(
            [
                *(engine if gpus > 1 else "-", str(gpus), f"{row['peak_bytes'] / 2**30:.2f}"),
                *(f"{memory:+.1%}", f"{row['tokens_per_second']:,.0f}", f"{speed:+.1%}"),
            ]
        )
    assert table("planning.md", "Of one and two H100s") == rows


def test_speeds_of_several_gpus_are_those_of_the_raw_data() -> None:
    rows = []
    for row in raw("scaling/scaling.json")["rows"]:
        sent = row["communication"]
        rows.append(
            [
                *(row["way"], f"{statistics.median(row['ms']):.1f}"),
                *(f"{row['tokens_per_second'] / 1e3:,.0f}", f"{row.get('speedup', 1):.2f}"),
                f"{row['peak_bytes'] / 2**30:.1f}",
                f"{sent['nccl_ms']:.2f}" if sent else "-",
                f"{sent['overlapped']:.0%}".replace("%", " %") if sent else "-",
            ]
        )
    assert table("scaling.md", "On two H100s") == rows


def test_losses_on_several_devices_are_those_of_the_raw_data() -> None:
    found = raw("devices/devices.json")["rows"]
    assert [row["way"] for row in found if row.get("holds")] == ["gpu", "ddp", "fsdp"]
    assert table("scaling.md", "## The same file, the same curve") == [
        [
            *(row["way"], f"{row['losses'][-1]:.6f}", f"{row['val_loss']:.6f}"),
            "-" if row["way"] == "cpu" else f"{max(row['apart']):.1e}",
        ]
        for row in found
    ]
    unit = 2.0**-21  # of fp32 from 4 to 8, as the first losses are
    assert max(max(row["apart"]) for row in found) == 2 * unit


def test_what_is_said_of_cut_models_and_of_gathers_is_measured() -> None:
    page = (ROOT / "docs/scaling.md").read_text()
    before = {row["way"]: row for row in raw("scaling/cut.json")["rows"]}
    now = {row["way"]: row for row in raw("scaling/scaling.json")["rows"]}
    cut, in_bf16, in_fp32 = (before[way] for way in ("ddp", "fsdp", "fsdp-fp32-gather"))

    for text in (
        f"{statistics.median(cut['ms']):.1f} ms a step and {cut['speedup']:.2f} times one GPU",
        f"`ddp` stayed within {round_up(now['ddp']['drift'], 4)} of one process",
        f"differs by {now['ddp']['control']:.3f}",
        f"`fsdp` within {round_up(now['fsdp']['drift'], 5):.5f} of `blocks` "
        f"({now['fsdp']['control']:.3f})",
        f"`blocks` is {now['blocks']['drift']:.2f} from `single`",
        f"within {round_up(drift(in_bf16, now['blocks']), 3)} of `blocks`, "
        f"and sends a quarter less: {in_bf16['speedup']:.2f} times one GPU "
        f"in a call in which fp32 was {in_fp32['speedup']:.2f}",
    ):
        assert text in " ".join(page.split())


def drift(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))


def round_up(x: float, digits: int) -> float:
    return math.ceil(x * 10**digits) / 10**digits
