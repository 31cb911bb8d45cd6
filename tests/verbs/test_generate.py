"""`flashgpt generate`. pytest tests/verbs/test_generate.py"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from flashgpt.attention import kernels
from flashgpt.generation.text import TextGenerator
from flashgpt.runconfig import SampleConfig
from flashgpt.tokenizer import Tokenizer
from flashgpt.train.checkpoint import load

Cli = Callable[..., Any]


def test_it_writes_what_the_model_says(trained: Any, cli: Cli) -> None:
    model, tokenizer = load(trained.folder)
    assert tokenizer is not None
    config = SampleConfig(prompt="the [b]:cat: ", max_new_tokens=60, seed=4, top_p=0.9)
    expected = TextGenerator(model, tokenizer)(config.prompt, config)
    options = ("--prompt", config.prompt, "--max-new-tokens", 60, "--seed", 4, "--top-p", 0.9)
    assert cli("generate", trained.folder, *options).done() == f"{config.prompt}{expected}\n"
    other = cli("generate", trained.folder, *options[:4], "--seed", 5, *options[6:]).done()
    assert other != f"{config.prompt}{expected}\n"


@pytest.mark.parametrize("use_flash", [True, False])
def test_the_switch_changes_the_kernel_and_no_token(
    trained: Any, cli: Cli, use_flash: bool
) -> None:
    greedy = ("generate", trained.folder, "--prompt", "dogs", "--temperature", 0)
    expected = cli(*greedy).done()
    kernels.clear_receipt()
    assert cli(*greedy, "--use-flash", use_flash).done() == expected
    served = {line.split()[0] for line in kernels.receipt()}
    assert ("standard" in served) is not use_flash and len(served) >= 1


def test_a_checkpoint_and_past_context(trained: Any, cli: Cli) -> None:
    first = trained.checkpoints[0]
    stop = cli("generate", first, "--prompt", "x" * 30, "--past-context", "stop", "--top-k", 0)
    assert 30 < len(stop.done()) <= 30 + 3 + 1
    assert cli("generate", first, "--prompt", "x", "--max-new-tokens", 100).done()


def test_nothing_is_printed_for_a_bad_prompt(trained: Any, cli: Cli) -> None:
    ran = cli("generate", trained.folder, "--prompt", "y" * 33)
    assert ran.out == "" and ran.error(1)


def test_a_pipe_gets_valid_utf8(trained: Any) -> None:
    command = [sys.executable, "-m", "flashgpt", "generate", str(trained.folder)]
    more = ["--prompt", "\u00e9\U0001f642", "--temperature", "3", "--top-k", "0", "--seed", "1"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([*command, *more], capture_output=True, check=True, env=environment)
    assert done.stdout.decode("utf-8").startswith("\u00e9\U0001f642")
    assert done.stderr == b""


def _lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_each_text_of_a_file_is_the_one_it_is_alone(tmp_path: Path, trained: Any, cli: Cli) -> None:
    (tmp_path / "prompts.txt").write_bytes("cat\r\n\nthe old dogs \n\u00e9".encode())
    options = ("--max-new-tokens", 20, "--seed", 3, "--temperature", 1.2)
    command = ("generate", trained.folder, "--file", tmp_path / "prompts.txt", *options)
    found = _lines(cli(*command, "--samples", 2, "--jsonl", "--batch", 5).done())
    prompts = ["cat", "the old dogs ", "\u00e9"]
    assert [(x["prompt"], x["sample"]) for x in found] == [(p, s) for p in prompts for s in (0, 1)]
    assert all(set(x) == {"prompt", "sample", "text", "ids", "reason"} for x in found)
    for text in found[::2]:
        alone = cli("generate", trained.folder, "--prompt", text["prompt"], *options).done()
        assert alone == f"{text['prompt']}{text['text']}\n"
        assert text["reason"] in ("eos", "length") and len(text["ids"]) <= 20
    assert found[0]["text"] != found[1]["text"]
    shown = cli(*command, "--samples", 2).done()
    assert shown == "".join(
        f"--- sample {x['sample'] + 1} of 2, ended by {x['reason']}\n{x['prompt']}{x['text']}\n"
        for x in found
    )


def test_prompts_from_standard_input_and_log_probabilities(
    trained: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"cat\ndogs\n")))
    options = ("--file", "-", "--max-new-tokens", 3, "--temperature", 0, "--logprobs", 2)
    found = _lines(cli("generate", trained.folder, *options, "--jsonl").done())
    assert [x["prompt"] for x in found] == ["cat", "dogs"]
    for text in found:
        assert [token["id"] for token in text["logprobs"]] == text["ids"]
        assert "".join(token["token"] for token in text["logprobs"]) == text["text"]
        for token in text["logprobs"]:
            best, second = token["top"]
            assert {k: token[k] for k in best} == best  # greedy
            assert second["logprob"] <= best["logprob"] <= 0


def test_a_text_ends_before_the_first_stop_string(trained: Any, cli: Cli) -> None:
    plain = ("generate", trained.folder, "--prompt", "x", "--top-k", 5, "--temperature", 0.7)
    whole = cli(*plain).done()
    assert len(whole) > 40
    # The model of 12 steps says bytes that are no characters; a stop string is of characters.
    seen = re.findall("[!-~]{2}", whole[8:])
    stops = [seen[2], seen[1], "no such text"]
    more = [part for stop in stops for part in ("--stop", stop)]
    end = 1 + min(whole[1:].find(stop) for stop in stops[:2])
    assert cli(*plain, *more).done() == whole[:end] + "\n"
    (text,) = _lines(cli(*plain, *more, "--jsonl").done())
    assert ("x" + text["text"], text["reason"]) == (whole[:end], "stop")
    by_id = cli(*plain, "--stop-ids", ord(seen[1][0]), "--stop-ids", 0).done()
    assert by_id == whole[: 1 + whole[1:].index(seen[1][0])] + "\n"


@pytest.mark.parametrize(
    ("asked", "status", "message"),
    [
        (["--file", "empty.txt"], 1, "empty.txt must hold at least one prompt, one a line"),
        (["--file", "bytes.txt"], 1, "bytes.txt must be UTF-8 text"),
        (["--file", "missing.txt"], 1, "missing.txt: No such file"),
        (["--file", "long.txt"], 1, "prompt 2: prompt must be at most context_length 32 tokens"),
        (["--file", "long.txt", "--prompt", "a"], 2, "--file must stand without --prompt"),
        (["--prompt", ""], 1, "prompt must hold at least one token"),
        (["--prompt", "caf\udce9"], 1, "got the surrogate U+DCE9 at place 3; give it as UTF-8"),
        pytest.param(
            ["--dtype", "bf16"],
            2,
            "--dtype bf16 needs a GPU, and torch finds none; leave it out",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--samples", "0"], 2, "--samples must be at least 1, got 0"),
        (["--batch", "0"], 2, "--batch must be at least 1, got 0"),
        (["--logprobs", "3"], 2, "--logprobs is written with --jsonl"),
        (["--logprobs", "300", "--jsonl"], 1, "logprobs must be in 0 .. vocab_size 257, got 300"),
        (["--stop-ids", "257"], 1, "stop_ids must be below the tokenizer's vocab_size 257"),
        (["--stop", "\udcff"], 1, "got the surrogate U+DCFF at place 0; give it as UTF-8"),
        (["--stop", ""], 2, "sample.stop must hold texts that are not empty"),
        (["--top-p", "1.5"], 2, "sample.top_p must be in (0, 1], got 1.5"),
        (["--top-p", "0"], 2, "sample.top_p must be in (0, 1], got 0.0"),
        (["--min-p", "nan"], 2, "sample.min_p must be finite, got nan"),
        (["--temperature=-1"], 2, "sample.temperature must not be negative, got -1.0"),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path,
    trained: Any,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    Path("bytes.txt").write_bytes(b"\xff\xfe")
    Path("long.txt").write_text("a\n" + "b" * 33)
    ran = cli("generate", trained.folder, *asked)
    assert message in ran.error(status) and ran.out == ""


@pytest.fixture
def model(trained: Any, tmp_path: Path) -> Path:
    """The tiny run's model as a folder of its own, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(trained.checkpoints[-1], folder, ignore=shutil.ignore_patterns("trainer"))
    return folder


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# What is done to a model's folder, and what must be said of it.
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no model": (shutil.rmtree, "model is no folder; name a run or a GPT-2 folder"),
    "empty": (
        lambda p: [path.unlink() for path in p.iterdir()],
        "model holds neither checkpoints nor config.json",
    ),
    "another architecture": (
        lambda p: _config(p, model_type="llama"),
        "config.json: model_type must be 'gpt2', got 'llama'",
    ),
    "weights cut short": (
        lambda p: _cut(p / "model.safetensors", 5000),
        "model.safetensors cannot be read as safetensors",
    ),
    "weights missing": (
        lambda p: (p / "model.safetensors").unlink(),
        "model.safetensors cannot be read as safetensors",
    ),
    "config cut short": (lambda p: _cut(p / "config.json", 40), "config.json cannot be read"),
    "tokenizer cut short": (
        lambda p: _cut(p / "tokenizer.json", 300),
        "model: tokenizer files must be readable",
    ),
    "tokenizer missing": (
        lambda p: (p / "tokenizer.json").unlink(),
        "model has no tokenizer; put a tokenizer.json beside its weights",
    ),
    "tokenizer of another model": (
        lambda p: Tokenizer.train(["the cat sat on the mat " * 50], 262).save(p),
        "the tokenizer must have ids below the model's vocab_size 257, got 261; it is another "
        "model's: put the right one beside the weights",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_model_that_is_none_is_one_line(model: Path, cli: Cli, case: str) -> None:
    damage, message = DAMAGED[case]
    damage(model)
    ran = cli("generate", model, "--prompt", "x")
    assert message in ran.error(1) and ran.out == ""


def test_a_special_token_past_the_model_is_of_no_use_and_no_harm(
    trained: Any, model: Path, cli: Cli
) -> None:
    path = model / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(path))
    asked = ("--prompt", "x[PAD]", "--temperature", 0)
    assert cli("generate", model, *asked).done() == cli("generate", trained.folder, *asked).done()


def test_best_is_of_a_run(model: Path, cli: Cli) -> None:
    said = cli("generate", model, "--best").error(1)
    assert "model is one model, not a run with a best one; leave --best out" in said
    out = model.parent / "out"
    assert "leave --best out" in cli("convert", model, out, "--best").error(1)
    assert not out.exists()
