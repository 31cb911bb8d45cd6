"""From logits to the next token of each row, and the random numbers that decide it.

A draw is a function of the logits and of one number u in [0, 1): tokens that are left stand side by
side in the order of their ids, each as wide as its probability, and u falls into one of them. u is
a function of (seed, sample, number of the token) and of nothing else, so a text is the same alone
and in any batch, with and without the cache. In the order of ids, and not of probabilities, a
rounding error moves a border and swaps no two tokens.

Legend: B rows, V vocabulary, K of the likeliest.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from flashgpt.attention.dropout import philox
from flashgpt.runconfig import SampleConfig

FEW = 1024
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

    Order: temperature, top-k, top-p, min-p. top-k keeps the k likeliest tokens, and those that are
    as likely as the last of them; top-p of these the likeliest until their sum reaches p, at least
    one, and again those as likely as the last; min-p keeps tokens of at least that fraction of the
    likeliest (Nguyen et al., "Turning Up the Heat", ICLR 2025). Probabilities are computed in fp32
    and added up in fp64.

    Args:
        uniform_B: u in [0, 1) of each row (fp64), on the device of the logits.
    """
    if config.temperature == 0:
        return logits_BV.argmax(-1)
    scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).float() / config.temperature
    probability_BV = scaled_BV.softmax(-1)
    least_B1 = probability_BV.new_zeros(len(probability_BV), 1)
    top_k = config.top_k if config.top_k < probability_BV.shape[-1] else 0
    if top_k:
        likeliest_BK = probability_BV.topk(top_k).values
        least_B1 = likeliest_BK[:, -1:]
    if config.top_p is not None and config.top_p < 1:
        if not top_k:
            likeliest_BK = _likeliest(probability_BV, config.top_p)
        sum_BK = likeliest_BK.cumsum(-1)
        wanted_B1 = config.top_p * (sum_BK[:, -1:] if top_k else 1)
        count_B1 = (sum_BK - likeliest_BK < wanted_B1).sum(-1, keepdim=True)
        least_B1 = likeliest_BK.gather(-1, count_B1.clamp(min=1) - 1)
    if config.min_p is not None:
        floor_B1 = config.min_p * probability_BV.amax(-1, keepdim=True)
        least_B1 = torch.maximum(least_B1, floor_B1)
    return _pick(torch.where(probability_BV >= least_B1, probability_BV, 0), uniform_B)


def _likeliest(probability_BV: Tensor, total: float) -> Tensor:
    """The largest probabilities, in order, until in every row their sum is `total` at least.

    Mostly few will do; to sort all of V takes fifty times as long. On a GPU it is sorted all the
    same: to look whether few will do, the host would have to wait for it.
    """
    if probability_BV.is_cuda:
        return probability_BV.sort(descending=True).values
    few_BK = probability_BV.topk(min(FEW, probability_BV.shape[-1])).values
    if bool((few_BK.sum(-1) >= total).all()):
        return few_BK
    return probability_BV.sort(descending=True).values


def _pick(weight_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The place into which u falls; never one of weight 0."""
    border_BV = weight_BV.double().cumsum(-1)
    total_B1 = border_BV[:, -1:].contiguous()
    found_B1 = torch.searchsorted(border_BV, uniform_B[:, None] * total_B1, right=True)
    # u * total may round up to total, behind the last of them.
    return torch.minimum(found_B1, torch.searchsorted(border_BV, total_B1))[:, 0]


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
