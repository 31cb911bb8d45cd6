"""What docs/performance.md says of losses beside nanoGPT's is what was measured.

pytest tests/docs/test_same_loss.py
"""

from __future__ import annotations

import statistics

from tests.docs.pages import error_of_mean, prose, raw, table

DIFFERENCES = ("differences", "control_differences")


def test_losses_beside_nanogpt_are_those_of_the_raw_data() -> None:
    found = raw("nanogpt-loss/loss.json")
    claims = found["claims"]
    peer = [run for run in found["runs"] if run["side"] == "nanogpt"]
    apart = [claims[name][of] for name in ("final", "drift") for of in DIFFERENCES]
    assert table("performance.md", "### The same loss") == [
        [str(run["seed"]), f"{run['final']:.4f}", *(f"{value:+.4f}" for value in values)]
        for run, *values in zip(peer, *apart, strict=True)
    ]
    assert claims["first_step"]["holds"] and claims["drift"]["holds"]
    assert not claims["final"]["holds"]
    ours, control = map(statistics.fmean, apart[:2])
    page = prose("docs/performance.md")
    for told in (
        f"at most {max(map(abs, claims['first_step']['differences'])):.1e}".replace("e-0", "e-"),
        f"The drift is {claims['drift']['mean_difference']:+.4f} on average",
        f"Ours ends {ours:.4f} above nanoGPT, within nanoGPT's spread over seeds "
        f"({claims['final']['nanogpt_spread']:.2f})",
        f"reversed ends {control:.4f} above itself, {ours - control:.4f} from ours",
    ):
        assert told in page, told


def test_losses_of_both_calls_beside_nanogpt_are_those_of_the_raw_data() -> None:
    calls = [raw(f"nanogpt-loss/{name}.json") for name in ("earlier", "loss")]
    earlier, again = (
        [run["final"] for run in found["runs"] if run["side"] == "nanogpt"][:3] for found in calls
    )
    moved = [first - second for first, second in zip(again, earlier, strict=True)]
    ours, control = (
        [value for found in calls for value in found["claims"]["final"][of]] for of in DIFFERENCES
    )
    between = [first - second for first, second in zip(ours, control, strict=True)]
    mean = {name: statistics.fmean(v) for name, v in (("ours", ours), ("control", control))}
    page = prose("docs/performance.md")
    for told in (
        f"ended {-moved[0]:.3f} and {-moved[1]:.3f} lower and {moved[2]:.3f} higher than in",
        f"ours is {statistics.fmean(between):.4f} above the control (standard error "
        f"{error_of_mean(between):.3f}), {mean['ours']:.4f} above nanoGPT "
        f"({error_of_mean(ours):.3f}), and the control {mean['control']:.4f} above it "
        f"({error_of_mean(control):.3f}).",
    ):
        assert told in page, told


def test_what_is_said_of_the_residual_streams_dtype_is_measured() -> None:
    loss, found = raw("nanogpt-loss/earlier.json"), raw("nanogpt-loss/residual.json")
    gradients = found["gradients"]
    ways = ("nanogpt", "bf16", "fp32")
    times = ("initial weights, seed 1339", "after 500 steps, seed 1339")
    errors = [[f"{gradients[at][way]['all']['error']:.4f}" for way in ways] for at in times]
    assert [row[1:] for row in table("performance.md", "errs, against fp32, by")] == errors
    shrunk = [abs(gradients[at][way]["all"]["shrink"]) for at in times for way in ways]
    assert max(shrunk) < 1e-3
    peer = {run["seed"]: run for run in loss["runs"] if run["side"] == "nanogpt"}
    seeds = {run["seed"] for run in found["runs"]}
    ours = [run for run in loss["runs"] if run["side"] == "ours" and run["seed"] in seeds]
    runs = [*found["runs"], *({"residual": "bf16", **run} for run in ours)]
    page = prose("docs/performance.md")
    for residual, told in (
        ("fp32", "{} runs of four seeds end {} above nanoGPT on average (standard error {})"),
        ("bf16", "{} in bf16 of the same seeds {} ({})"),
    ):
        apart = [r["final"] - peer[r["seed"]]["final"] for r in runs if r["residual"] == residual]
        count = {7: "seven", 8: "eight"}[len(apart)]
        numbers = f"{statistics.fmean(apart):.3f}", f"{error_of_mean(apart):.3f}"
        assert told.format(count, *numbers) in page
    trained = gradients["after 500 steps, seed 1339"]
    more = trained["bf16"]["all"]["error"] / trained["nanogpt"]["all"]["error"] - 1
    assert f"by {more:.0%} more than nanoGPT's after 500".replace("%", " %") in page
