"""Files with tensors are read whole, or refused in one line. pytest tests/interop/test_files.py"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from flashgpt.interop.files import only_tensors, read_pickle, read_safetensors


class _Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("by_torch", [True, False])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path: Path, by_torch: bool) -> None:
    path, trap = tmp_path / "ckpt.pt", tmp_path / "made"
    content = {"model": _Code(trap), "model_args": {}}
    if by_torch:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=r"ckpt\.pt may hold code .* it asks for \S*mkdir"):
        read_pickle(path)
    assert not trap.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_cut_anywhere_is_refused(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(50)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    assert torch.equal(read_pickle(path)["a"], torch.ones(50))
    for length in (0, 1, 2, 30, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.pt (is damaged or cut short|may hold code)"):
            read_pickle(path)


def test_what_is_no_dictionary_of_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save([torch.ones(1)], path)
    with pytest.raises(ValueError, match=r"a\.pt must hold a dictionary of tensors, got list"):
        read_pickle(path)
    with pytest.raises(ValueError, match="it: 'b' must be a tensor, got int"):
        only_tensors({"a": torch.ones(1), "b": 3}, "it")
    for read in (read_pickle, read_safetensors):
        with pytest.raises(ValueError, match=r"none cannot be read"):
            read(tmp_path / "none")
