"""How much memory a training step takes: arithmetic, and lines through what was measured.

Owns the model of docs/planning.md: which bytes a step holds, as a function of the shape and of the
tokens in a micro-batch. Measures nothing and imports no torch; `flashgpt.measure.plan` measures,
`flashgpt.measure.scaling_model` adds other devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from flashgpt.config import GPTConfig

FP32, BF16 = 4, 2  # bytes
MOMENTS = 2  # of AdamW, in fp32
# What a block keeps for its backward pass with fused attention, in numbers of emb_dim a token: the
# residual stream twice and both LayerNorms' outputs (4), query, key and value (3), attention's
# output and what rounding took from it (2), the feed-forward layer before and after GELU (8).
KEPT_WIDTHS = 17
# Of the loss on CUDA: rows whose logits exist at once, and what their number is padded to.
LOSS_ROWS, LOSS_COLUMNS_MULTIPLE = 16384, 64


def block_parameters(cfg: GPTConfig) -> int:
    """Numbers trained in one transformer block."""
    biases = 13 if cfg.qkv_bias else 10
    return 12 * cfg.emb_dim**2 + biases * cfg.emb_dim


def root_parameters(cfg: GPTConfig) -> int:
    """Numbers trained outside the blocks: embeddings, last LayerNorm, output head."""
    heads = 1 if cfg.tie_weights else 2
    return (heads * cfg.vocab_size + cfg.context_length + 2) * cfg.emb_dim


def parameters(cfg: GPTConfig) -> int:
    """Numbers trained; a shared weight counts once."""
    return root_parameters(cfg) + cfg.n_layers * block_parameters(cfg)


def flop_per_token(cfg: GPTConfig) -> float:
    """Of forward and backward, as `flashgpt.measure.flops` counts; recomputation does not count."""
    looked_up = cfg.context_length + (0 if cfg.tie_weights else cfg.vocab_size)
    products = parameters(cfg) - looked_up * cfg.emb_dim
    return 6 * products + 12 * cfg.n_layers * cfg.emb_dim * cfg.context_length


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step: at the end of a forward pass, in the loss.

    Attributes:
        weights, gradients, moments: fp32; of FSDP this GPU's share.
        copies: bf16 weights for the products; of FSDP those that are gathered.
        activations: kept for the backward pass.
        loss: a chunk of logits, the head's gradient, gradient of the last activations; where blocks
            are recomputed, one's activations instead, if they are more.
    """

    weights: float
    gradients: float
    moments: float
    copies: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(dataclasses.astuple(self)))


def predict(cfg: GPTConfig, rows: int, *, recompute: bool, accumulates: bool = True) -> Memory:
    """Memory of one GPU by itself: compiled, bf16 autocast, fused attention, AdamW.

    Args:
        rows: sequences of `context_length` tokens in a micro-batch.
        recompute: activation checkpointing.
        accumulates: whether gradients are there during a forward pass: they are from the second
            micro-batch of a step on.
    """
    state = FP32 * parameters(cfg)
    tokens, loss = rows * cfg.context_length, loss_bytes(cfg, rows)
    return Memory(
        weights=state,
        gradients=state if accumulates else 0,
        moments=MOMENTS * state,
        copies=BF16 * parameters(cfg),
        activations=activation_bytes(cfg, rows, recompute=recompute),
        loss=max(loss, tokens * _block_bytes(cfg)) if recompute else loss,
    )


def activation_bytes(cfg: GPTConfig, rows: int, *, recompute: bool) -> float:
    """What a forward pass in bf16 keeps for the backward pass, fused attention on.

    With `recompute` blocks keep their input.
    """
    kept = cfg.n_layers * (BF16 * cfg.emb_dim if recompute else _block_bytes(cfg))
    last = 2 * BF16 * cfg.emb_dim  # around the last LayerNorm
    return float(rows * cfg.context_length * (kept + last))


def _block_bytes(cfg: GPTConfig) -> int:
    """What a block keeps of a token; log-sum-exps in fp32."""
    return BF16 * KEPT_WIDTHS * cfg.emb_dim + FP32 * cfg.n_heads


def loss_bytes(cfg: GPTConfig, rows: int) -> float:
    """What the fused head and loss hold: docs/planning.md, `flashgpt/model/loss.py`."""
    tokens = rows * cfg.context_length
    columns = -(-cfg.vocab_size // LOSS_COLUMNS_MULTIPLE) * LOSS_COLUMNS_MULTIPLE
    logits = min(tokens, LOSS_ROWS) * (columns + cfg.emb_dim) * BF16
    gradients = columns * cfg.emb_dim * FP32 + tokens * cfg.emb_dim * BF16
    return float(logits + gradients + columns * cfg.emb_dim * BF16)


@dataclasses.dataclass(frozen=True)
class Sample:
    """What was measured of one micro-batch.

    Attributes:
        rows: sequences in it.
        forward_bytes, rest_bytes: peaks in forward passes, and in the rest of the step.
        logits_bytes: of the peak in forward passes, what stops growing with the rows.
        gradients_bytes: of both, what is there from the second micro-batch of a step on; 0 in a
            step of one.
        seconds: per micro-batch, with its share of the update.
    """

    rows: int
    forward_bytes: int
    rest_bytes: int
    logits_bytes: int
    gradients_bytes: int
    seconds: float

    @property
    def peak_bytes(self) -> int:
        """Of the whole step."""
        return max(self.forward_bytes, self.rest_bytes)


def peak_at(samples: Sequence[Sample], rows: int, logits_bytes: int, gradients_bytes: int) -> float:
    """Peak memory (bytes) of a micro-batch of `rows`, from at least two others.

    In each phase all but logits and gradients is on a line: it is there anyway, or proportional to
    the rows. The two largest samples give the line, for they are the nearest.

    Args: as the attributes of the sample that is predicted.
    """
    a, b = sorted(samples, key=lambda sample: sample.rows)[-2:]

    def on_lines(s: Sample) -> tuple[int, int]:
        fixed = s.gradients_bytes
        return s.forward_bytes - s.logits_bytes - fixed, s.rest_bytes - fixed

    share = (rows - b.rows) / (b.rows - a.rows)
    forward, rest = (
        later + (later - earlier) * share
        for earlier, later in zip(on_lines(a), on_lines(b), strict=True)
    )
    return max(forward + logits_bytes, rest) + gradients_bytes


def seconds_at(samples: Sequence[Sample], rows: int) -> float:
    """Seconds of a micro-batch of `rows`, from at least two others.

    Those of a launch plus those of each row: of all such lines, neither part negative, the one
    whose relative errors have the least squares.
    """
    y = [(1 / s.seconds, s.rows / s.seconds) for s in samples]
    aa, ab, bb = (sum(p[i] * p[j] for p in y) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = sum(p[0] for p in y), sum(p[1] for p in y)
    determinant = aa * bb - ab * ab
    launch = (a * bb - b * ab) / determinant
    each = (b * aa - a * ab) / determinant
    if launch < 0:
        return b / bb * rows
    return a / aa if each < 0 else launch + each * rows
