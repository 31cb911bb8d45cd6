"""Loss, perplexity and bits per byte of a model on text that it was not trained on.

Every token is predicted once, in windows of the context length that advance by it, or by --stride
tokens: then each token has at least context length - stride others before it, as far as there are
any, and the work grows by context length / stride. The first token of the text is not predicted.
Bits per byte counts the UTF-8 bytes of the predicted tokens.

examples:
  flashgpt evaluate runs/demo
  flashgpt evaluate runs/demo --source my.txt
  flashgpt evaluate runs/demo --stride 32
  flashgpt evaluate runs/demo --best --json
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from typing_extensions import Doc

from flashgpt.cli import UsageError
from flashgpt.verbs.parse import Flag, Positional, parse


@dataclasses.dataclass(frozen=True)
class Args:
    """Options of `evaluate`."""

    model: Annotated[str, Positional, Doc("a run, a checkpoint, or a Hugging Face GPT-2 folder")]
    source: Annotated[
        tuple[str, ...], Doc("text to evaluate on; the run's own validation text when left out")
    ] = ()
    field: Annotated[
        str | None, Doc("field of .jsonl and .parquet records that is the text; text if left out")
    ] = None
    stride: Annotated[
        int | None, Doc("by how much windows advance (tokens); context_length if left out")
    ] = None
    best: Annotated[bool, Flag, Doc("of a run, its best checkpoint instead of the last")] = False
    json: Annotated[bool, Flag, Doc("print one JSON object")] = False


def main(argv: Sequence[str]) -> int:
    """Runs `flashgpt evaluate`."""
    args = parse(Args, "evaluate", argv, __doc__)
    if args.field is not None and not args.source:
        raise UsageError("--field is for records of --source (.jsonl, .parquet); leave it out")
    import tempfile

    from flashgpt.data.prepare import prepare
    from flashgpt.data.shards import TokenData
    from flashgpt.runconfig import DataConfig
    from flashgpt.toml import load_toml
    from flashgpt.train.checkpoint import load
    from flashgpt.train.evaluate import evaluate, together
    from flashgpt.train.runtime import device

    model, tokenizer = load(args.model, best=args.best)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer; put a tokenizer.json beside its weights")
    model.to(device("auto"))
    with tempfile.TemporaryDirectory() as scratch:
        if args.source:
            tokenizer.save(Path(scratch))
            config = DataConfig(
                args.source, scratch, cache=scratch, field=args.field or DataConfig.field
            )
        else:
            path = Path(args.model) / "config.toml"
            if not path.exists():
                raise ValueError(
                    f"{args.model} has no config.toml to say what text it was trained on; name "
                    "text with --source"
                )
            config = load_toml(path).data
        data = TokenData.open(prepare(config))
        if data.tokenizer.digest != tokenizer.digest:
            raise ValueError(
                f"{args.model} was trained with another tokenizer than {config.source}"
            )
        splits = [data.train, data.val] if args.source else [data.val]
        lengths = tokenizer.byte_lengths
        found = together([evaluate(model, part, lengths, stride=args.stride) for part in splits])
    if args.json:
        print(json.dumps({**dataclasses.asdict(found), "perplexity": found.perplexity}))
    else:
        print(
            f"loss {found.loss:.4f} nats per token, perplexity {found.perplexity:,.2f}, "
            f"{found.bits_per_byte:.4f} bits per byte ({found.tokens:,} tokens, "
            f"{found.bytes:,} bytes)"
        )
    return 0
