"""Name tables between our parameters and those of other GPT-2 formats; the inverse is derived.

A table has one row per kind of parameter: our name, their name (`{i}` is the layer), whether the
matrix is transposed there, and which of theirs, one below the other, make one of ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from flashgpt.config import GPTConfig
from flashgpt.model.gpt2 import GPTModel


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of parameter.

    Attributes:
        theirs: their name, or the names of equally large parts that ours is the stack of.
    """

    ours: str
    theirs: str | tuple[str, ...]
    transposed: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """Their names, one where ours is one of theirs."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


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

# nanoGPT has Hugging Face's names, and [out, in] matrices in its Linear layers.
NANOGPT = tuple(Row(row.ours, row.theirs) for row in HUGGINGFACE)

_ATT = "trf_blocks.{i}.att."
_QKV = ("W_query", "W_key", "W_value")
# The model of the book "Build a Large Language Model (From Scratch)" and what descends from it.
FROM_SCRATCH = (
    Row("wte.weight", "tok_emb.weight"),
    Row("wpe.weight", "pos_emb.weight"),
    Row("h.{i}.ln_1.weight", "trf_blocks.{i}.norm1.scale"),
    Row("h.{i}.ln_1.bias", "trf_blocks.{i}.norm1.shift"),
    Row("h.{i}.attn.c_attn.weight", tuple(f"{_ATT}{name}.weight" for name in _QKV)),
    Row("h.{i}.attn.c_attn.bias", tuple(f"{_ATT}{name}.bias" for name in _QKV)),
    Row("h.{i}.attn.c_proj.weight", _ATT + "out_proj.weight"),
    Row("h.{i}.attn.c_proj.bias", _ATT + "out_proj.bias"),
    Row("h.{i}.ln_2.weight", "trf_blocks.{i}.norm2.scale"),
    Row("h.{i}.ln_2.bias", "trf_blocks.{i}.norm2.shift"),
    Row("h.{i}.mlp.c_fc.weight", "trf_blocks.{i}.ff.layers.0.weight"),
    Row("h.{i}.mlp.c_fc.bias", "trf_blocks.{i}.ff.layers.0.bias"),
    Row("h.{i}.mlp.c_proj.weight", "trf_blocks.{i}.ff.layers.2.weight"),
    Row("h.{i}.mlp.c_proj.bias", "trf_blocks.{i}.ff.layers.2.bias"),
    Row("ln_f.weight", "final_norm.scale"),
    Row("ln_f.bias", "final_norm.shift"),
    Row("lm_head.weight", "out_head.weight"),
)

# llm.c's file has no names; these are its own variables. The order of rows is that of the file, in
# which each kind of parameter stands for all layers before the next kind comes.
LLMC = (
    Row("wte.weight", "wte"),
    Row("wpe.weight", "wpe"),
    Row("h.{i}.ln_1.weight", "ln1w.{i}"),
    Row("h.{i}.ln_1.bias", "ln1b.{i}"),
    Row("h.{i}.attn.c_attn.weight", "qkvw.{i}"),
    Row("h.{i}.attn.c_attn.bias", "qkvb.{i}"),
    Row("h.{i}.attn.c_proj.weight", "attprojw.{i}"),
    Row("h.{i}.attn.c_proj.bias", "attprojb.{i}"),
    Row("h.{i}.ln_2.weight", "ln2w.{i}"),
    Row("h.{i}.ln_2.bias", "ln2b.{i}"),
    Row("h.{i}.mlp.c_fc.weight", "fcw.{i}"),
    Row("h.{i}.mlp.c_fc.bias", "fcb.{i}"),
    Row("h.{i}.mlp.c_proj.weight", "fcprojw.{i}"),
    Row("h.{i}.mlp.c_proj.bias", "fcprojb.{i}"),
    Row("ln_f.weight", "lnfw"),
    Row("ln_f.bias", "lnfb"),
)


def rows(table: tuple[Row, ...], n_layers: int) -> Iterator[Row]:
    """The rows of a model with `n_layers` layers, names filled in."""
    for row in table:
        if "{i}" not in row.ours:
            yield row
            continue
        for i in range(n_layers):
            theirs: str | tuple[str, ...]
            if isinstance(row.theirs, str):
                theirs = row.theirs.format(i=i)
            else:
                theirs = tuple(name.format(i=i) for name in row.theirs)
            yield Row(row.ours.format(i=i), theirs, row.transposed)


def shapes(cfg: GPTConfig) -> dict[str, torch.Size]:
    """Shape of each of our parameters; without lm_head.weight where it is tied."""
    with torch.device("meta"):
        state = GPTModel(cfg).state_dict()
    if cfg.tie_weights:
        del state["lm_head.weight"]
    return {name: tensor.shape for name, tensor in state.items()}


def to_ours(
    found: Iterable[Row],
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, torch.Size],
    origin: str,
    *,
    unused: Callable[[str], bool] = lambda name: False,
) -> dict[str, Tensor]:
    """Their tensors by our names, views where possible.

    Args:
        found: rows of the parameters that are there.
        wanted: `shapes` of the model.
        origin: what an error names.
        unused: whether a tensor of this name is no parameter, or not a separate one.

    Raises:
        ValueError: a tensor is missing, of another shape, or not known.
    """
    left = dict(tensors)
    own = {}
    for row in found:
        first, *rest = wanted[row.ours]
        shape = [first // len(row.parts), *rest]
        pieces = []
        for name in row.parts:
            if name not in left:
                raise ValueError(f"{origin} lacks the tensor {name!r}")
            tensor = left.pop(name)
            if list(tensor.shape) != (shape[::-1] if row.transposed else shape):
                raise ValueError(
                    f"{origin}: {name!r} must have the shape {shape}"
                    f"{' transposed' if row.transposed else ''}, got {list(tensor.shape)}"
                )
            pieces.append(tensor.T if row.transposed else tensor)
        own[row.ours] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if strangers := [name for name in left if not unused(name)]:
        raise ValueError(f"{origin} has a tensor that GPT-2 does not know: {strangers[0]!r}")
    return own


def to_theirs(found: Iterable[Row], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_ours`."""
    theirs = {}
    for row in found:
        for name, piece in zip(row.parts, own[row.ours].chunk(len(row.parts)), strict=True):
            theirs[name] = (piece.T if row.transposed else piece).contiguous()
    return theirs
