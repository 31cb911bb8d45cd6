"""Every command in the docs works, and every link points somewhere. pytest tests/test_docs.py"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flashgpt import orchestrator
from flashgpt.attention import fa4, kernels, measured, verify
from flashgpt.attention.request import Request
from flashgpt.cli import main
from flashgpt.config import preset
from flashgpt.measure import clock, scaling_model
from flashgpt.measure.step_parts import PARTS
from flashgpt.verbs import bench_train
from tests.interop import stand_ins

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What the reader sees takes minutes; here the same commands run on less.
SMALL = "--model.context-length 32 --model.emb-dim 32 --train.tokens-per-step 128"
SHORTER = {
    "demo": "--seconds 1 --out runs/demo",
    "train": f"{SMALL} --train.steps 4",
    "bench attention": "--lengths 8 --tokens 64 --heads 2 --head-dim 16 --rounds 3",
    "plan": f"{SMALL} --seconds 2",
    "bench train": "--preset tiny --context 8 --batch 1 --compile off --steps 1 --rounds 3",
    "bench generate": "--preset tiny --ways ours --prompt 4 --new-tokens 4 --rounds 3",
}
DIFFERENCES = ("differences", "control_differences")
TUNING = ["--train.tokens-per-step", "128", "--train.steps", "4"]
VERBS = {
    "README.md": {
        "demo",
        "generate",
        "evaluate",
        "verify",
        "info",
        "prepare",
        "train",
        "bench",
        "convert",
        "plan",
    },
    "attention.md": {"bench", "verify"},
    "generation.md": {"generate", "evaluate", "bench"},
    "interchange.md": {"convert", "generate"},
    "performance.md": {"bench"},
    "planning.md": {"plan", "train"},
    "training.md": {"prepare", "train", "verify", "generate", "evaluate"},
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The lines of a page's bash blocks, comments removed."""
    blocks = [body for language, body in FENCE.findall(page.read_text()) if language == "bash"]
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def models(folder: Path, trained: Any) -> None:
    """Models of other programs that the commands of the docs expect to find in path/to."""
    there = folder / "path" / "to"
    there.mkdir(parents=True)
    stand_ins.nanogpt_file(there / "nanogpt" / "ckpt.pt", vocab=320)
    torch.save(stand_ins.from_scratch_state(), there / "model.pth")
    stand_ins.llmc_file(there / "model.bin")
    shutil.copytree(
        trained.checkpoints[-1], there / "gpt2", ignore=shutil.ignore_patterns("trainer")
    )


def text_files(folder: Path) -> None:
    """What the commands of the docs expect to find."""
    lines = [f"def function_{i}(value):\n    return value + {i}\n" for i in range(400)]
    (folder / "my.txt").write_text("\n".join(lines))
    asked = [{"prompt": f"question {i} answer ", "completion": str(i * i)} for i in range(400)]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (folder / "prompts.txt").write_text("def \nimport os\n")
    (folder / "notes").mkdir()
    (folder / "notes" / "one.md").write_text("\n".join(reversed(lines)))


@pytest.fixture
def own_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `bench attention --save` writes stays in this test."""
    monkeypatch.setenv("FLASHGPT_CACHE", str(tmp_path / "cache"))
    yield
    measured._here.cache_clear()
    kernels.choose.cache_clear()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tiny: None, short_audit: None) -> None:
    """Models of few words and layers, and a short look at how fast the device is."""
    monkeypatch.setitem(clock.PEAK_SIZE, "cpu", 64)
    monkeypatch.setitem(clock.MEMORY_BYTES, "cpu", 2**12)
    monkeypatch.setattr(bench_train, "VOCAB_SIZE", 128)
    monkeypatch.setitem(orchestrator.CFG, "n_layers", 1)


@pytest.mark.usefixtures("own_measurements", "small")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name in VERBS], ids=lambda page: page.name
)
def test_every_command_of_a_page_works(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trained: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    text_files(tmp_path)
    models(tmp_path, trained)
    if page.name != "README.md":  # whose first command makes it
        shutil.copytree(trained.folder, "runs/demo")
    seen = set()
    for command in commands(page):
        program, *argv = shlex.split(command)
        if program == "torchrun":  # tests/train/test_parallel.py starts two processes
            program, *argv = argv[argv.index("-m") + 1 :]
        if program == "flashgpt":
            starts_anew = not {"--resume", "--model.init-from"} & set(argv)
            what = " ".join(argv[:2]) if argv[0] == "bench" else argv[0]
            argv += shlex.split(SHORTER.get(what, "")) if starts_anew else []
            argv += TUNING if "--model.init-from" in argv else []
            assert main(argv) == 0, f"{command}: {capsys.readouterr().err}"
            seen.add(argv[0])
    assert seen == VERBS[page.name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_of_a_known_kind(page: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in commands(page):
        program, *argv = shlex.split(command)
        assert program in ("flashgpt", "make", "pip", "torchrun"), command
        if program == "make":
            assert argv[0] in targets, command


@pytest.mark.parametrize(("page", "name"), [("README.md", "model"), ("docs/attention.md", "same")])
def test_the_code_of_a_page_runs(page: str, name: str) -> None:
    blocks = [body for kind, body in FENCE.findall((ROOT / page).read_text()) if kind == "python"]
    assert blocks
    for block in blocks:
        scope: dict[str, Any] = {}
        exec(compile(block, page, "exec"), scope)
        if name == "model":
            assert scope["model"].cfg.use_flash is False
        else:
            torch.testing.assert_close(scope["out"], scope["same"])


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


def table(page: str, heading: str) -> list[list[str]]:
    """The lines of the first table below a heading, without its head."""
    part = (ROOT / "docs" / page).read_text().split(heading)[1]
    lines = part[part.index("|") :].split("\n\n")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def raw(path: str) -> Any:
    return json.loads((ROOT / "benchmarks" / path).read_text())


def error_of_mean(values: list[float]) -> float:
    return float(statistics.stdev(values) / len(values) ** 0.5)


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
    page = " ".join((ROOT / "docs/performance.md").read_text().split())
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


def test_where_the_milliseconds_go_is_what_the_raw_data_says() -> None:
    rows = [row for row in raw("nanogpt-speed/speed.json")["rows"] if not row["dropout"]]
    parts = [row["profile"]["parts"] for row in rows]
    lines = {
        "ms per step": [f"{statistics.median(row['ms']):.1f}" for row in rows],
        "thousand tokens/s": [f"{row['tokens_per_second'] / 1e3:.0f}" for row in rows],
    }
    lines |= {name: [f"{found[name]:.1f}" for found in parts] for name in PARTS}
    assert table("performance.md", "### What limits it") == [[k, *v] for k, v in lines.items()]
    page = " ".join((ROOT / "docs/performance.md").read_text().split())
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
    readme = " ".join((ROOT / "README.md").read_text().split())
    theirs, own = (f"{row['peak_bytes'] / 2**30:.1f} GiB" for row in rows)
    assert f"takes {ours:.1f} ms and {own} for 65,536 tokens" in readme
    assert f"nanoGPT's {nanogpt:.1f} ms and {theirs}" in readme


def test_what_is_said_of_other_shapes_is_measured() -> None:
    page = " ".join((ROOT / "docs/performance.md").read_text().split())

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
        ratios.append(f"{best['ours'] / best['nanogpt'] - 1:+.0%}")
    assert ratios == ["-10%", "+3%"]
    parts = [row["profile"]["parts"] for row in second]
    shares = [found["products"] / sum(found.values()) for found in parts]
    assert [f"{share:.0%}" for share in (min(shares), max(shares))] == ["74%", "79%"]
    assert [f"{1.2 * share:.0%}" for share in shares[:2]] == ["88%", "92%"]


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
    page = " ".join((ROOT / "docs/performance.md").read_text().split())
    for text in (
        f"ours is {max(plain['ours'], plain['ours-eager']) / peer - 1:.0%} faster than nanoGPT's",
        f"products being {parts['products'] / sum(parts.values()):.0%} of ours",
        f"{half['ours'] / plain['ours']:.1f} times our speed in fp32, and "
        f"{half['ours'] / peer:.1f} times nanoGPT's",
        f"ours is {1 - half['ours'] / half['nanogpt']:.0%} slower: nanoGPT's attention",
    ):
        assert text.replace("%", " %") in page, text


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
    page = " ".join((ROOT / "docs/performance.md").read_text().split())
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
    page = " ".join((ROOT / "docs/performance.md").read_text().split())
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
    page = " ".join((ROOT / "docs/performance.md").read_text().split())
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
    page = " ".join((ROOT / "docs/performance.md").read_text().split())
    assert told.format(*speeds) in page


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
    page = (ROOT / "docs/generation.md").read_text()
    if path.startswith("generate-cpu"):
        ours, *peers = (f"{first[way] / 1e3:.2f}" for way in ("ours", "dynamic", "static"))
        told = f"{ours} s on the EPYC (Hugging Face {peers[0]} and {peers[1]})"
        if path.endswith("intel.json"):
            told = f"{ours} s on the Xeon ({peers[0]} and {peers[1]})"
        assert told in " ".join(page.split())
    else:
        assert f"comes after {first['ours']:.2f} ms (Hugging Face {first['dynamic']:.2f}" in page
        readme = (ROOT / "README.md").read_text()
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target
