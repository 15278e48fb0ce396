# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Who is beaten by whom, of results made up by hand."""

import importlib.util
import json
import sys
from pathlib import Path

import drawings
import pytest

from mmagic_tome.cache import StepCacheConfig, to_plain

SCRIPT = Path(__file__).parents[2] / "benchmarks/frontier.py"


@pytest.fixture(scope="module")
def frontier():
    spec = importlib.util.spec_from_file_location("frontier", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["frontier"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["frontier"]


def row(name, kind, speedup, psnr, latent_error=None, **options):
    quality = {"psnr": {"value": psnr}, "ssim": {"value": 0.99}}
    if latent_error is not None:
        quality["latent_error"] = {"value": latent_error}
    return {
        "name": name,
        "kind": kind,
        "options": {"residual": False, "prop_attn": False, **options},
        "quality": quality,
        "cost": {
            "seconds_per_image": {"median": 3 / speedup},
            "speedup": {"median": speedup, "p10": speedup - 0.1, "p90": speedup + 0.1},
        },
    }


@pytest.fixture
def results():
    inner = StepCacheConfig(region="inner")
    skipped, again = to_plain([inner]), to_plain([inner.replace(order=0)])
    return {
        "cost_measured": True,
        "settings": {"steps": 20, "pictures": 4},
        "contenders": [
            row("dense", "dense", 1.0, None),
            row("skipped", "tome", 1.5, 50.0, 0.01, cache=skipped),
            row("again", "tome", 1.5, 60.0, 0.02, cache=again),
            row("merged", "tome", 1.2, 40.0),
            row("exact", "tome", 1.1, 41.0, residual=True),
            row("weighted", "tome", 1.0, 46.0, prop_attn=True),
            row("inner again", "tome", 1.2, 30.0, cache=again),
            row("10 steps", "steps", 2.0, 42.0),
            row("tomesd", "tomesd", 0.9, 40.0),
            row("DeepCache 2", "deepcache", 1.4, 20.0, 0.005),
        ],
    }


def test_families(frontier, results):
    families = {point.name: point.family for point in frontier.points_of(results)}
    assert families == {
        "skipped": "ours: step caching",
        "again": "cached output",
        "merged": "merging alone",
        "exact": "ours: merging",
        "weighted": "ours: merging",
        "inner again": "cached output",
        "10 steps": "fewer steps",
        "tomesd": "tomesd",
        "DeepCache 2": "DeepCache",
    }


def test_who_is_beaten(frontier, results):
    points = frontier.points_of(results)
    text = frontier.table(points, 1.1, 2.0)
    # 10 dB are a factor of ten.
    assert "| merged | merging alone | 2.50 | 1.20 (1.10 - 1.30) | 40.0 | 0.9900 |  |  |" in text
    assert "| skipped: 1.50, 50.0 dB | 10 |" in text
    assert frontier.verdict(points, 1.1, 2.0) == (
        "5 contenders of others are 1.1 to 2 times as fast as dense; "
        "not beaten in both: again, 10 steps. "
        "With the error of the latents in place of PSNR, not beaten: DeepCache 2. "
        "Squared error, times that of one of ours as fast: 10 (tomesd)."
    )
    beaten = [point for point in points if point.name not in ("again", "10 steps")]
    assert frontier.verdict(beaten, 1.1, 2.0) == (
        "3 contenders of others are 1.1 to 2 times as fast as dense; "
        "every one of them is beaten in both by one of ours. "
        "With the error of the latents in place of PSNR, not beaten: DeepCache 2. "
        "Squared error, times that of one of ours as fast: 10 (tomesd)."
    )


def test_table_and_picture_of_a_folder(frontier, results, tmp_path, monkeypatch, capsys):
    figures = drawings.kept_figures(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["frontier.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"is not there; run tools/evaluate\.py"):
        frontier.main()
    (tmp_path / "results.json").write_text(json.dumps(results))
    picture = tmp_path / "frontier.png"
    monkeypatch.setattr(sys, "argv", ["frontier.py", str(tmp_path), "--plot", str(picture)])
    frontier.main()
    assert "### 20 steps, 4 pictures" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    drawn = {
        bars.get_label(): sorted(map(tuple, bars.lines[0].get_xydata().tolist()))
        for bars in axes.containers
    }
    assert drawn == {
        "ours: step caching": [(1.5, 50.0)],
        "ours: merging": [(1.0, 46.0), (1.1, 41.0)],
        "cached output": [(1.2, 30.0), (1.5, 60.0)],
        "merging alone": [(1.2, 40.0)],
        "fewer steps": [(2.0, 42.0)],
        "tomesd": [(0.9, 40.0)],
        "DeepCache": [(1.4, 20.0)],
    }
    best = drawings.lines_of(axes)["nothing is better in both"]
    assert best == [(1.5, 50.0), (1.5, 60.0), (2.0, 42.0)], "in both, not in one"
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []

    # All figures in one file, with the times of every round.
    rounds = {row["name"]: {"seconds": [1.0, 2.0]} for row in results["contenders"]}
    rounds["skipped"] = {"seconds": [0.5, 1.5]}
    (tmp_path / "cost.json").write_text(json.dumps({"pictures": 2, "contenders": rounds}))
    environment = {"processor": "a CPU", "threads": 1, "versions": {}, "platform": "not wanted"}
    (tmp_path / "results.json").write_text(json.dumps({**results, "environment": environment}))
    written = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["frontier.py", str(tmp_path), "--json", str(written)])
    frontier.main()
    (panel,) = json.loads(written.read_text())
    assert (panel["steps"], panel["pictures_per_timed_run"]) == (20, 2)
    assert "not wanted" not in written.read_text()
    assert [row["name"] for row in panel["contenders"]] == [
        x["name"] for x in results["contenders"]
    ]
    assert panel["contenders"][1]["seconds"] == [0.5, 1.5]
    assert panel["contenders"][1]["psnr"] == 50.0


def test_strengths_of_one_method_share_a_line_and_a_name(frontier, results):
    results["contenders"] += [
        row("ToFu 0.75", "tome", 1.2, 34.0),
        row("ToFu 0.5", "tome", 1.1, 35.0),
        row("ToMe 0.5, interval 4", "tome", 1.1, 33.0),
    ]
    points = frontier.points_of(results)
    (own,) = frontier.strengths_of(points).values()
    assert [point.name for point in own] == ["ToFu 0.5", "ToFu 0.75"]
    labels = {text: (x, y) for text, x, y in frontier.labels_of(points)}
    assert labels["ToFu 0.5 - 0.75"] == (1.1, 35.0)
    assert len(labels) == len(points) - 1
    # Fewer steps and DeepCache are named one by one.
    assert {"10 steps", "DeepCache 2", "ToMe 0.5, interval 4"} <= set(labels)
