"""Every command in the docs works, and every link points somewhere.

pytest tests/docs/test_commands.py
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flashgpt import orchestrator
from flashgpt.attention import kernels, measured
from flashgpt.cli import main
from flashgpt.measure import clock
from flashgpt.verbs import bench_train
from tests.docs.pages import FENCE, PAGES, ROOT
from tests.interop import stand_ins

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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target
