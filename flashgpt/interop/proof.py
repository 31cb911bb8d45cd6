"""The proof of a conversion: the same weights, bit for bit, and the same logits.

The logits of the source come from `flashgpt.interop.reference`, which reads the source's own
tensors by their own names. Against it stand our model, as loaded from what was written, and the
reference on the written tensors by the names of that format.

The rule is derived from the model at hand. In float32 a forward pass rounds after every operation,
and the errors add up over the depth and are scaled by the weights; how far that goes is measured:
it is the reference's own error in float32 against itself in float64. Another order of the same
operations may err a few times as much; a wrong name, a transposed matrix, another GELU or a head
that is not the right one is orders of magnitude above.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from flashgpt.interop.foreign import Foreign
from flashgpt.interop.reference import Reference

PROMPTS, LENGTH, SEED = 4, 64, 20240326
FACTOR = 4.0  # errors allowed, in errors of plain float32
BAND = 2.0**-23  # one rounding of the largest logit, relative
ERF = {"nanogpt": True, "from-scratch": False, "llm.c": False}  # and as config.json says


@dataclasses.dataclass(frozen=True)
class Proof:
    """What was compared.

    Attributes:
        prompts, length: how many, and their length (tokens).
        difference: largest absolute difference of logits.
        rule: the largest one that passes.
    """

    prompts: int
    length: int
    difference: float
    rule: float

    def __str__(self) -> str:
        return (
            f"logits of {self.prompts} prompts of {self.length} tokens differ by at most "
            f"{self.difference:.1e} (rule: {self.rule:.1e}, {FACTOR:.0f} times what float32 rounds)"
        )


def prove(source: Foreign, written: Foreign) -> Proof:
    """Compares a model with what was written of it and read back.

    Raises:
        ValueError: they differ, or the source's logits are not finite.
    """
    size = (PROMPTS, min(LENGTH, source.cfg.context_length))
    ids_BT = torch.randint(
        source.cfg.vocab_size, size, generator=torch.Generator().manual_seed(SEED)
    )
    exact_BTV = _reference(source, torch.float64)(ids_BT)
    if not exact_BTV.isfinite().all():
        raise ValueError(f"{source.path} has logits that are not finite; its weights are damaged")
    error = _largest(_reference(source, torch.float32)(ids_BT), exact_BTV)
    with torch.no_grad():
        ours_BTV = written.model()(ids_BT)
    again_BTV = _reference(written, torch.float32)(ids_BT)
    proof = Proof(
        *size,
        difference=max(_largest(ours_BTV, exact_BTV), _largest(again_BTV, exact_BTV)),
        rule=FACTOR * (error + BAND * exact_BTV.abs().max().item()),
    )
    if not proof.difference <= proof.rule:
        raise ValueError(f"the conversion of {source.path} is wrong, nothing was written: {proof}")
    _same_bits(source, written)
    return proof


def _reference(model: Foreign, dtype: torch.dtype) -> Reference:
    return Reference(
        model.format,
        model.theirs,
        n_heads=model.cfg.n_heads,
        n_layers=model.cfg.n_layers,
        erf=ERF.get(model.format, model.cfg.activation == "gelu"),
        dtype=dtype,
    )


def _largest(found: Tensor, exact: Tensor) -> float:
    return (found - exact).abs().max().item()


def _same_bits(source: Foreign, written: Foreign) -> None:
    for name in source.own.keys() | written.own.keys():
        one, other = source.own.get(name), written.own.get(name)
        if one is None or other is None:
            there = other if one is None else one
            same = there is not None and name.endswith(".bias") and not there.any()
        else:
            same = one.dtype == other.dtype and torch.equal(one, other)
        if not same:
            raise ValueError(
                f"the conversion of {source.path} is wrong, nothing was written: {name!r} does not "
                "read back bit for bit"
            )
