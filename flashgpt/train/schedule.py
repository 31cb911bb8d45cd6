"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from flashgpt.config import TrainConfig


def warmup_steps(config: TrainConfig) -> int:
    """Length of the linear warmup (optimizer steps): as set, else a twentieth of the schedule."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return max(1, config.steps // 20)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of optimizer step `step`, counted from 0: linear warmup, then a cosine to min_lr * lr.

    The cosine spans `config.steps` wherever the run stops.
    """
    warmup = warmup_steps(config)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, config.steps - 1 - warmup))
    floor = config.lr * config.min_lr
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))
