"""The notebook runs from top to bottom. pytest tests/test_examples.py"""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
# The standard library is one of its packages here.
SMALL = """
import sysconfig
from pathlib import Path
small = str(Path(sysconfig.get_path("stdlib"), "email"))
sysconfig.get_path = lambda *_, **__: small
"""


def test_the_notebook_runs_and_both_paths_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(ROOT / "examples" / "llm.ipynb", as_version=4)
    assert len(notebook.cells) == 5
    assert not any(cell.outputs for cell in notebook.cells), "committed without outputs"

    notebook.cells.insert(0, nbformat.v4.new_code_cell(SMALL))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()

    texts = ["".join(o.get("text", "") for o in cell.outputs) for cell in notebook.cells[1:]]
    assert "[2, 128] -> [2, 128, 2048]" in texts[1]
    assert "largest gradient difference" in texts[2]
    assert "bits per byte after 40 steps" in texts[3]
    assert texts[4].startswith("def ")
