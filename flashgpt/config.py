"""The config of a model: its keys, their units and ranges, and the presets.

`GPTConfig` is a complete model (the keys of the original cfg dict). The sections of a run's config
are in runconfig.py. Imports neither torch nor any command-line library, so that `flashgpt --help`
starts quickly.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from typing_extensions import Doc

from flashgpt.fields import check_keys, check_types

Activation = Literal["gelu_new", "gelu"]


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """A complete GPT-2-class model.

    Raises:
        ValueError: a size is not positive, `emb_dim` is not divisible by `n_heads`, `drop_rate`
            is outside [0, 1), or `activation` is unknown.
    """

    vocab_size: Annotated[int, Doc("token ids the model knows (count)")]
    context_length: Annotated[int, Doc("longest sequence (tokens)")]
    emb_dim: Annotated[int, Doc("width of the residual stream (features)")]
    n_heads: Annotated[int, Doc("attention heads per layer (count); divides emb_dim")]
    n_layers: Annotated[int, Doc("transformer blocks (count)")]
    drop_rate: Annotated[float, Doc("dropout probability while training, in [0, 1)")]
    qkv_bias: Annotated[bool, Doc("bias on the query, key and value projection")] = False
    use_flash: Annotated[bool, Doc("True: fused flash attention; False: standard attention")] = True
    tie_weights: Annotated[bool, Doc("output head shares the token embedding's weights")] = True
    activation: Annotated[Activation, Doc("gelu_new = tanh form (GPT-2); gelu = erf form")] = (
        "gelu_new"
    )

    def __post_init__(self) -> None:
        check_types(self, "cfg")
        for name in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.emb_dim % self.n_heads:
            raise ValueError(
                f"emb_dim must be divisible by n_heads, got emb_dim {self.emb_dim} and "
                f"n_heads {self.n_heads}"
            )
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate must be in [0, 1), got {self.drop_rate}")

    @property
    def head_dim(self) -> int:
        """Features per attention head."""
        return self.emb_dim // self.n_heads

    @classmethod
    def from_dict(cls, cfg: Mapping[str, Any], *, ignore_extra: bool = False) -> Self:
        """Reads the original cfg dict.

        Args:
            cfg: `vocab_size, context_length, emb_dim, n_heads, n_layers, drop_rate`, and any of
                the keys that have a default.
            ignore_extra: let keys pass that are not a model's.

        Raises:
            ValueError: an unknown key (the nearest one is suggested) or a missing one.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if not ignore_extra:
            check_keys(cfg, fields, "cfg")
        required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in cfg]:
            message = f"cfg lacks {', '.join(repr(m) for m in missing)}"
            strangers = [key for key in cfg if key not in fields]
            if near := difflib.get_close_matches(missing[0], strangers, n=1):
                message += f"; it has {near[0]!r}: did you mean {missing[0]!r}?"
            raise ValueError(message)
        return cls(**{name: cfg[name] for name in fields if name in cfg})

    def to_dict(self) -> dict[str, Any]:
        """The plain cfg dict; `from_dict` reads it back."""
        return dataclasses.asdict(self)


def _shape(
    context_length: int, emb_dim: int, n_heads: int, n_layers: int, drop_rate: float, bias: bool
) -> dict[str, Any]:
    sizes = dict(context_length=context_length, emb_dim=emb_dim, n_heads=n_heads, n_layers=n_layers)
    return {**sizes, "drop_rate": drop_rate, "qkv_bias": bias}


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _shape(128, 128, 2, 4, 0.0, False),
    "gpt2": _shape(1024, 768, 12, 12, 0.1, True),
    "gpt2-medium": _shape(1024, 1024, 16, 24, 0.1, True),
    "gpt2-large": _shape(1024, 1280, 20, 36, 0.1, True),
    "gpt2-xl": _shape(1024, 1600, 25, 48, 0.1, True),
}
GPT2_VOCAB_SIZE = 50257


def preset(name: str, *, vocab_size: int = GPT2_VOCAB_SIZE, **changes: Any) -> GPTConfig:
    """A named model shape, with single keys changed.

    Raises:
        ValueError: an unknown preset or key.
    """
    if name not in PRESETS:
        raise ValueError(f"model.preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return GPTConfig.from_dict({"vocab_size": vocab_size, **PRESETS[name], **changes})
