"""The learning rate as a function of the step: `train.schedule`."""

from __future__ import annotations

import math

from flashgpt.runconfig import TrainConfig


def warmup_steps(config: TrainConfig) -> int:
    """Length of the linear warmup (optimizer steps): as set, else a twentieth of the schedule."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return min(max(1, config.steps // 20), config.steps - (config.decay_steps or 0))


def decay_steps(config: TrainConfig) -> int:
    """Length of the decay at the end (optimizer steps).

    With "wsd" as set, else a fifth of the schedule, or what warmup leaves of it; a cosine's is all
    that comes after warmup's last step and one at the peak.
    """
    left = config.steps - warmup_steps(config)
    if config.schedule == "wsd":
        return config.decay_steps or min(max(1, config.steps // 5), left)
    return left - 1 if config.schedule == "cosine" else 0


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of optimizer step `step`, counted from 0, of `config.steps` wherever the run stops.

    Linear warmup to lr; then a cosine to min_lr * lr ("cosine"), or lr and a linear decay to
    min_lr * lr ("wsd": warmup, stable, decay), or lr ("constant"). Past the end it stays.

    Source: "wsd" is Hu et al., "MiniCPM", arXiv 2404.06395; the linear form and its length, Haegele
    et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations",
    arXiv 2405.18392.
    """
    warmup, decay = warmup_steps(config), decay_steps(config)
    if step < warmup:
        return config.lr * ((step + 1) / warmup)
    into = min(step, config.steps - 1) - (config.steps - 1 - decay)  # of the decay, in steps
    if into <= 0:
        return config.lr
    left = 1 - into / decay
    if config.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * (into / decay)))
    return config.lr * (config.min_lr + (1 - config.min_lr) * left)
