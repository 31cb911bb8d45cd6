"""What docs/performance.md says of GPUs is what was measured.

pytest tests/docs/test_performance.py
"""

from __future__ import annotations

import json
import re
import statistics
from typing import Any

import pytest

from flashgpt.measure.step_parts import PARTS
from tests.docs.pages import ROOT, prose, raw, table

# Calls with the compiler's cache filled before them, and those without.
FILLED = ("standard", "long")
COLD = ("speed", "large-batch", "small", "medium", "large", "large-nanogpt")
# Kernels of a training step by name: the first that is found decides.
STEP_PARTS = {
    "products, with what is inside them": "nvjet|xmma|cublas",
    "attention": "^_forward$|^_backward_|cudnn",
    "loss": "^_row$|log_softmax",
    "bias sums": "(red|per)_fused_(gelu|sum|cat_sum)",
    "norms and residual sums": "reduce_kernel<128, 4|layer_norm",
    "GELU": "gelu",
    "clipping and AdamW": "multi_tensor",
    "copies and the rest": "",
}


def test_the_parts_of_a_step_on_the_h100_are_those_of_the_raw_data() -> None:
    raw = json.loads((ROOT / "benchmarks/step-h100/steps.json").read_text())
    page = (ROOT / "docs/performance.md").read_text().split("## A step of GPT-2 124M")[1]
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line[:1] == "|"]
    table = {name: [float(value) for value in values] for name, *values in lines[2:12]}
    for at, state in enumerate(raw["states"]):
        assert table["ms per step"][at] == round(statistics.median(state["ms"]), 1)
        assert table["peak GiB"][at] == round(state["peak_gib"], 1)
        parts = dict.fromkeys(STEP_PARTS, 0.0)
        for kernel in state["kernels"]:
            name = next(n for n, found in STEP_PARTS.items() if re.search(found, kernel["kernel"]))
            parts[name] += kernel["ms"]
        for name, ms in parts.items():
            assert abs(table[name][at] - ms) < 0.051, (state["state"], name, ms)


def test_steps_with_dropout_and_the_switch_off_are_those_of_the_raw_data() -> None:
    rows = [
        row for name in ("speed", "standard") for row in raw(f"nanogpt-speed/{name}.json")["rows"]
    ]
    ms = [statistics.median(row["ms"]) for row in rows]
    assert table("performance.md", "### With dropout") == [
        [
            *(str(row["batch"]), f"{row['dropout']:g}", row["way"], f"{median:.1f}"),
            *(f"{row['tokens_per_second'] / 1e3:.0f}", f"{row['peak_bytes'] / 2**30:.1f}"),
        ]
        for row, median in zip(rows, ms, strict=True)
    ]
    nanogpt, ours, nanogpt_dropped, ours_dropped, on, off, standard = ms
    page = prose("docs/performance.md")
    for text in (
        f"cost {ours_dropped - ours:.1f} ms where nanoGPT's cost {nanogpt_dropped - nanogpt:.1f},",
        f"ours is {nanogpt_dropped / ours_dropped:.2f} times nanoGPT",
        f"worth {off / on:.2f} times at 1,024 tokens, and our standard path is "
        f"{standard / off:.2f} times",
    ):
        assert text in page, text


def test_steps_of_other_shapes_are_those_of_the_raw_data() -> None:
    rows = []
    names = ("large-batch", "small", "small-launched", "long", "eager", "medium")
    names += ("large", "large-nanogpt")
    for found in (raw(f"nanogpt-speed/{name}.json") for name in names):
        model = found["model"]
        for row in found["rows"]:
            rows.append(
                [
                    *(str(model["n_layers"]), f"{row['batch']} x {model['context_length']:,}"),
                    *(row["way"], f"{statistics.median(row['ms']):.1f}"),
                    f"{row['tokens_per_second'] / 1e3:.0f}",
                    f"{row['peak_bytes'] / 2**30:.1f}",
                    f"{row['first_step_seconds']:.0f}",
                ]
            )
    assert table("performance.md", "### Other shapes") == rows


def test_first_steps_take_what_is_said() -> None:
    said = []
    for names in (FILLED, COLD):
        rows = (row for name in names for row in raw(f"nanogpt-speed/{name}.json")["rows"])
        seconds = [row["first_step_seconds"] for row in rows]
        said.append(f"{min(seconds):.0f} to {max(seconds):.0f}")
    told = f"filled takes {said[0]} s, as those of 4 x 4,096 here, and {said[1]} without"
    assert told in prose("docs/performance.md")


def test_where_the_milliseconds_go_is_what_the_raw_data_says() -> None:
    rows = [row for row in raw("nanogpt-speed/speed.json")["rows"] if not row["dropout"]]
    parts = [row["profile"]["parts"] for row in rows]
    lines = {
        "ms per step": [f"{statistics.median(row['ms']):.1f}" for row in rows],
        "thousand tokens/s": [f"{row['tokens_per_second'] / 1e3:.0f}" for row in rows],
    }
    lines |= {name: [f"{found[name]:.1f}" for found in parts] for name in PARTS}
    assert table("performance.md", "### What limits it") == [[k, *v] for k, v in lines.items()]
    page = prose("docs/performance.md")
    nanogpt, ours = (statistics.median(row["ms"]) for row in rows)
    left, rest = nanogpt / 1.35, ours - parts[1]["products"]
    (gelu,) = (k for k in rows[1]["profile"]["kernels"] if k["kernel"] == "_gemm_gelu")
    flop = gelu["launches"] * 2 * 65536 * 768 * 3072
    for text in (
        f"{nanogpt / ours:.2f} times nanoGPT, which does GELU apart",
        f"with it inside at {flop / gelu['ms'] / 1e9:.0f}.",
        f"would be {left:.0f} ms; what is not products takes {rest:.0f}, "
        f"so products with GELU would have to take {left - rest:.0f}, less than",
    ):
        assert text in page
    assert left - rest < parts[0]["products"]
    readme = prose("README.md")
    theirs, own = (f"{row['peak_bytes'] / 2**30:.1f} GiB" for row in rows)
    assert f"takes {ours:.1f} ms and {own} for 65,536 tokens" in readme
    assert f"nanoGPT's {nanogpt:.1f} ms and {theirs}" in readme


def test_what_is_said_of_other_shapes_is_measured() -> None:
    page = prose("docs/performance.md")

    def rows(name: str) -> dict[str, dict[str, Any]]:
        found = {row["way"]: row for row in raw(f"nanogpt-speed/{name}.json")["rows"]}
        return {way: row | {"median": statistics.median(row["ms"])} for way, row in found.items()}

    def kernels(row: dict[str, Any]) -> float:
        return sum(kernel["ms"] for kernel in row["profile"]["kernels"])

    slow, fast, medium = rows("small"), rows("small-launched"), rows("medium")
    long, eager = rows("long"), rows("eager")
    many, usual = rows("large-batch")["ours"], raw("nanogpt-speed/speed.json")["rows"][1]
    ours, parts = slow["ours-graph"], slow["ours-graph"]["profile"]["parts"]
    gelu = sum(k["ms"] for k in ours["profile"]["kernels"] if k["kernel"] == "_gemm_gelu")
    left = kernels(ours) - sum(ms for name, ms in parts.items() if name != "other")
    large, theirs = rows("large")["ours"], rows("large-nanogpt")["nanogpt"]
    profiled = rows("large-profile")["ours"], rows("large-nanogpt-profile")["nanogpt"]
    tokens = [row["batch"] * 1.024 for row in profiled]  # thousands
    with_gelu = [
        sum(row["profile"]["parts"][name] for name in ("products", "activation")) / count
        for row, count in zip(profiled, tokens, strict=True)
    ]
    whole = [row["median"] / count for row, count in zip(profiled, tokens, strict=True)]
    for text in (
        f"it took {slow['nanogpt']['median']:.1f} and {fast['nanogpt']['median']:.1f} ms on two "
        f"hosts, its kernels {kernels(slow['nanogpt']):.1f}",
        f"{slow['nanogpt']['median'] / ours['median']:.2f} times nanoGPT's speed in the one call, "
        f"{fast['nanogpt']['median'] / fast['ours-graph']['median']:.2f} in the other",
        f"Its kernels take {kernels(ours):.1f} ms: products {parts['products']:.1f}, of which "
        f"GELU's {gelu:.1f}, attention {parts['attention']:.1f}, the update "
        f"{parts['optimizer']:.1f}, norms {parts['norms']:.1f}, loss {parts['loss']:.1f}, "
        f"and {left:.1f} of casts and sums",
        f"1.3 times the faster host's would be {fast['nanogpt']['median'] / 1.3:.1f}",
        f"32 rows: {medium['nanogpt']['median'] / medium['ours']['median']:.2f} times nanoGPT in "
        f"{medium['ours']['peak_bytes'] / medium['nanogpt']['peak_bytes']:.0%} of".replace(
            "%", " %"
        ),
        f"{large['tokens_per_second'] / theirs['tokens_per_second']:.2f} times the tokens a second",
        f"products with GELU took {with_gelu[0]:.1f} ms per thousand tokens of ours and "
        f"{with_gelu[1]:.1f} of nanoGPT's, of {whole[0]:.1f} and {whole[1]:.1f} in all",
        f"All else took {whole[0] - with_gelu[0]:.1f} and {whole[1] - with_gelu[1]:.1f}",
        f"{many['tokens_per_second'] / usual['tokens_per_second'] - 1:.0%} faster a token".replace(
            "%", " %"
        ),
        f"{min(eager['ours-eager']['ms']):.1f} to {max(eager['ours-eager']['ms']):.1f} ms over",
        f"{eager['ours-eager']['median'] / eager['nanogpt-eager']['median'] - 1:.0%} more".replace(
            "%", " %"
        ),
        f"worth {long['ours-off']['median'] / long['ours-graph']['median']:.2f} times at 4,096",
        f"{eager['ours-off-eager']['median'] / eager['ours-eager']['median']:.2f} times at 1,024, "
        "eager",
    ):
        assert text in page


def test_products_with_gelu_are_those_of_the_raw_data() -> None:
    found = {(r["way"], r["gelu"], r["part"]): r["ms"] for r in raw("mlp/mlp.json")["rows"]}
    columns = [(g, p) for g in ("gelu", "gelu_new") for p in ("forward", "backward")]
    ways = ("product", "apart", "cublaslt", "triton 128 128 64 4 3", "gluon 128 128 64 4 5")
    assert table("performance.md", "### GELU inside the products") == [
        [way, *(f"{found[way, *c]:.3f}" if (way, *c) in found else "-" for c in columns)]
        for way in ways
    ]


def test_what_the_parts_of_a_product_with_gelu_cost_is_what_was_measured() -> None:
    found = raw("mlp/limits.json")
    written = [
        [f"{row[part]:.3f}" if row[part] else "-" for part in ("forward", "backward")]
        for row in found["left_out"]
    ]
    assert [row[1:] for row in table("performance.md", "What its parts cost")] == written
    text = (ROOT / "docs" / "performance.md").read_text()
    counters, tiles = found["counters"], found["tiles_of_256_rows"]
    for told in (
        f"L2 cache is\nat {counters['forward']['l2_percent']:.0f} %",
        f"tensor cores at {counters['forward']['sm_percent']:.0f} % forward",
        f"{tiles['all but the product']['forward']:.3f} ms",
        "{forward:.3f} and {backward:.3f}, the best".format(
            **tiles["ended by a third group, stored by TMA"]
        ),
        *(f"{one['own']:.3f}" for one in tiles["plain product, forward"].values()),
        *(f"{one['cublas']:.3f}" for one in tiles["plain product, forward"].values()),
    ):
        assert told in text, told


def test_the_cut_of_the_products_that_is_reported_is_in_use() -> None:
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    from benchmarks import mlp
    from flashgpt.model import gluon_mlp

    rows = table("performance.md", "### GELU inside the products")
    assert rows[-1][0] == mlp.way("gluon", gluon_mlp.CUT)


@pytest.mark.parametrize(
    ("folder", "heading", "digits", "ratios"),
    [
        ("train-h100", "## Beside Hugging Face on an H100", 0, [("1.32", "72"), ("1.39", "71")]),
        ("train-cpu", "### Beside Hugging Face", 2, [("1.29", "75"), ("1.15", "60")]),
    ],
)
def test_steps_beside_hugging_face_are_those_of_the_raw_data(
    folder: str, heading: str, digits: int, ratios: list[tuple[str, str]]
) -> None:
    found = raw(f"{folder}/train.json")
    rows = []
    for row in found["rows"]:
        how = ("compiled, graph" if row["graph"] else "compiled") if row["compiled"] else "eager"
        rows.append(
            [
                *(row["model"], how, f"{row['dropout']:g}", f"{row['ms']:.1f}"),
                f"{row['tokens_per_second'] / 1e3:.{digits}f}",
                f"{row['mfu']:.1%}".replace("%", " %"),
                *(f"{row['peak_bytes'] / 2**30:.1f}", f"{row['first_step_seconds']:.0f}"),
            ]
        )
    heading = f"{heading}\n"
    assert table("performance.md", heading) == rows
    said = (ROOT / "docs/performance.md").read_text().split(heading)[1].split("\n## ")[0]
    for p, (speed, memory) in zip((0, 0.1), ratios, strict=True):
        ours, peer = (
            next(
                row
                for row in found["rows"]
                if (row["model"], row["compiled"], row["dropout"]) == (model, True, p)
            )
            for model in ("use_flash on", "Hugging Face")
        )
        assert f"{ours['tokens_per_second'] / peer['tokens_per_second']:.2f}" == speed
        assert f"{ours['peak_bytes'] / peer['peak_bytes']:.0%}" == f"{memory}%"
        assert f"{speed} times" in said and memory in said
