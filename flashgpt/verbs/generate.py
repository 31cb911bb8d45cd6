"""Writes text with a model: one text as it comes, or many side by side.

The text that is written is the same alone and beside others: it depends on its prompt, on the seed
and on its number among the samples of its prompt. A stop string ends a text and is not shown.

examples:
  flashgpt generate runs/demo --prompt "def "
  flashgpt generate runs/demo --prompt "import " --temperature 0 --stop ";" --stop "def "
  flashgpt generate path/to/gpt2-folder --prompt "Once" --top-p 0.95 --seed 7 --samples 4
  flashgpt generate gpt2-medium --prompt "Once" --dtype bf16
  flashgpt generate runs/demo --file prompts.txt --samples 2 --jsonl
  flashgpt generate runs/demo --file - --logprobs 5 --jsonl

Each line of --jsonl is an object: prompt, sample (from 0), text, ids (those of the stop string
included), reason (eos, stop, length, context) and with --logprobs for each id the log-probability
that the model gave it before temperature and top-k, top-p, min-p, and the likeliest ids.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typing_extensions import Doc

from flashgpt.cli import UsageError
from flashgpt.runconfig import SampleConfig
from flashgpt.verbs.parse import Flag, OmitPrefix, Positional, Repeatable, parse

if TYPE_CHECKING:
    from flashgpt.generation.text import Text, TextGenerator
    from flashgpt.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Args:
    """Options of `generate`."""

    model: Annotated[
        str, Positional, Doc("a run, a checkpoint, a Hugging Face GPT-2's folder or name")
    ]
    sample: Annotated[SampleConfig, OmitPrefix, Repeatable] = dataclasses.field(
        default_factory=SampleConfig
    )
    file: Annotated[
        str | None, Doc("prompts, one a line, in place of --prompt; - = standard input")
    ] = None
    samples: Annotated[int, Doc("texts for each prompt (count)")] = 1
    batch: Annotated[int, Doc("texts written side by side (count); changes speed and memory")] = 16
    jsonl: Annotated[bool, Flag, Doc("print one JSON object for each text")] = False
    logprobs: Annotated[
        int | None, Doc("with --jsonl: log-probabilities, also of so many likeliest (count)")
    ] = None
    best: Annotated[bool, Flag, Doc("of a run, its best checkpoint instead of the last")] = False
    use_flash: Annotated[bool | None, Doc("the switch; the model's own when left out")] = None
    dtype: Annotated[
        Literal["fp32", "bf16"], Doc("of the weights; bf16: on a GPU, with half the bytes to read")
    ] = "fp32"


def main(argv: Sequence[str]) -> int:
    """Runs `flashgpt generate`."""
    args = parse(Args, "generate", argv, __doc__)
    for name in ("samples", "batch"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.logprobs is not None and not args.jsonl:
        raise UsageError("--logprobs is written with --jsonl; add it")
    prompts = _prompts(args)
    import torch

    from flashgpt.generation.text import TextGenerator
    from flashgpt.train.checkpoint import load
    from flashgpt.train.runtime import device

    here = device("auto")
    if args.dtype == "bf16" and here.type == "cpu":
        raise UsageError("--dtype bf16 needs a GPU, and torch finds none; leave it out")
    model, tokenizer = load(args.model, best=args.best)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer; put a tokenizer.json beside its weights")
    if args.use_flash is not None:
        model.set_attention(use_flash=args.use_flash)
    model.to(here, torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    generator = TextGenerator(model, tokenizer)
    if len(prompts) == args.samples == 1 and not args.jsonl:
        _stream(generator, prompts[0], args.sample)
        return 0
    for text in generator.texts(
        prompts, args.sample, samples=args.samples, logprobs=args.logprobs, batch=args.batch
    ):
        if args.jsonl:
            print(json.dumps(_as_object(text, tokenizer, args.logprobs is not None)), flush=True)
        else:
            print(f"--- sample {text.sample + 1} of {args.samples}, ended by {text.reason}")
            print(text.prompt + text.text, flush=True)
    return 0


def _prompts(args: Args) -> list[str]:
    """What is to be continued; blank lines of a file are passed over.

    Raises:
        UsageError: both --prompt and --file.
        ValueError: a file without prompts, or not of UTF-8 text.
        OSError: it cannot be read.
    """
    if args.file is None:
        return [args.sample.prompt]
    if args.sample.prompt != SampleConfig.prompt:
        raise UsageError("--file must stand without --prompt; leave one of them out")
    name = "standard input" if args.file == "-" else args.file
    try:
        whole = sys.stdin.buffer.read() if args.file == "-" else Path(args.file).read_bytes()
        lines = whole.decode("utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be UTF-8 text: {error}") from error
    if not (prompts := [line for line in lines if line.strip()]):
        raise ValueError(f"{name} must hold at least one prompt, one a line, got none")
    return prompts


def _stream(generator: TextGenerator, prompt: str, config: SampleConfig) -> None:
    """Shows a single text as it comes."""
    stream = generator.stream(prompt, config)
    first = next(stream, "")  # a bad prompt is refused before anything is printed
    print(prompt, end=first, flush=True)
    for piece in stream:
        print(piece, end="", flush=True)
    print()


def _as_object(text: Text, tokenizer: Tokenizer, logprobs: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "prompt": text.prompt,
        "sample": text.sample,
        "text": text.text,
        "ids": text.ids,
        "reason": text.reason,
    }
    if logprobs:
        found["logprobs"] = [
            {
                **_token(token.id, token.logprob, tokenizer),
                "top": [_token(id_, value, tokenizer) for id_, value in token.top],
            }
            for token in text.tokens
        ]
    return found


def _token(id_: int, logprob: float | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """An id, what it stands for (U+FFFD where that is no whole character), its probability."""
    return {"id": id_, "token": tokenizer.decode([id_]), "logprob": logprob}
