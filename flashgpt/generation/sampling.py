"""From logits to the next token.

Legend: V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashgpt.runconfig import SampleConfig


def sample(logits_V: Tensor, config: SampleConfig, generator: torch.Generator) -> int:
    """Draws a token id: greedy at temperature 0, else from the restricted distribution.

    Order: temperature, top-k, top-p, min-p. top-p keeps the likeliest tokens until their sum
    reaches p, at least one; min-p keeps tokens of at least that fraction of the likeliest
    (Nguyen et al., "Turning Up the Heat", ICLR 2025). Probabilities are computed in fp32.
    """
    if config.temperature == 0:
        return int(logits_V.argmax())
    sorted_V, order_V = ((logits_V - logits_V.max()).float() / config.temperature).sort(
        descending=True, stable=True
    )
    probability_V = sorted_V.softmax(-1)
    keep_V = torch.ones_like(probability_V, dtype=torch.bool)
    if config.top_k:
        keep_V[config.top_k :] = False
    if config.top_p is not None:
        shared_V = torch.where(keep_V, probability_V, 0)
        before_V = (shared_V / shared_V.sum()).cumsum(-1) - shared_V / shared_V.sum()
        keep_V &= before_V < config.top_p
    if config.min_p is not None:
        keep_V &= probability_V >= config.min_p * probability_V[0]
    keep_V[0] = True
    kept_V = torch.where(keep_V, probability_V, 0).cpu()
    return int(order_V[torch.multinomial(kept_V, 1, generator=generator)])
