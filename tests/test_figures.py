# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Every figure of the pages is that of the committed data."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import figures

ROOT = Path(__file__).parents[1]


@pytest.fixture
def copy(tmp_path):
    """The pages and the data alone: no plot is there before it is drawn."""
    for pattern in (*figures.PAGES, "benchmarks/data/*.json"):
        for path in ROOT.glob(pattern):
            there = tmp_path / path.relative_to(ROOT)
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, there)
    return tmp_path


def test_figures_are_those_of_the_data_and_all_of_both_are_used(copy, monkeypatch):
    used = set()
    opened = figures.Data.__init__

    def note(data, page, name):
        used.add(name)
        opened(data, page, name)

    monkeypatch.setattr(figures.Data, "__init__", note)
    pages = figures.write(copy)
    assert {"README.md", "README_zh-CN.md"} <= {page.name for page in pages}
    for page in pages:
        committed = ROOT / page.relative_to(copy)
        assert page.read_text() == committed.read_text(), f"{committed}: run make figures"
    drawn = sorted(copy.rglob("*.png"))
    assert drawn
    for path in drawn:
        committed = ROOT / path.relative_to(copy)
        one, two = (np.asarray(Image.open(file)).astype(int) for file in (path, committed))
        assert np.abs(one - two).max() <= 1, f"{committed}: run make figures"

    shown = {name for page in pages for name in figures.MARKER.findall(page.read_text())}
    shown.discard("NAME")
    assert shown == set(figures.FIGURES)
    assert used == {path.stem for path in (ROOT / "benchmarks/data").iterdir()}


def test_every_file_of_data_says_how_it_was_measured():
    for path in (ROOT / "benchmarks/data").iterdir():
        record = json.loads(path.read_text())
        assert {"command", "date", "environment", "settings", "rows"} == set(record), path
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", record["date"]) and record["command"]
        assert {"processor", "gpu", "threads", "versions"} == set(record["environment"])
        assert "torch" in record["environment"]["versions"]
        timed = [len(row["round_seconds"]) for row in record["rows"] if "round_seconds" in row]
        assert len(set(timed)) <= 1, "every method ran in every round"
