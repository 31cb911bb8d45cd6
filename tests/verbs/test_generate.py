"""`flashgpt generate`. pytest tests/verbs/test_generate.py"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from flashgpt.attention import kernels
from flashgpt.generation.text import TextGenerator
from flashgpt.runconfig import SampleConfig
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
