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


# --- frontiers, whose data are long in the making -------------------------------------------------

STRENGTHS = (0.25, 0.5, 0.75)


def _row(method, factor, psnr, **case):
    """A method on six images."""
    noise = np.array([-0.02, -0.01, 0, 0, 0.01, 0.02])
    return {
        **case,
        "method": method,
        "captions": "judge",
        "seconds": [*(10 / (factor * (1 + noise)))],
        "baseline_seconds": [10.0] * 6,
        "psnr": [*(psnr + 100 * noise)],
        "memory": 1 + factor / 10,
    }


def _rows(**case):
    """Fewer steps, other packages, and a dozen methods, of which the last ones are the best."""
    steps = case["steps"]
    rows = [
        _row(f"{round(share * steps)} steps", 1 / share, 60 * share, **case)
        for share in (0.85, 0.5, 0.3)
    ]
    rows += [_row(f"tomesd {one:g}", 1.3 + one / 10, 20, **case) for one in STRENGTHS]
    rows += [_row("todo 0.75", 1.5, 22, **case)]
    rows += [
        _row(f"method {number}", 1.2 + number / 10, 20 + number, **case) for number in range(12)
    ]
    rows += [_row("tolerance 0.02 and ToMe 0.5", 1.7, 57, **case)]
    rows += [_row("tolerance 0.02", 1.6, 58, **case), _row("idle", 0.99, 120, **case)]
    rows += [_row("diffusers TaylorSeer 3, order 1", 2, 30, **case)]
    shared = {**case, "captions": "judge"}
    rows.append({**shared, "method": "cache-dit defaults", "failed": "ValueError: too few blocks"})
    return [*rows, {**rows[0], "captions": "choose", "method": "chosen on others"}]


@pytest.fixture
def draw(tmp_path):
    """Name of a figure -> its text, of made-up data."""
    source = json.loads((ROOT / "benchmarks/data/smoothness.json").read_text())
    (tmp_path / "benchmarks/data").mkdir(parents=True)
    pages = tmp_path / "docs"
    pages.mkdir()
    rows = {"merging_frontier": [], "diffusion_transformer": []}
    for guidance in (3.0, 7.5):
        case = {"size": 256, "guidance": guidance}
        rows["merging_frontier"] += _rows(model="unet", scheduler="DDIM", steps=20, **case)
        for steps in (20, 28):
            rows["diffusion_transformer"] += _rows(
                model="transformer", scheduler="flow", steps=steps, **case
            )
    for name, some in rows.items():
        record = {**source, "settings": {"batch_size": 1, "dtype": "float32"}, "rows": some}
        (tmp_path / f"benchmarks/data/{name}.json").write_text(json.dumps(record))
    return lambda name: figures.FIGURES[name](pages / "page.md")


def _table(text):
    """First cell of a line -> the others."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {line[0]: line[1:] for line in cells}


def test_a_frontier_shows_the_best_methods_and_all_of_other_packages(draw):
    text = draw("merging-unet-3")
    table = _table(text)
    always = [*(f"tomesd {one:g}" for one in STRENGTHS), "todo 0.75", "17 steps", "6 steps"]
    assert {*always} <= {*table}
    assert {"tolerance 0.02", "tolerance 0.02 and ToMe 0.5", "method 11"} <= {*table}
    assert "chosen on others" not in table and "idle" not in table and "method 1" not in table
    assert len([name for name in table if name.startswith(("method", "tolerance"))]) == 10
    assert table["tolerance 0.02"][0].startswith("1.6") and table["tolerance 0.02"][2][0] == "+"
    assert table["cache-dit defaults"][:2] == ["does not run", "ValueError: too few blocks"]
    assert "demo model, 256x256, DDIM, guidance 3, 20 steps, 6 images" in text


def test_numbers_of_steps_are_columns_and_fewer_steps_are_shares(draw):
    table = _table(draw("transformer-7.5"))
    assert table[""] == ["20 steps", "28 steps", "memory"]
    assert all("**58.0** (+" in cell for cell in table["tolerance 0.02"][:2])
    assert [*table].count("50 % of the steps") == 1 and all(table["50 % of the steps"])
    assert "does not run: ValueError" in table["cache-dit defaults"][0]
    assert draw("transformer-1") == "*Not measured yet.*"


def test_a_frontier_has_a_panel_per_guidance_scale(draw, tmp_path):
    assert draw("merging-unet").startswith("![Fidelity against speed-up of the demo model](images/")
    assert draw("merging-transformer") == "*Not measured yet.*"
    draw("transformer")
    drawn = {path.stem: Image.open(path).size for path in tmp_path.rglob("*.png")}
    assert {*drawn} == {"merging_unet", "diffusion_transformer"}
    assert all(wide > 2 * high for wide, high in drawn.values())
