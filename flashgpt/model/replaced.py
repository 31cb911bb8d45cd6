"""Whether a layer is what its type says: code that computes in place of layers has to ask."""

from __future__ import annotations

import torch
from torch import nn


def is_plain(layer: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    """Whether the layer is of one of these types, not of a subclass, with no hooks."""
    if type(layer) not in types:
        return False
    # A compiler may not trace this look, and would cut the model in two.
    if not torch.compiler.is_compiling() and "forward" in vars(layer):
        return False
    return not (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )
