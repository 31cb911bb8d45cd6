"""Name tables between our parameters and those of other GPT-2 formats; the inverse is derived.

A table has one row per kind of parameter: our name, their name (`{i}` is the layer), and whether
the matrix is transposed there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of parameter."""

    ours: str
    theirs: str
    transposed: bool = False


# Hugging Face's GPT-2 keeps [in, out] matrices in its Conv1D layers.
HUGGINGFACE = (
    Row("wte.weight", "transformer.wte.weight"),
    Row("wpe.weight", "transformer.wpe.weight"),
    Row("h.{i}.ln_1.weight", "transformer.h.{i}.ln_1.weight"),
    Row("h.{i}.ln_1.bias", "transformer.h.{i}.ln_1.bias"),
    Row("h.{i}.attn.c_attn.weight", "transformer.h.{i}.attn.c_attn.weight", transposed=True),
    Row("h.{i}.attn.c_attn.bias", "transformer.h.{i}.attn.c_attn.bias"),
    Row("h.{i}.attn.c_proj.weight", "transformer.h.{i}.attn.c_proj.weight", transposed=True),
    Row("h.{i}.attn.c_proj.bias", "transformer.h.{i}.attn.c_proj.bias"),
    Row("h.{i}.ln_2.weight", "transformer.h.{i}.ln_2.weight"),
    Row("h.{i}.ln_2.bias", "transformer.h.{i}.ln_2.bias"),
    Row("h.{i}.mlp.c_fc.weight", "transformer.h.{i}.mlp.c_fc.weight", transposed=True),
    Row("h.{i}.mlp.c_fc.bias", "transformer.h.{i}.mlp.c_fc.bias"),
    Row("h.{i}.mlp.c_proj.weight", "transformer.h.{i}.mlp.c_proj.weight", transposed=True),
    Row("h.{i}.mlp.c_proj.bias", "transformer.h.{i}.mlp.c_proj.bias"),
    Row("ln_f.weight", "transformer.ln_f.weight"),
    Row("ln_f.bias", "transformer.ln_f.bias"),
    Row("lm_head.weight", "lm_head.weight"),
)


def rows(table: tuple[Row, ...], n_layers: int) -> Iterator[Row]:
    """The rows of a model with `n_layers` layers, names filled in."""
    for row in table:
        if "{i}" not in row.ours:
            yield row
            continue
        for i in range(n_layers):
            yield Row(row.ours.format(i=i), row.theirs.format(i=i), row.transposed)
