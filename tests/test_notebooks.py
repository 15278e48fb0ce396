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
    stored = [[kind_of(output) for output in cell.get("outputs", [])] for cell in notebook.cells]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    made = [[kind_of(output) for output in cell.get("outputs", [])] for cell in notebook.cells]
    assert made == stored, "run it once more and store its outputs"


def kind_of(output):
    """What readers see of an output: text, or an image."""
    assert output.output_type != "error"
    return "image" if "image/png" in output.get("data", {}) else output.output_type
