# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The script that says where merging loses detail, on results made up by hand."""

import importlib.util
import json
import sys
from pathlib import Path

import drawings
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/merging.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("merging_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(name, psnr, latents, kind="tome"):
    quality = {"psnr": {"value": psnr}, "latent_error": {"value": latents}}
    return {"name": name, "kind": kind, "quality": quality}


@pytest.fixture
def results():
    return {
        "contenders": [
            row("dense", None, None, "dense"),
            row("level: 1", 34.0, 0.06),
            row("level: 2", 40.0, 0.03),
            row("level: 1, proportional", 46.0, 0.02),
            row("residual: exact, on the line, proportional", 50.0, 0.01),
            row("13 steps", 44.0, 0.025, "steps"),
        ]
    }


def test_groups(script, results):
    groups = script.groups_of(results)
    assert groups == {
        "level": {
            "1": {"plain": (34.0, 0.06), "weighted": (46.0, 0.02)},
            "2": {"plain": (40.0, 0.03)},
        },
        "residual": {"exact, on the line": {"weighted": (50.0, 0.01)}},
        "": {"13 steps": {"plain": (44.0, 0.025)}},
    }
    lines = script.table("level", groups["level"]).splitlines()
    assert lines[2:] == ["| 1 | 34.0 | 0.06 | 46.0 | 0.02 |", "| 2 | 40.0 | 0.03 |  |  |"]


def test_of_a_folder(script, results, tmp_path, monkeypatch, capsys):
    figures = drawings.kept_figures(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["merging.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"is not there; run tools/evaluate\.py"):
        script.main()
    (tmp_path / "results.json").write_text(json.dumps(results))
    picture = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", ["merging.py", str(tmp_path), "--plot", str(picture)])
    script.main()
    assert "| exact, on the line |  |  | 50.0 | 0.01 |" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    panels = {axes.get_title(loc="left"): drawings.bars_of(axes) for axes in figures[0].axes}
    heights = {title: [height for *_, height in bars] for title, bars in panels.items()}
    # Squares; first those without proportional attention, then those with it.
    assert heights == {script.DRAWN["level"]: pytest.approx([0.06**2, 0.03**2, 0.02**2, 0])}
    results["contenders"] = results["contenders"][-1:]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit, match="none of the groups"):
        script.main()
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_its_config_names_what_is_drawn(script):
    from mmengine import Config

    config = Config.fromfile(SCRIPT.parents[1] / "configs/benchmarks/merging_demo.py")
    contenders = [row(one["name"], 1.0, 1.0) for one in config.evaluation["contenders"]]
    groups = script.groups_of({"contenders": contenders})
    assert set(script.DRAWN) < set(groups)
    for group in script.DRAWN:
        assert all(set(kinds) == {"plain", "weighted"} for kinds in groups[group].values())
