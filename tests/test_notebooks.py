# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The notebooks run from top to bottom, each in a new kernel."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    stored = [kinds_of(cell) for cell in notebook.cells]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    assert [kinds_of(cell) for cell in notebook.cells] == stored, "run it and store its outputs"


def kinds_of(cell):
    """The kinds of a cell's outputs that readers see, each once: texts and images."""
    found = []
    for output in cell.get("outputs", []):
        assert output.output_type != "error"
        if output.get("name") != "stderr":  # progress bars
            found.append("image" if "image/png" in output.get("data", {}) else "text")
    return list(dict.fromkeys(found))
