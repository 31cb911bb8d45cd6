"""From logits to the next token of each row, and the random numbers that decide it.

A draw is a function of the logits and of one number u in [0, 1): tokens that are left stand side by
side in the order of their ids, each as wide as its probability, and u falls into one of them. u is
a function of (seed, sample, number of the token) and of nothing else, so a text is the same alone
and in any batch, with and without the cache. In the order of ids, and not of probabilities, a
rounding error moves a border and swaps no two tokens.

Legend: B rows, V vocabulary, K candidates.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from flashgpt.attention.dropout import philox
from flashgpt.runconfig import SampleConfig

DRAW = 0x64726177  # fourth counter word; dropout's is the small number of a site


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A token that was drawn.

    Attributes:
        logprob: log of its probability (nats); None where not asked for.
        top: the likeliest ids, best first, with theirs.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def uniforms(seed: int, sample: int, count: int) -> list[float]:
    """u for each of the first `count` tokens of a sample: multiples of 2^-53 in [0, 1)."""
    step = torch.arange(count)
    high, low, _, _ = philox(step, sample, 0, DRAW, torch.tensor(seed))
    return (((high << 21) + (low >> 11)).double() * 2**-53).tolist()


def sample(logits_BV: Tensor, config: SampleConfig, uniform_B: Tensor) -> Tensor:
    """A token id for each row, int64 [B]: greedy at temperature 0, else as u decides.

    Order: temperature, top-k, top-p, min-p. top-p keeps the likeliest tokens until their sum
    reaches p, at least one; min-p keeps tokens of at least that fraction of the likeliest
    (Nguyen et al., "Turning Up the Heat", ICLR 2025). Probabilities are computed in fp32 and added
    up in fp64.

    Args:
        uniform_B: u in [0, 1) of each row (fp64), on the device of the logits.
    """
    if config.temperature == 0:
        return logits_BV.argmax(-1)
    scaled_BK = (logits_BV - logits_BV.amax(-1, keepdim=True)).float() / config.temperature
    order_BK = None
    if 0 < config.top_k < scaled_BK.shape[-1]:
        scaled_BK, order_BK = scaled_BK.topk(config.top_k)
    elif config.top_p is not None:
        scaled_BK, order_BK = scaled_BK.sort(descending=True, stable=True)
    probability_BK = scaled_BK.softmax(-1)
    keep_BK = torch.ones_like(probability_BK, dtype=torch.bool)
    if config.top_p is not None:
        before_BK = probability_BK.cumsum(-1) - probability_BK
        keep_BK &= before_BK < config.top_p
    if config.min_p is not None:
        keep_BK &= probability_BK >= config.min_p * probability_BK.amax(-1, keepdim=True)
    if order_BK is None:
        return _pick(torch.where(keep_BK, probability_BK, 0), uniform_B)
    keep_BK[:, 0] = True
    order_BK, place_BK = order_BK.sort()
    kept_BK = torch.where(keep_BK, probability_BK, 0).gather(-1, place_BK)
    return order_BK.gather(-1, _pick(kept_BK, uniform_B)[:, None])[:, 0]


def _pick(weight_BK: Tensor, uniform_B: Tensor) -> Tensor:
    """The place into which u falls; never one of weight 0."""
    border_BK = weight_BK.double().cumsum(-1)
    total_B1 = border_BK[:, -1:].contiguous()
    found_B1 = torch.searchsorted(border_BK, uniform_B[:, None] * total_B1, right=True)
    # u * total may round up to total, behind the last of them.
    return torch.minimum(found_B1, torch.searchsorted(border_BK, total_B1))[:, 0]


def logprobs(logits_BV: Tensor, chosen_B: Tensor, top: int) -> list[Drawn]:
    """What was drawn, with the log-probabilities of it and of the `top` likeliest.

    They are the model's own: over all of V, before temperature, top-k, top-p and min-p; fp32.
    """
    log_BV = logits_BV.float().log_softmax(-1)
    own = log_BV.gather(-1, chosen_B[:, None])[:, 0].tolist()
    values, ids = (x.tolist() for x in log_BV.topk(top))
    return [
        Drawn(token, own[row], tuple(zip(ids[row], values[row], strict=True)))
        for row, token in enumerate(chosen_B.tolist())
    ]
