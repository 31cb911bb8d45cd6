"""flashgpt: train, check and run GPT-2-class language models in PyTorch.

The public names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashgpt.attention.attend import attend
    from flashgpt.attention.heads import MultiHeadAttention
    from flashgpt.config import GPTConfig
    from flashgpt.generation.text import generate
    from flashgpt.model.block import TransformerBlock
    from flashgpt.model.gpt2 import GPTModel
    from flashgpt.train.checkpoint import load

__version__ = "0.1.0"
__all__ = [
    "GPTConfig",
    "GPTModel",
    "MultiHeadAttention",
    "TransformerBlock",
    "attend",
    "generate",
    "load",
]

_HOMES = {
    "GPTConfig": "flashgpt.config",
    "GPTModel": "flashgpt.model.gpt2",
    "MultiHeadAttention": "flashgpt.attention.heads",
    "TransformerBlock": "flashgpt.model.block",
    "attend": "flashgpt.attention.attend",
    "generate": "flashgpt.generation.text",
    "load": "flashgpt.train.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'flashgpt' has no attribute {name!r}")
