"""What docs/generation.md says is what was measured.

pytest tests/docs/test_generation.py
"""

from __future__ import annotations

import pytest

from tests.docs.pages import prose, raw, table


@pytest.mark.parametrize(
    ("path", "heading", "batches"),
    [
        ("generate-h100/generate.json", "## How fast it is on an H100", (1, 8, 32, 128)),
        ("generate-cpu/generate.json", "On the EPYC, 64 tokens after 16", (1, 8)),
        ("generate-cpu/intel.json", "On the Xeon (", (1, 8)),
    ],
)
def test_speeds_of_writing_are_those_of_the_raw_data(
    path: str, heading: str, batches: tuple[int, ...]
) -> None:
    found = raw(path)
    speeds = {(row["batch"], row["way"]): row for row in found["rows"]}

    def speed(batch: int, way: str) -> str:
        row = speeds.get((batch, way))
        return f"{row['tokens_per_second']:,.0f}" if row else "-"

    rows = [
        [
            *(str(batch), speed(batch, "ours")),
            f"{speeds[batch, 'ours']['share']:.0%}".replace("%", " %"),
            *(speed(batch, way) for way in ("dynamic", "static")),
        ]
        for batch in batches
    ]
    assert table("generation.md", heading) == rows
    first = {row["way"]: row["ms"] for row in found["first"]}
    page = prose("docs/generation.md")
    if path.startswith("generate-cpu"):
        ours, *peers = (f"{first[way] / 1e3:.2f}" for way in ("ours", "dynamic", "static"))
        told = f"{ours} s on the EPYC (Hugging Face {peers[0]} and {peers[1]})"
        if path.endswith("intel.json"):
            told = f"{ours} s on the Xeon ({peers[0]} and {peers[1]})"
        assert told in page
    else:
        assert f"comes after {first['ours']:.2f} ms (Hugging Face {first['dynamic']:.2f}" in page
        readme = prose("README.md")
        assert all(text in readme for text in (rows[0][1], rows[2][1], rows[0][4], rows[2][3]))


@pytest.mark.parametrize(
    ("name", "heading", "counts"),
    [
        ("rows", "## On the CPU", (1, 2, 8, 128, 1000)),
        ("intel", "Two cores of an Intel Xeon", (1, 2, 3, 4, 8, 128, 1000)),
    ],
)
def test_products_on_a_cpu_are_those_of_the_raw_data(
    name: str, heading: str, counts: tuple[int, ...]
) -> None:
    found = {(row["rows"], row["way"]): row["ms"] for row in raw(f"rows-cpu/{name}.json")["rows"]}
    ways = ("read", "linear", "onednn", "packed")
    assert table("generation.md", heading) == [
        [f"{rows:,}", *(f"{found[rows, way]:,.0f}" for way in ways)] for rows in counts
    ]


def test_what_limits_one_text_on_a_cpu_is_measured() -> None:
    told = []
    for name, way, machine in (("rows", "onednn", "EPYC"), ("intel", "linear", "Xeon")):
        products = {row["way"]: row["ms"] for row in raw(f"rows-cpu/{name}.json")["rows"][:4]}
        steps = raw(f"generate-cpu/{name if name == 'intel' else 'generate'}.json")["rows"]
        step = next(row["ms"] for row in steps if (row["batch"], row["way"]) == (1, "ours"))
        told.append((f"{products[way]:.0f} of {step:.0f}", machine, f"{products['read']:.0f}"))
    (first, epyc, read), (second, xeon, other) = told
    page = prose("docs/generation.md")
    assert f"{first} ms on the {epyc} and {second} on the {xeon}" in page
    assert f"reading the weights one by one takes {read} and {other}," in page
