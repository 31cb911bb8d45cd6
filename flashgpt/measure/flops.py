"""How much arithmetic training takes, and how much a device can do: model FLOP utilisation.

A matrix product of [m, k] and [k, n] counts 2 m k n. Recomputation does not count, and the causal
half of the attention scores that need not be computed does (the convention of PaLM,
arXiv:2204.02311, appendix B, and of nanoGPT).
"""

from __future__ import annotations

import torch

from flashgpt.model.gpt2 import GPTModel

# Dense bf16 or fp16 FLOP per second with fp32 sums, from the makers' data sheets, by the whole name
# of the device: an unknown relative of a known card has other units and clocks.
PEAKS = {
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756.0e12,
    "NVIDIA H100 NVL": 835.0e12,
    "NVIDIA A100-SXM4-40GB": 311.9e12,
    "NVIDIA A100-SXM4-80GB": 311.9e12,
    "NVIDIA A100-PCIE-40GB": 311.9e12,
    "NVIDIA A100 80GB PCIe": 311.9e12,
    "NVIDIA A10G": 70.0e12,
    "NVIDIA L40S": 362.0e12,
    "NVIDIA L4": 121.0e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 3090": 71.0e12,
}


def flop_per_token(model: GPTModel) -> float:
    """Of the forward and backward pass, per trained token, at the full context length."""
    cfg = model.cfg
    products = model.n_parameters - model.wpe.weight.numel()
    if not cfg.tie_weights:
        products -= model.wte.weight.numel()  # looked up, not multiplied
    return 6 * products + 12 * cfg.n_layers * cfg.emb_dim * cfg.context_length


def peak_flop_per_second(device: torch.device, dtype: torch.dtype | None) -> float | None:
    """The data sheet's peak in half precision; None where it is not known, and for fp32."""
    if device.type != "cuda" or dtype is None:
        return None
    return PEAKS.get(torch.cuda.get_device_name(device))
