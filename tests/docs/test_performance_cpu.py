"""What docs/performance.md says of CPUs is what was measured.

pytest tests/docs/test_performance_cpu.py
"""

from __future__ import annotations

from tests.docs.pages import prose, raw, table


def test_steps_on_a_cpu_are_those_of_the_raw_data() -> None:
    first, second = (raw(f"nanogpt-speed-cpu/{name}.json")["rows"] for name in ("speed", "profile"))
    assert table("performance.md", "## On two CPU cores") == [
        [one["way"], *(f"{row['tokens_per_second']:,.0f}" for row in (one, other))]
        for one, other in zip(first, second, strict=True)
    ]
    ratios = []
    for rows in (first, second):
        best = {
            side: max(r["tokens_per_second"] for r in rows if r["way"].startswith(side))
            for side in ("nanogpt", "ours")
        }
        ratios.append(best["ours"] / best["nanogpt"] - 1)
    parts = [row["profile"]["parts"] for row in second]
    shares = [found["products"] / sum(found.values()) for found in parts]
    page = prose("docs/performance.md")
    for text in (
        f"ours was {-ratios[0]:.0%} slower than nanoGPT's best in one run and {ratios[1]:.0%} "
        "faster in the other",
        f"take {100 * min(shares):.0f} to {max(shares):.0%} of these four steps",
        f"would take {120 * shares[0]:.0f} to {1.2 * shares[1]:.0%} of the step",
    ):
        assert text.replace("%", " %") in page, text


def test_steps_on_a_cpu_with_amx_are_those_of_the_raw_data() -> None:
    fp32, bf16 = (
        {row["way"]: row for row in raw(f"nanogpt-speed-cpu/{name}.json")["rows"]}
        for name in ("amx", "amx-bf16")
    )
    speeds = [{way: row["tokens_per_second"] for way, row in rows.items()} for rows in (fp32, bf16)]
    assert table("performance.md", "**A processor with AMX.**") == [
        [way, *(f"{rows[way]:,.0f}" for rows in speeds)] for way in fp32
    ]
    plain, half = speeds
    peer = max(plain["nanogpt"], plain["nanogpt-eager"])
    parts = fp32["ours"]["profile"]["parts"]
    page = prose("docs/performance.md")
    for text in (
        f"ours is {max(plain['ours'], plain['ours-eager']) / peer - 1:.0%} faster than nanoGPT's",
        f"products being {parts['products'] / sum(parts.values()):.0%} of ours",
        f"{half['ours'] / plain['ours']:.1f} times our speed in fp32, and "
        f"{half['ours'] / peer:.1f} times nanoGPT's",
        f"ours is {1 - half['ours'] / half['nanogpt']:.0%} slower: nanoGPT's attention",
    ):
        assert text.replace("%", " %") in page, text
    assert f"bf16`) {half['ours'] / peer:.1f} times as fast as nanoGPT's" in prose("README.md")


def test_steps_beside_hugging_face_on_a_xeon_are_those_of_the_raw_data() -> None:
    found = {
        (row["model"], row["compiled"], row["dropout"]): f"{row['tokens_per_second']:,.0f}"
        for row in raw("train-cpu/intel.json")["rows"]
    }
    ways = [(name, p) for p in (0.0, 0.1) for name in ("use_flash on", "Hugging Face")]
    speeds = [found[name, compiled, p] for name, p in ways for compiled in (False, True)]
    told = (
        "ours trains on {} tokens a second without dropout, eager, and {} compiled, Hugging "
        "Face's on {} and {}; with dropout on {} and {}, Hugging Face's on {} and {}."
    )
    page = prose("docs/performance.md")
    assert told.format(*speeds) in page
