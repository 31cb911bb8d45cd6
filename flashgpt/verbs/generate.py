"""Writes text with a model, streamed as it comes.

examples:
  flashgpt generate runs/demo --prompt "def "
  flashgpt generate runs/demo --prompt "import " --temperature 0 --max-new-tokens 50
  flashgpt generate path/to/gpt2-folder --prompt "Once" --top-p 0.95 --seed 7
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from typing_extensions import Doc

from flashgpt.runconfig import SampleConfig
from flashgpt.verbs.parse import Flag, OmitPrefix, Positional, parse


@dataclasses.dataclass(frozen=True)
class Args:
    """Options of `generate`."""

    model: Annotated[str, Positional, Doc("a run, a checkpoint, or a Hugging Face GPT-2 folder")]
    sample: Annotated[SampleConfig, OmitPrefix] = dataclasses.field(default_factory=SampleConfig)
    best: Annotated[bool, Flag, Doc("of a run, its best checkpoint instead of the last")] = False
    use_flash: Annotated[bool | None, Doc("the switch; the model's own when left out")] = None


def main(argv: Sequence[str]) -> int:
    """Runs `flashgpt generate`."""
    args = parse(Args, "generate", argv, __doc__)
    from flashgpt.generation.text import TextGenerator
    from flashgpt.train.checkpoint import load
    from flashgpt.train.runtime import device

    model, tokenizer = load(args.model, best=args.best)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer; put a tokenizer.json beside its weights")
    if args.use_flash is not None:
        model.set_attention(use_flash=args.use_flash)
    generator = TextGenerator(model.to(device("auto")), tokenizer)
    stream = generator.stream(args.sample.prompt, args.sample)
    first = next(stream, "")  # a bad prompt is refused before anything is printed
    print(args.sample.prompt, end=first, flush=True)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    return 0
