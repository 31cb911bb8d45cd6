"""One position of a GPT-2 for every text of a batch, over a cache, with nothing left to the host.

All that changes from step to step stands on the device, so the same launches serve each: what a
CUDA graph needs. A few texts go through kernels of our own (triton_step.py), some through others
(triton_dot.py), many through PyTorch's products; attention is our own.

Legend: B texts, D model width, P programs, V vocabulary.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashgpt.generation import forward
from flashgpt.generation.cache import KVCache
from flashgpt.generation.forward import Forward
from flashgpt.model.gpt2 import GPTModel

if TYPE_CHECKING:
    from flashgpt.generation.triton_step import State

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FULL = 256  # programs that keep a GPU busy: two on each of an H100's 132 multiprocessors
LEAST_CAPABILITY = (8, 0)  # of the GPU: what Triton supports, with bf16


def serves(weight: Tensor) -> bool:
    """Whether this file can, for a plain model with such weights, on a GPU that Triton knows.

    It has to be the current one: there Triton launches, whatever its arguments are on.
    """
    return (
        weight.is_cuda
        and weight.get_device() == torch.cuda.current_device()
        and find_spec("triton") is not None
        and torch.cuda.get_device_capability(weight.device) >= LEAST_CAPABILITY
        and weight.dtype in DTYPES
    )


def step(
    model: GPTModel, cache: KVCache, state: State, vocab_size: int
) -> tuple[Tensor, Tensor | None]:
    """Logits after the tokens that come next, which join the cache.

    Args:
        model: in eval mode.
        cache: contiguous, in the model's dtype.
        vocab_size: ids from here on get no logit.

    Returns:
        logits_BV, and `best_BP2` for `advance`, None with many texts.
    """
    from flashgpt.generation import triton_dot, triton_step

    x_BD = triton_step.embed(state, model.wte.weight, model.wpe.weight)
    if len(x_BD) > triton_dot.MOST_TEXTS:
        return _by_products(x_BD, model, cache, state)[:, :vocab_size], None
    return _by_kernels(x_BD, model, cache, state, vocab_size)


def _by_kernels(
    x_BD: Tensor, model: GPTModel, cache: KVCache, state: State, vocab_size: int
) -> tuple[Tensor, Tensor]:
    from flashgpt.generation import triton_attend, triton_dot, triton_step

    few = len(x_BD) <= triton_step.MOST_TEXTS
    do: ModuleType = triton_step if few else triton_dot
    for index, block in enumerate(forward.blocks(model)):
        c_attn, c_proj = block.attn.c_attn, block.attn.c_proj
        qkv_BD = do.norm_linear(x_BD, block.ln_1, c_attn.weight, c_attn.bias)
        keys_and_values = cache.k_LBNSH[index], cache.v_LBNSH[index]
        if few:
            parts = triton_attend.attend_in_parts(state, qkv_BD, *keys_and_values)
            triton_step.attention_linear_add_(x_BD, parts, c_proj.weight, c_proj.bias)
        else:
            out_BD = _attention(state, qkv_BD, *keys_and_values)
            triton_dot.linear_add_(x_BD, out_BD, c_proj.weight, c_proj.bias)
        c_fc, c_proj = block.mlp.c_fc, block.mlp.c_proj
        gelu = model.cfg.activation
        inner_BD = do.norm_linear(x_BD, block.ln_2, c_fc.weight, c_fc.bias, gelu)
        do.linear_add_(x_BD, inner_BD, c_proj.weight, c_proj.bias)
    found: tuple[Tensor, Tensor] = do.head(x_BD, model.ln_f, model.lm_head.weight[:vocab_size])
    return found


def _by_products(x_BD: Tensor, model: GPTModel, cache: KVCache, state: State) -> Tensor:
    def attention(index: int, qkv_BD: Tensor) -> Tensor:
        return _attention(state, qkv_BD, cache.k_LBNSH[index], cache.v_LBNSH[index])

    layers = Forward(model)
    return layers.logits_in_two(layers.hidden(x_BD.to(model.wte.weight.dtype), attention))


def _attention(state: State, qkv_BD: Tensor, k_BNSH: Tensor, v_BNSH: Tensor) -> Tensor:
    """In parts where whole heads would leave the GPU idle."""
    from flashgpt.generation import triton_attend

    texts, heads = k_BNSH.shape[:2]
    if texts * heads >= FULL:
        return triton_attend.attend(state, qkv_BD, k_BNSH, v_BNSH)
    parts = triton_attend.attend_in_parts(state, qkv_BD, k_BNSH, v_BNSH)
    return triton_attend.join(*parts, qkv_BD.dtype)
