"""Logits and greedy tokens beside transformers: the same weights, fp32, on the CPU.

logits   the four shapes of GPT-2 with random weights, biases and gains included, and fewer layers:
         how far our fp32, with the switch on and off, and transformers' own fp32 are from
         transformers in float64. A setting passes where it errs at most twice as much.
greedy   a trained model: so many tokens after the beginnings of so many lines of a text, with the
         switch on and off. A text passes where every token is that of transformers' generate.

Writes greedy.json, prints a line for each shape and setting and, last, one line of JSON; status 1
if one does not pass. A few minutes on two cores. From the root of the checkout:

    flashgpt train --data.source stdlib --model.context-length 256 --train.steps 250 --out runs/greedy
    python -m benchmarks.greedy runs/greedy
"""  # noqa: E501  # a command to copy

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashgpt.attention.measured import device_name
from flashgpt.config import PRESETS, preset
from flashgpt.generation.decode import decode
from flashgpt.measure import peer
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import SampleConfig
from flashgpt.tokenizer import Tokenizer
from flashgpt.train.checkpoint import load, write_json
from flashgpt.train.record import versions

SHAPES = tuple(name for name in PRESETS if name.startswith("gpt2"))
SEED = 20240326
LENGTH = 64  # tokens of a row of the shapes
PROMPT = 24  # most tokens of a line
SETTINGS = {"on": True, "off": False}  # of use_flash
FACTOR = 2.0  # of what transformers' own fp32 errs


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.greedy", description=about)
    add = parser.add_argument
    add("model", type=Path, help="a run, a checkpoint, or a GPT-2 folder with its tokenizer")
    text = Path(argparse.__file__)
    add("--text", type=Path, default=text, help="prompts are lines of it (Python's argparse.py)")
    add("--prompts", type=int, default=20, help="texts (20)")
    add("--tokens", type=int, default=200, help="new tokens of each (200)")
    add("--layers", type=int, default=4, help="of the shapes (4)")
    add("--vocab-size", type=int, default=50257, help="of the shapes (50257)")
    add("--out", type=Path, default=Path(__file__).with_suffix(""), help="folder of the result")
    return parser.parse_args(argv)


@torch.no_grad()
def logits(name: str, layers: int, vocab_size: int) -> dict[str, Any]:
    """How far a shape's logits are from float64."""
    torch.manual_seed(SEED)
    cfg = preset(name, vocab_size=vocab_size, n_layers=layers, drop_rate=0.0)
    own = GPTModel(cfg).eval()
    for parameter in own.parameters():
        parameter += torch.randn_like(parameter) * 0.02
    theirs: Any = peer.with_weights_of(own)
    ids_BT = torch.randint(vocab_size, (2, LENGTH))
    plain_BTV = theirs(ids_BT).logits
    found = {}
    for setting, use_flash in SETTINGS.items():
        own.set_attention(use_flash=use_flash)
        found[setting] = own(ids_BT)
    exact_BTV = theirs.double()(ids_BT).logits

    def error(logits_BTV: Tensor) -> float:
        return (logits_BTV - exact_BTV).abs().max().item()

    theirs_errs, ours_errs = error(plain_BTV), {key: error(value) for key, value in found.items()}
    holds = all(value <= FACTOR * theirs_errs for value in ours_errs.values())
    return {
        "shape": {**cfg.to_dict(), "use_flash": "both"},
        "largest_logit": exact_BTV.abs().max().item(),
        "transformers": theirs_errs,
        "ours": ours_errs,
        "holds": holds,
    }


def prompts(text: Path, count: int, tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of the beginnings of lines, spread over a text."""
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    every = max(1, len(lines) // count)
    return [tokenizer.encode(line)[:PROMPT] for line in lines[::every][:count]]


@torch.no_grad()
def greedy(own: GPTModel, starts: Sequence[list[int]], count: int) -> list[Any]:
    """For each setting and prompt, how many tokens are transformers' from the start."""
    theirs: Any = peer.with_weights_of(own)
    theirs.generation_config.eos_token_id = None  # a text goes on to its last token
    config = SampleConfig(temperature=0, max_new_tokens=count)
    rows: list[dict[str, Any]] = []
    for number, start in enumerate(starts):
        ids = torch.tensor([start])
        whole = theirs.generate(ids, do_sample=False, max_new_tokens=count, pad_token_id=0)
        expected = whole[0, len(start) :].tolist()
        equal = {}
        for setting, use_flash in SETTINGS.items():
            own.set_attention(use_flash=use_flash)
            mine = list(decode(own, start, config, vocab_size=own.cfg.vocab_size))
            same = [a == b for a, b in zip(mine, expected, strict=True)]
            equal[setting] = same.index(False) if False in same else count
        rows.append({"prompt": len(start), "distinct": len(set(expected)), "equal": equal})
        print(f"prompt {number + 1} of {len(starts)}: {equal}, of {count} equal", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Compares, writes greedy.json, prints it."""
    wanted = options(argv)
    model, tokenizer = load(wanted.model)
    if tokenizer is None:
        raise SystemExit(f"{wanted.model} has no tokenizer")
    starts = prompts(wanted.text, wanted.prompts, tokenizer)
    if wanted.tokens + max(map(len, starts)) > model.cfg.context_length:
        raise SystemExit(
            f"--tokens and a prompt must fit the context of {model.cfg.context_length}"
        )
    shapes = {}
    for name in SHAPES:
        shapes[name] = logits(name, wanted.layers, wanted.vocab_size)
        errs = {"transformers": shapes[name]["transformers"], **shapes[name]["ours"]}
        print(name, ", ".join(f"{key} errs {value:.1e}" for key, value in errs.items()), flush=True)
    texts = greedy(model, starts, wanted.tokens)
    equal = [text["equal"][setting] == wanted.tokens for text in texts for setting in SETTINGS]
    claims = {
        "shapes_hold": all(shape["holds"] for shape in shapes.values()),
        "texts_equal": sum(equal),
        "texts": len(equal),
        "distinct_tokens": [text["distinct"] for text in texts],
    }
    import transformers

    record = {
        "environment": {
            "device": device_name("cpu"),
            **versions(),
            "transformers": transformers.__version__,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        },
        "model": model.cfg.to_dict(),
        "tokens": wanted.tokens,
        "logits": shapes,
        "greedy": texts,
        "claims": claims,
    }
    wanted.out.mkdir(parents=True, exist_ok=True)
    write_json(wanted.out / "greedy.json", record)
    print(json.dumps(claims))
    return int(not (claims["shapes_hold"] and all(equal)))


if __name__ == "__main__":
    sys.exit(main())
