"""Muon: momentum whose every matrix is orthogonalised before it moves the weights.

Owns the update of matrices; what is a matrix, and what AdamW updates, is decided in optimizer.py.

    momentum <- 0.95 momentum + 0.05 gradient
    update   <- orthogonalised(0.95 momentum + 0.05 gradient)              (Nesterov)
    weight   <- weight (1 - lr decay) - lr 0.2 sqrt(max(A, C)) update

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024,
https://kellerjordan.github.io/posts/muon/); the decay and the factor 0.2 sqrt(max(A, C)), which
gives the update the root mean square of AdamW's, so that one learning rate serves both: Liu et al.,
"Muon is Scalable for LLM Training", arXiv 2502.16982, equation 4.

torch.optim.Muon takes the matrices one by one, in bf16 on any device (which ends the process on
some CPUs), and cannot leave a step out without asking the device; hence this one.

Legend: M matrices of one shape, A rows, C columns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # steepest at 0, so that small singular values grow fast
ADAMW_RMS = 0.2
EPS = 1e-7  # of a norm: a gradient of zeros stays zeros


def orthogonalise(x_MAC: Tensor) -> Tensor:
    """The matrices with singular values near 1 in place of their own, singular vectors kept.

    Five Newton-Schulz steps take a singular value s, as a fraction of the matrix's Frobenius norm,
    to 0.68 .. 1.21 if s is above 0.0015, and to about 485 s below. The products run in bf16 on
    CUDA, elsewhere in the dtype of x_MAC, which is also the dtype of the result.
    """
    a, b, c = COEFFICIENTS
    y_MAC: Tensor = x_MAC / torch.linalg.matrix_norm(x_MAC, keepdim=True).clamp(min=EPS)
    if x_MAC.is_cuda:
        y_MAC = y_MAC.bfloat16()
    tall = y_MAC.shape[1] > y_MAC.shape[2]
    y_MAC = y_MAC.mT if tall else y_MAC  # the smaller Gram matrix
    for _ in range(STEPS):
        gram_MAA = y_MAC @ y_MAC.mT
        poly_MAA = torch.baddbmm(gram_MAA, gram_MAA, gram_MAA, beta=b, alpha=c)
        y_MAC = torch.baddbmm(y_MAC, poly_MAA, y_MAC, beta=a)
    return (y_MAC.mT if tall else y_MAC).to(x_MAC.dtype)


class _Matrix(NamedTuple):
    """Views of one matrix: a parameter, or a part of one."""

    weight: Tensor
    gradient: Tensor
    momentum: Tensor


class Muon(torch.optim.Optimizer):
    """Muon for parameters of two dimensions.

    Matrices of one shape go through in one batch, which takes memory for a few copies of them.

    Attributes:
        found_inf: PyTorch's name for what refuses a step, as in its fused optimizers: a 0-d tensor
            on the device, where 1.0 leaves weights and momentum bit for bit as they are, or None.

    Args:
        params: parameters, or groups of them. A group's `split` says how many matrices of equal
            height a parameter is, one above the other.
        lr: learning rate, on AdamW's scale; a group's `lr` may be a tensor on the device, 0-d.
        weight_decay: decoupled decay, as AdamW's.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        split: int = 1,
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, split=split))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; asks the device for nothing."""
        for group in self.param_groups:
            for matrices in self._batches(group):
                weights, gradients, momenta = zip(*matrices, strict=True)
                weight_MAC, gradient_MAC, old_MAC = map(torch.stack, (weights, gradients, momenta))
                momentum_MAC = old_MAC.lerp(gradient_MAC, 1 - MOMENTUM)
                update_MAC = orthogonalise(gradient_MAC.lerp(momentum_MAC, MOMENTUM))
                rate = group["lr"] * ADAMW_RMS * math.sqrt(max(update_MAC.shape[1:]))
                moved_MAC = weight_MAC * (1 - group["lr"] * group["weight_decay"])
                moved_MAC.sub_(update_MAC * rate)  # as `alpha` the host would have to know it
                if self.found_inf is not None:  # a product by 0 would keep a NaN
                    refused = self.found_inf > 0
                    moved_MAC = torch.where(refused, weight_MAC, moved_MAC)
                    momentum_MAC = torch.where(refused, old_MAC, momentum_MAC)
                torch._foreach_copy_(weights, moved_MAC.unbind())
                torch._foreach_copy_(momenta, momentum_MAC.unbind())

    def _batches(self, group: dict[str, Any]) -> Iterable[list[_Matrix]]:
        """The group's matrices that have a gradient, by shape."""
        found: defaultdict[torch.Size, list[_Matrix]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            tensors = (p, p.grad, state["momentum_buffer"])
            parts = (tensor.chunk(group["split"]) for tensor in tensors)
            for matrix in map(_Matrix, *parts):
                found[matrix.weight.shape].append(matrix)
        return found.values()
