"""Turns text into token files, and trains a tokenizer on it where none is named.

`flashgpt train` does this by itself; do it apart to choose the folder, or to look at the result.
Ended before it is done (Ctrl-C, kill), the same command goes on where it was.

examples:
  flashgpt prepare my.txt --out data/mine
  flashgpt prepare books/ "notes/**/*.md" --vocab-size 16384 --out data/texts
  flashgpt prepare my.txt --tokenizer bytes --out data/bytes
  flashgpt prepare train.bin --tokenizer gpt2 --out data/tokens
  flashgpt prepare posts.jsonl --field body --out data/posts
  flashgpt prepare "web/*.parquet" --tokenizer gpt2 --out data/web
  flashgpt prepare hf://owner/name --out data/name
  flashgpt train --data.source data/mine
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from typing_extensions import Doc

from flashgpt.runconfig import DataConfig
from flashgpt.verbs.parse import Positional, parse, typed, usage


@dataclasses.dataclass(frozen=True)
class Args:
    """Options of `prepare`."""

    source: Annotated[
        tuple[str, ...],
        Positional,
        Doc("text, .jsonl, .parquet or .bin files; folders, globs; hf://OWNER/NAME; stdlib"),
    ]
    out: Annotated[str | None, Doc("folder to make; named by content in ./data when left out")] = (
        None
    )
    tokenizer: Annotated[str, Doc("bpe (trained on the source), bytes, gpt2, or a path")] = "bpe"
    vocab_size: Annotated[int, Doc("size of a tokenizer that is trained (token ids)")] = 8192
    field: Annotated[
        str,
        Doc("field of .jsonl and .parquet records that is the text; else prompt and completion"),
    ] = "text"


def main(argv: Sequence[str]) -> int:
    """Runs `flashgpt prepare`."""
    args = parse(Args, "prepare", argv, __doc__)
    with usage():
        config = DataConfig(args.source, args.tokenizer, args.vocab_size, field=args.field)
    from flashgpt.data.prepare import prepare
    from flashgpt.data.shards import TokenData
    from flashgpt.verbs.console import console, counting

    out = console()
    with counting(out) as progress:
        folder = prepare(config, out=Path(args.out) if args.out else None, progress=progress)
    out.print(TokenData.open(folder).describe())
    out.print(f"ready: {folder}; train on it: flashgpt train --data.source {typed(folder)}")
    return 0
