"""The command itself: status, one line for what is wrong, help without torch.

pytest tests/test_cli.py
"""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashgpt import __version__, cli
from flashgpt.data import writer
from flashgpt.toml import load_toml
from flashgpt.train.incident import Incident
from flashgpt.verbs import info
from flashgpt.verbs.bench import SUBJECTS
from flashgpt.verbs.parse import parse

Cli = Callable[..., Any]
VERBS = sorted(cli.VERBS)


def _process(*arguments: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-m", "flashgpt"] if code is None else ["-c", code]
    command = [sys.executable, *start, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_overview(cli: Cli) -> None:
    shown = cli("--help").done()
    assert all(re.search(rf"^  {verb} ", shown, re.MULTILINE) for verb in VERBS)
    assert cli("-h").done() == cli("help").done() == shown
    empty = cli()
    assert (empty.status, empty.out) == (2, shown)
    assert cli("--version").done() == f"flashgpt {__version__}\n"


def test_help_is_quick_and_does_not_import_torch() -> None:
    code = (
        "import sys; from flashgpt.cli import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as end: status = end.code\n"
        "print('SLOW', {'torch', 'matplotlib', 'transformers'} & sys.modules.keys(), status)"
    )
    for arguments in (("--help",), ("train", "--help"), ("demo", "-h"), ("train", "--steps", "1")):
        done = _process(*arguments, code=code)
        status = 2 if "--steps" in arguments else 0
        assert done.stdout.endswith(f"SLOW set() {status}\n"), (arguments, done)


# Verbs, and the subjects of `bench`, which have options of their own.
MODULES = [*VERBS, *(f"bench_{subject}" for subject in SUBJECTS)]


@pytest.mark.parametrize("verb", MODULES)
def test_help_of_a_verb_shows_its_examples(cli: Cli, verb: str) -> None:
    shown = cli(*verb.split("_"), "--help").done()
    module = importlib.import_module(f"flashgpt.verbs.{verb}")
    examples = _examples(module)
    assert examples
    flat = " ".join(shown.split())
    for example in examples:
        assert example in shown, example
    assert " ".join((module.__doc__ or "").split("\n\n")[0].split()) in flat
    assert cli(*verb.split("_"), "-h").status == 0


def _examples(module: Any) -> list[str]:
    return re.findall(r"^  (flashgpt .*)$", module.__doc__ or "", re.MULTILINE)


ALL_EXAMPLES = [
    example
    for verb in MODULES
    for example in _examples(importlib.import_module(f"flashgpt.verbs.{verb}"))
]
OVERVIEW = [
    line.strip().split("   ")[0] for line in cli._overview().split("first steps:")[1].splitlines()
]


@pytest.mark.parametrize("example", [*ALL_EXAMPLES, *filter(None, OVERVIEW)])
def test_examples_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Any, example: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    config = (trained.folder / "config.toml").read_text()
    (tmp_path / "runs" / "mine" / "config.toml").write_text(config)
    config = SimpleNamespace(config=load_toml(trained.folder / "config.toml"))
    monkeypatch.setattr(Incident, "load", lambda _: config)
    program, verb, *arguments = shlex.split(example)
    assert program == "flashgpt"
    name = f"bench_{arguments.pop(0)}" if verb == "bench" else verb
    module = importlib.import_module(f"flashgpt.verbs.{name}")
    if verb in ("train", "plan"):
        module.read(arguments)
    else:
        parse(module.Args, verb, arguments, module.__doc__)


# What is typed, the exit status, and what its one line must say.
WRONG: list[tuple[str, int, list[str]]] = [
    ("frobnicate", 2, ["unknown verb 'frobnicate'", "verbs are demo"]),
    ("trian", 2, ["unknown verb 'trian'", "did you mean 'train'"]),
    ("train --train.stepz 3", 2, ["no option --train.stepz", "did you mean --train.steps?"]),
    ("train --train.stepz=3", 2, ["no option --train.stepz;", "did you mean --train.steps?"]),
    ("train --qqq", 2, ["no option --qqq", "see flashgpt train --help"]),
    ("generate RUN --tempperature 1", 2, ["did you mean --temperature?"]),
    ("generate RUN -p x", 2, ["-p", "flashgpt generate --help"]),
    ("train --train.steps x", 2, ["--train.steps", "'x'"]),
    ("train --train.steps 0", 2, ["train.steps must be at least 1, got 0"]),
    ("train --train.steps", 2, ["--train.steps", "Missing value"]),
    ("train --model.use-flash maybe", 2, ["--model.use-flash", "'maybe'"]),
    ("train --model.preset gtp2", 2, ["model.preset must be one of tiny, gpt2", "'gtp2'"]),
    ("train --train.optimizer adam", 2, ["--train.optimizer", "'adam'"]),
    ("train --model.emb-dim 30 --model.n-heads 4", 2, ["emb_dim 30", "n_heads 4"]),
    ("train --train.tokens-per-step 100", 2, ["multiple of model.context_length (128), got 100"]),
    ("train --train.micro-batch 3", 2, ["divide the 32 sequences of a step, got 3"]),
    ("train --resume yes", 2, ["yes"]),
    ("train nosuch.toml", 2, ["nosuch.toml cannot be read: No such file"]),
    ("train TEXT", 2, ["TEXT is no TOML file", "text goes behind --data.source TEXT"]),
    ("train . --out x", 2, [". is no TOML file"]),
    ("train --data.source nosuch.txt", 1, ["'nosuch.txt'"]),
    ("train --data.source EMPTY", 1, ["empty file EMPTY"]),
    ("train --data.source BINARY", 1, ["must be UTF-8 text", "BINARY"]),
    ("train --data.source TEXT --data.tokenizer nosuch", 1, ["tokenizer must be", "'nosuch'"]),
    ("train --data.source SHORT --data.tokenizer bytes", 1, ["at least 129 tokens", "got 96"]),
    ("train --data.source TEXT --data.tokenizer bytes --out TEXT", 1, ["TEXT is a file; choose"]),
    ("train --data.source TEXT --data.tokenizer bytes --out RUN", 1, ["RUN holds checkpoints"]),
    ("prepare", 2, ["data.source must name at least one file"]),
    ("prepare TEXT --vocab-size 3", 2, ["data.vocab_size must be at least 257", "got 3"]),
    ("prepare TEXT --tokenizer bytes --out RUN", 1, ["out must be a new folder", "RUN"]),
    ("generate", 2, ["a run, a checkpoint"]),
    ("generate nosuch", 1, ["nosuch is no folder"]),
    ("generate TEXT", 1, ["TEXT is no folder"]),
    ("generate RUN --prompt ''", 1, ["prompt must hold at least one token"]),
    (f"generate RUN --prompt {'x' * 33}", 1, ["at most context_length 32 tokens, got 33"]),
    ("generate RUN --temperature -1", 2, ["temperature must not be negative, got -1"]),
    ("generate RUN --top-p 2", 2, ["top_p must be in (0, 1], got 2"]),
    ("generate RUN --max-new-tokens 0", 2, ["max_new_tokens must be at least 1, got 0"]),
    ("evaluate nosuch", 1, ["nosuch is no folder"]),
    ("evaluate RUN --sauce x", 2, ["no option --sauce", "did you mean --source?"]),
    (
        "evaluate RUN/checkpoints/step_00000004",
        1,
        ["has no config.toml to say", "name text with --source"],
    ),
    ("verify --checkpoint nosuch", 1, ["nosuch is no folder"]),
    ("info nosuch", 1, ["nosuch is no run with a checkpoint"]),
    ("info RUN extra", 2, ["extra"]),
    ("demo nosuch.txt", 1, ["'nosuch.txt'"]),
    ("demo --seconds nan", 2, ["--seconds must be positive, got nan"]),
    ("demo --seconds 0", 2, ["--seconds must be positive"]),
    ("demo --source x", 2, ["--source"]),
]


@pytest.fixture
def places(
    tmp_path: Path, text: Path, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """What the words in capitals stand for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"ab\0c")
    (tmp_path / "short.txt").write_text("ten chars." * 10)
    names = {name.upper(): f"{name}.txt" for name in ("empty", "binary", "short")}
    return {**names, "TEXT": str(text), "RUN": str(trained.folder)}


def _filled(words: str, places: dict[str, str]) -> str:
    return re.sub("|".join(places), lambda match: places[match[0]], words)


@pytest.mark.parametrize(("words", "status", "says"), WRONG, ids=[w[0][:60] for w in WRONG])
def test_what_is_wrong_is_said_in_one_line(
    cli: Cli, places: dict[str, str], words: str, status: int, says: list[str]
) -> None:
    arguments = [_filled(word, places) for word in shlex.split(words)]
    line = cli(*arguments).error(status)
    for part in says:
        assert _filled(part, places) in line, line
    assert len(line) < 400 and "Errno" not in line
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "words", ["train --train.stepz 3", "train --train.steps x", "generate nosuch"]
)
def test_debug_shows_where_it_happened(words: str) -> None:
    """In a process, as a person types it; and without --debug the same line as in here."""
    plain = _process(*words.split())
    assert plain.stderr.startswith("flashgpt: ") and plain.stderr.count("\n") == 1, plain.stderr
    debug = _process(*words.split(), "--debug")
    assert "Traceback" in debug.stderr and debug.returncode == 1
    assert plain.returncode == (1 if words.startswith("generate") else 2)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_the_line_does_not_depend_on_the_terminal(encoding: str) -> None:
    code = "import sys; from flashgpt.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", "--train.steps", "x"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "40", "FORCE_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stderr == (
        "flashgpt: Error parsing --train.steps: invalid literal for int() with base 10: 'x'; "
        "see flashgpt train --help\n"
    )
    assert (done.returncode, done.stdout) == (2, "")


def test_a_torch_that_is_too_old_or_missing_is_named(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = importlib.metadata
    monkeypatch.setattr(metadata, "version", lambda name: "2.8.1+cu126")
    assert "torch must be 2.9 or newer, got 2.8.1+cu126" in cli("info").error(1)

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert "torch is not installed" in cli("info").error(1)


@pytest.mark.parametrize("verb", VERBS)
def test_compiled_code_goes_into_the_users_cache(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch looks at the variable, before its compiler is imported; nothing is made yet."""
    ran = []
    module = SimpleNamespace(main=lambda argv: ran.append(argv) or 0)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)

    def place() -> str | None:
        assert cli.main([verb]) == 0 and ran.pop() == []
        return os.environ.get("TORCHINDUCTOR_CACHE_DIR")

    monkeypatch.setenv("FLASHGPT_CACHE", str(tmp_path / "new"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    compiles = verb in ("demo", "plan", "train", "verify")
    assert place() == (str(tmp_path / "new" / "compile") if compiles else None)
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    assert place() == "mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr(cli.os, "access", lambda *_: False)  # root may write anywhere
    assert place() is None


@pytest.mark.skipif(os.name != "posix", reason="of POSIX permissions")
@pytest.mark.parametrize(("mode", "used"), [(0o755, True), (0o1777, True), (0o777, False)])
def test_code_is_not_kept_where_everyone_may_write(
    mode: int, used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.importlib, "import_module", lambda _: SimpleNamespace(main=lambda _: 0))
    monkeypatch.setenv("FLASHGPT_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    tmp_path.chmod(mode)
    assert cli.main(["train"]) == 0
    assert ("TORCHINDUCTOR_CACHE_DIR" in os.environ) is used


def test_without_a_writable_cache_torch_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASHGPT_CACHE", str(tmp_path / "file"))
    cli._keep_compiled_code()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cli.usercache, "folder", homeless)
    cli._keep_compiled_code()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_an_error_without_words_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(argv: object) -> int:
        raise RuntimeError

    monkeypatch.setattr(info, "main", fails)
    assert cli("info").error(1) == "flashgpt: RuntimeError\n"


def test_a_fault_of_our_own_keeps_its_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(argv: object) -> int:
        raise AssertionError("a bug")

    monkeypatch.setattr(info, "main", fails)
    with pytest.raises(AssertionError, match="a bug"):
        cli("info")


def test_ctrl_c_is_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(argv: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "main", interrupted)
    ran = cli("info")
    assert (ran.status, ran.err) == (130, "\nflashgpt: interrupted\n")


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m flashgpt train --print-config | head -c 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False
    )
    assert done.stdout == "[" and done.stderr == ""


@pytest.mark.parametrize("name", ["train-00000.bin", "val-00000.bin", "tokenizer.json"])
def test_a_damaged_token_file(
    cli: Cli, places: dict[str, str], options: list[str], flip: Callable[..., None], name: str
) -> None:
    cli("prepare", places["TEXT"], "--tokenizer", "bytes", "--out", "tokens").done()
    flip(Path("tokens") / name, 1030)
    line = cli("train", *options, "--data.source", "tokens", "--out", "run").error(1)
    assert f"tokens/{name} is damaged or missing; run flashgpt prepare again" in line
    assert not Path("run").exists()


def test_no_space_left_while_preparing(
    cli: Cli, places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer.np, "save", full)
    line = cli("prepare", places["TEXT"], "--tokenizer", "bytes", "--out", "tokens").error(1)
    assert "cannot be written to tokens: No space left on device" in line
    assert not Path("tokens").exists() and not Path(".tokens.tmp").exists()


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can read everything"
)
def test_an_unreadable_folder(cli: Cli, places: dict[str, str]) -> None:
    Path("locked").mkdir(mode=0)
    assert "locked cannot be read" in cli("prepare", "locked").error(1)
    assert "locked" in cli("train", "--data.source", places["TEXT"], "--out", "locked/x").error(1)


def test_the_command_is_installed_under_its_name() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"flashgpt": "flashgpt.cli:main"}
