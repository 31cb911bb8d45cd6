"""The feed-forward layer for training on a GPU: GELU and its derivative inside the products.

    pre = x W1^T + b1        act = gelu(pre)                      out = act W2^T + b2
    dact = dout W2           dpre = dact * gelu'(pre)             the rest as ever

Done apart, GELU reads and writes more memory than all else between the products of a block. Here
one operator is the first line up to act, another one dpre and the gradient of b1. On Hopper they
are kernels in Gluon (gluon_mlp.py), or in Triton (triton_mlp.py) for versions whose Gluon is not
known.

For autograd the gradient of `out` goes to `pre` at once, past `act`: so the two operators of the
forward pass are `linear_gelu`, with gradients from `pre` alone, and `linear_of_gelu`, which takes
`pre` and b1 along for theirs. They are operators, not an autograd.Function in the model, for where
blocks are recomputed the compiler of torch 2.11 keeps what such a one saves. All products of the
backward pass but dpre are PyTorch's, so that a compiler sees them.

Legend: M rows (batch times positions), D model width, F inner width.
"""

from __future__ import annotations

import functools
import importlib
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashgpt.model import precision
from flashgpt.model.replaced import is_plain

TYPES = {torch.float16, torch.bfloat16}
WIDTH_MULTIPLE, ALIGNMENT = 8, 16  # elements and bytes: what descriptors need
HOPPER = 9  # what the kernels are cut for
# Triton's versions whose Gluon, an experimental language, the kernels are known to compile by.
GLUON = ("3.6.", "3.7.")

LIBRARY = torch.library.Library("flashgpt", "FRAGMENT")
LIBRARY.define("linear_gelu(Tensor x, Tensor weight, Tensor bias, bool tanh) -> (Tensor, Tensor)")
LIBRARY.define(
    "linear_of_gelu(Tensor act, Tensor pre, Tensor bias_of_pre, Tensor weight, Tensor bias,"
    " bool tanh) -> Tensor"
)
LIBRARY.define(
    "matmul_dgelu(Tensor dout, Tensor weight, Tensor pre, bool tanh) -> (Tensor, Tensor)"
)
_linear_gelu = torch.ops.flashgpt.linear_gelu.default
_linear_of_gelu = torch.ops.flashgpt.linear_of_gelu.default
_matmul_dgelu = torch.ops.flashgpt.matmul_dgelu.default


def serves(x_BTD: Tensor, fc: nn.Linear, gelu: nn.GELU, proj: nn.Linear) -> bool:
    """Whether `feed_forward` is for this call; else it is three layers, one after the other.

    It calls no layer, so one that was replaced, or has hooks, is called instead.
    """
    return (
        torch.is_grad_enabled()
        and all(is_plain(layer, (nn.Linear, nn.GELU)) for layer in (fc, gelu, proj))
        and fc.bias is not None
        and proj.bias is not None
        and fc.in_features % WIDTH_MULTIPLE == fc.out_features % WIDTH_MULTIPLE == 0
        and precision.of_products(x_BTD) in TYPES
        and _has_kernels(x_BTD.get_device())
    )


def _has_kernels(device: int) -> bool:
    """Whether a CUDA device, by its index, has them; -1 is the CPU."""
    # AMD's GPUs count their capabilities anew.
    ours = _capability(device) == HOPPER and torch.version.hip is None
    return ours and _triton_is_installed()


# What torch.compiler.assume_constant_result does, without its import of the compiler.
_has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


def _capability(device: int) -> int:
    return 0 if device < 0 else torch.cuda.get_device_capability(device)[0]


def feed_forward(x_BTD: Tensor, fc: nn.Linear, gelu: nn.GELU, proj: nn.Linear) -> Tensor:
    """proj(gelu(fc(x))), in the dtype of products. Differentiable once."""
    dtype, tanh = precision.of_products(x_BTD), gelu.approximate == "tanh"
    weights = (fc.weight, fc.bias, proj.weight, proj.bias)
    x_MD, w1_FD, b1_F, w2_DF, b2_D = (t.to(dtype) for t in (x_BTD.flatten(0, -2), *weights))
    act_MF, pre_MF = _linear_gelu(x_MD, w1_FD, b1_F, tanh)
    out_MD: Tensor = _linear_of_gelu(act_MF, pre_MF, b1_F, w2_DF, b2_D, tanh)
    return out_MD.view(x_BTD.shape)


class _LinearGelu(torch.autograd.Function):
    """`linear_gelu`, with gradients of x and weight from that of pre; `linear_of_gelu` has the
    bias's."""

    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, w_FD: Tensor, b_F: Tensor, tanh: bool
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            act_MF, pre_MF = _linear_gelu(x_MD, w_FD, b_F, tanh)
        ctx.save_for_backward(x_MD, w_FD)
        ctx.mark_non_differentiable(act_MF)
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        return act_MF, pre_MF

    @staticmethod
    def backward(
        ctx: Any, _: Tensor | None, dpre_MF: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_MD, w_FD = ctx.saved_tensors
        need_x, need_w, *_ = ctx.needs_input_grad
        if dpre_MF is None:
            return None, None, None, None
        dx_MD = dpre_MF @ w_FD if need_x else None
        return dx_MD, dpre_MF.t() @ x_MD if need_w else None, None, None


class _LinearOfGelu(torch.autograd.Function):
    """`linear_of_gelu` with its gradients; a second derivative is refused."""

    @staticmethod
    def forward(
        ctx: Any,
        act_MF: Tensor,
        pre_MF: Tensor,
        b1_F: Tensor,
        w2_DF: Tensor,
        b2_D: Tensor,
        tanh: bool,
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            out_MD: Tensor = _linear_of_gelu(act_MF, pre_MF, b1_F, w2_DF, b2_D, tanh)
        ctx.save_for_backward(act_MF, pre_MF, w2_DF)
        ctx.tanh = tanh
        return out_MD

    @staticmethod
    def backward(ctx: Any, dout_MD: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fused feed-forward layer has no second derivative; in fp32 it is not fused"
            )
        act_MF, pre_MF, w2_DF = ctx.saved_tensors
        _, need_pre, need_b1, need_w2, need_b2, _ = ctx.needs_input_grad
        dpre_MF = db1_F = None
        if need_pre or need_b1:
            dpre_MF, db1_F = _matmul_dgelu(dout_MD, w2_DF, pre_MF, ctx.tanh)
        dw2_DF = dout_MD.t() @ act_MF if need_w2 else None
        db2_D = dout_MD.sum(0) if need_b2 else None
        return None, dpre_MF, db1_F, dw2_DF, db2_D, None


def _linear_gelu_plain(
    x_MD: Tensor, w_FD: Tensor, b_F: Tensor, tanh: bool
) -> tuple[Tensor, Tensor]:
    pre_MF = torch.addmm(b_F, x_MD, w_FD.t())
    return F.gelu(pre_MF, approximate="tanh" if tanh else "none"), pre_MF


def _linear_of_gelu_plain(
    act_MF: Tensor, pre_MF: Tensor, b1_F: Tensor, w2_DF: Tensor, b2_D: Tensor, tanh: bool
) -> Tensor:
    return torch.addmm(b2_D, act_MF, w2_DF.t())


def _matmul_dgelu_plain(
    dout_MD: Tensor, w_DF: Tensor, pre_MF: Tensor, tanh: bool
) -> tuple[Tensor, Tensor]:
    approximate = "tanh" if tanh else "none"
    dact_MF = dout_MD @ w_DF
    dpre_MF = torch.ops.aten.gelu_backward(dact_MF, pre_MF, approximate=approximate)
    return dpre_MF, dpre_MF.sum(0)


def _linear_gelu_cuda(x_MD: Tensor, w_FD: Tensor, b_F: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    act_MF, pre_MF = _kernels().linear_gelu(_dense(x_MD), _dense(w_FD), _dense(b_F), tanh)
    return act_MF, pre_MF


def _matmul_dgelu_cuda(
    dout_MD: Tensor, w_DF: Tensor, pre_MF: Tensor, tanh: bool
) -> tuple[Tensor, Tensor]:
    dpre_MF, db_F = _kernels().matmul_dgelu(_dense(dout_MD), _dense(w_DF), _dense(pre_MF), tanh)
    return dpre_MF, db_F


@functools.cache
def _kernels() -> ModuleType:
    import triton

    known = triton.__version__.startswith(GLUON) and not triton.knobs.runtime.interpret
    return importlib.import_module(f"flashgpt.model.{'gluon_mlp' if known else 'triton_mlp'}")


def _dense(x: Tensor) -> Tensor:
    """x where a descriptor may point: adjacent and aligned."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def _linear_gelu_fake(x_MD: Tensor, w_FD: Tensor, b_F: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    act_MF = x_MD.new_empty(x_MD.shape[0], w_FD.shape[0])
    return act_MF, torch.empty_like(act_MF)


def _matmul_dgelu_fake(
    dout_MD: Tensor, w_DF: Tensor, pre_MF: Tensor, tanh: bool
) -> tuple[Tensor, Tensor]:
    dpre_MF = torch.empty_like(pre_MF, memory_format=torch.contiguous_format)
    return dpre_MF, pre_MF.new_empty(pre_MF.shape[1])


LIBRARY.impl("linear_gelu", _linear_gelu_plain, "CompositeExplicitAutograd")
LIBRARY.impl("linear_gelu", _linear_gelu_cuda, "CUDA")
LIBRARY.impl("linear_gelu", _LinearGelu.apply, "Autograd")
LIBRARY.impl("linear_of_gelu", _linear_of_gelu_plain, "CompositeExplicitAutograd")
LIBRARY.impl("linear_of_gelu", _LinearOfGelu.apply, "Autograd")
LIBRARY.impl("matmul_dgelu", _matmul_dgelu_plain, "CompositeExplicitAutograd")
LIBRARY.impl("matmul_dgelu", _matmul_dgelu_cuda, "CUDA")
torch.library.register_fake("flashgpt::linear_gelu", _linear_gelu_fake, lib=LIBRARY)
torch.library.register_fake("flashgpt::linear_of_gelu", _linear_of_gelu_plain, lib=LIBRARY)
torch.library.register_fake("flashgpt::matmul_dgelu", _matmul_dgelu_fake, lib=LIBRARY)
