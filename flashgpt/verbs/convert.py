"""Takes a GPT-2 from one format to another and proves that it computes the same.

The format of the source is found out: a run, a checkpoint or a Hugging Face GPT-2 folder, nanoGPT's
ckpt.pt, a state dict of the from-scratch lineage, llm.c's .bin. No file's code is ever run. DST is
written whole and proven, or not at all.

examples:
  flashgpt convert path/to/nanogpt/out runs/mine --tokenizer gpt2
  flashgpt convert gpt2_124M.bin runs/gpt2 --tokenizer gpt2
  flashgpt convert model.pth runs/book --n-heads 12 --tokenizer gpt2
  flashgpt convert runs/demo exported --to huggingface
  flashgpt convert runs/mine out-mine --to nanogpt
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from typing_extensions import Doc

from flashgpt.verbs.parse import Flag, Positional, parse


@dataclasses.dataclass(frozen=True)
class Args:
    """Options of `convert`."""

    source: Annotated[
        str, Positional, Doc("a run, a checkpoint, a model's folder or file, or gpt2")
    ]
    out: Annotated[str, Positional, Doc("folder to make")]
    to: Annotated[
        Literal["ours", "huggingface", "nanogpt"],
        Doc("ours = Hugging Face with our note in config.json; huggingface = without it"),
    ] = "ours"
    tokenizer: Annotated[
        str | None, Doc("bytes, gpt2, or a path; the one beside the source when left out")
    ] = None
    n_heads: Annotated[int | None, Doc("heads of a state dict, which does not say it")] = None
    best: Annotated[bool, Flag, Doc("of a run, its best checkpoint instead of the last")] = False


def main(argv: Sequence[str]) -> int:
    """Runs `flashgpt convert`."""
    args = parse(Args, "convert", argv, __doc__)
    from flashgpt.interop.convert import NAMES, check_free, convert, read
    from flashgpt.interop.hub import find
    from flashgpt.train.checkpoint import FOLDER, check, model_folder

    path, out = Path(args.source), Path(args.out)
    check_free(out)
    if not path.exists():
        path = find(args.source) or path
    if args.best or (path / FOLDER).is_dir():
        path = model_folder(path, args.best)
    if (path / "trainer").exists():
        check(path)
    source = read(path, args.n_heads)
    cfg = source.cfg
    dtype = str(source.own["wte.weight"].dtype).removeprefix("torch.")
    print(
        f"{path}: {NAMES[source.format]}, {cfg.n_layers} layers, {cfg.n_heads} heads, "
        f"width {cfg.emb_dim}, context {cfg.context_length:,}, vocabulary {cfg.vocab_size:,}, "
        f"{dtype}",
        flush=True,
    )
    done = convert(source, out, args.to, args.tokenizer)
    for note in done.notes:
        print(f"  {note}")
    print(f"  {done.proof}")
    print(f"ready: {out} ({args.to})")
    return 0
