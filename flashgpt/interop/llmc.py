"""llm.c's model files, in: a header of 256 int32, then all parameters in fixed order.

Version 3 is float32, version 5 bfloat16. The token embedding has rows past the vocabulary, which
llm.c never reads as logits; they are left out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flashgpt.config import GPTConfig
from flashgpt.interop.foreign import Foreign
from flashgpt.interop.weights import LLMC, rows, shapes, to_ours

MAGIC = 20240326
HEADER = 256
DTYPES = {3: torch.float32, 5: torch.bfloat16}
FIELDS = ("maxT", "V", "L", "NH", "C", "Vp")  # after magic and version


def is_one(path: Path) -> bool:
    """Whether a file begins as llm.c's model files do."""
    with path.open("rb") as file:
        return file.read(4) == np.array([MAGIC], "<i4").tobytes()


def read(path: Path) -> Foreign:
    """A model file.

    Raises:
        ValueError: another version, a header that cannot be, or another size than it asks for.
    """
    size = path.stat().st_size
    if size < 4 * HEADER:
        raise ValueError(f"{path} is cut short: it has {size} bytes, its header alone 1024")
    header = np.fromfile(path, "<i4", HEADER).tolist()
    if header[1] not in DTYPES:
        raise ValueError(
            f"{path} must have version 3 (float32) or 5 (bfloat16) of llm.c's format, "
            f"got {header[1]}"
        )
    positions, vocab_size, n_layers, n_heads, emb_dim, padded = header[2:8]
    for name, value in zip(FIELDS, header[2:8], strict=True):
        if value < 1:
            raise ValueError(f"{path}: {name} in its header must be at least 1, got {value}")
    if padded < vocab_size:
        raise ValueError(f"{path}: Vp must be at least V = {vocab_size}, got {padded}")
    cfg = GPTConfig(vocab_size, positions, emb_dim, n_heads, n_layers, 0.0, qkv_bias=True)
    wanted = shapes(cfg)
    there = wanted | {"wte.weight": torch.Size([padded, emb_dim])}
    dtype = DTYPES[header[1]]
    expected = 4 * HEADER + dtype.itemsize * sum(shape.numel() for shape in there.values())
    if size != expected:
        what = "is cut short: it" if size < expected else "does not fit its header: it"
        raise ValueError(f"{path} {what} has {size:,} bytes, must have {expected:,}")
    whole = torch.from_numpy(np.fromfile(path, np.uint8, offset=4 * HEADER)).view(dtype)
    theirs: dict[str, Tensor] = {}
    at = 0
    for row in rows(LLMC, n_layers):
        (name,), shape = row.parts, there[row.ours]
        theirs[name] = whole[at : at + shape.numel()].view(shape)
        at += shape.numel()
    cut = {**theirs, "wte": theirs["wte"][:vocab_size]}
    own = to_ours(rows(LLMC, n_layers), cut, wanted, str(path))
    notes = []
    if padded > vocab_size:
        notes.append(
            f"rows {vocab_size:,} to {padded - 1:,} of the token embedding are padding and left out"
        )
    return Foreign("llm.c", path, cfg, cut, own, notes=tuple(notes))
