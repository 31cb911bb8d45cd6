"""A model as it was found in some format: its own tensors, and the same by our names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flashgpt.config import GPTConfig
from flashgpt.interop.weights import shapes
from flashgpt.model.gpt2 import GPTModel

Format = Literal["huggingface", "nanogpt", "from-scratch", "llm.c"]


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A model of another format.

    Attributes:
        path: the file that an error names.
        cfg: what our model must be to compute the same.
        theirs: tensors by their names, as the file has them.
        own: parameters by our names, views of `theirs` where possible.
        biases: False where the format's own model has no bias anywhere; ours are zero then.
        eos_id: id of the token that ends a document, where the format says it.
        notes: what is different there and how it was handled, for people.
    """

    format: Format
    path: Path
    cfg: GPTConfig
    theirs: Mapping[str, Tensor]
    own: dict[str, Tensor]
    biases: bool = True
    eos_id: int | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, tensor in self.own.items():
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(
                    f"{self.path}: {name!r} (our name) must be float32, bfloat16 or float16, "
                    f"got {str(tensor.dtype).removeprefix('torch.')}"
                )

    def model(self) -> GPTModel:
        """Our model with these weights in float32, on the CPU, in eval mode."""
        model = GPTModel.empty(self.cfg)
        state = model.state_dict()
        for name, tensor in self.own.items():
            state[name].copy_(tensor)
        return model.eval()


def with_zero_biases(cfg: GPTConfig, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a model without biases, with those that ours has: zeros."""
    dtype = own["wte.weight"].dtype
    absent = {
        name: torch.zeros(shape, dtype=dtype)
        for name, shape in shapes(cfg).items()
        if name not in own
    }
    assert all(name.endswith(".bias") for name in absent), absent.keys()
    return own | absent
