"""Files with tensors, read without running anything that is in them.

PyTorch's own files are pickles; they are read with `weights_only`, which knows tensors, numbers,
texts and containers, and refuses everything else.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: no such file, no safetensors file, or one that is cut short.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary of a file that torch.save wrote.

    Raises:
        ValueError: no such file, it holds code or objects, it is cut short, or no dictionary.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if not named and "truncated" in str(error):
            raise ValueError(f"{path} is damaged or cut short: {error}") from error
        what = f"it asks for {named[1]}" if named else "it is no plain file of tensors"
        raise ValueError(
            f"{path} may hold code that runs when it is read, so it is refused: {what}; save its "
            "state_dict alone"
        ) from error
    except Exception as error:  # the unpickler raises whatever damaged bytes lead to
        raise ValueError(f"{path} is damaged or cut short: {_first_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors, got {type(found).__name__}")
    return found


def only_tensors(found: dict[Any, Any], origin: str) -> dict[str, Tensor]:
    """A state dict, checked to be one.

    Raises:
        ValueError: something in it is no tensor; the first such name is given.
    """
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{origin}: {name!r} must be a tensor, got {type(value).__name__}")
    return found


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
