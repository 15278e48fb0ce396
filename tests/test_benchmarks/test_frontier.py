# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The frontiers: whole runs by many methods, at a small size and of few steps."""

import importlib
import json
from contextlib import contextmanager
from pathlib import Path

import pytest

from mmagic_tome.lab.methods import Method, parse_method
from mmagic_tome.lab.prompts import read_prompts
from mmagic_tome.lab.results import RunFolder
from mmagic_tome.methods import METHODS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STEPS = 3


@pytest.fixture(scope="module")
def scripts():
    """Name of a script -> its module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module


@pytest.fixture(scope="module")
def frontier(scripts):
    return scripts("frontier")


@contextmanager
def _fails(model):
    raise TypeError("not of this model")
    yield


def test_captions_to_choose_by_never_judge_and_come_from_both_sides(frontier):
    choose, judge, held_out = (frontier.captions(kind, 64) for kind in frontier.CAPTIONS)
    assert len({text for text, _ in choose}) == 64 and not set(choose) & {*judge, *held_out}
    assert len(held_out) == 64 and all(side for _, side in held_out)
    trained = {prompt.text for prompt in read_prompts("demo")}
    assert all((text in trained) != held_out for text, held_out in choose + judge)
    assert sum(held_out for _, held_out in judge) == 32


def test_an_interrupted_run_goes_on_and_writes_each_row_once(frontier, tmp_path, monkeypatch):
    case = frontier.Case("unet", 64, "DDIM", 3.0, STEPS)
    methods = [parse_method("tome:0.5"), Method("breaks", function=_fails), parse_method("steps:2")]
    folder = RunFolder(tmp_path / "run")

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        turn = frontier._turn
        patch.setattr(
            frontier,
            "_turn",
            lambda *a: turn(*a) if a[2] == 0 else interrupt(),
        )
        frontier.measure(case, methods, "judge", 2, folder)
    assert {row["number"] for row in folder.find(kind="run")} == {0}

    folder = RunFolder(tmp_path / "run")
    frontier.measure(case, [*methods, parse_method("tolerance:0.05")], "judge", 2, folder)
    found = sorted((row["method"], row["number"]) for row in folder.find(kind="run"))
    names = ("2 steps", "ratio 0.5", "tolerance 0.05")
    assert found == [(name, number) for name in names for number in range(2)]
    rows = {row["method"]: row for row in frontier.collected(case, "judge", folder)}
    assert rows["breaks"]["failed"] == "TypeError: not of this model"
    assert all(error > 0 for error in rows["ratio 0.5"]["error"] + rows["2 steps"]["error"])
    assert "not of this model" in frontier.table(list(rows.values()))
    assert rows["2 steps"]["operations"] == [round(2 / 3, 5)] * 2
    assert rows["tolerance 0.05"]["operations"] == [1, 1], "all of three steps are computed"
    assert "operations" not in rows["ratio 0.5"], "steps alone do not say it"


def test_the_advantage_is_over_fewer_steps_at_the_same_time(scripts):
    rows = scripts("rows")

    def row(method, seconds, psnr, operations):
        found = {"method": method, "seconds": seconds, "baseline_seconds": [10.0], "psnr": [psnr]}
        return found | {"operations": operations}

    some = [row("5 steps", [5.0], 20.0, [0.25]), row("8 steps", [8.0], 40.0, [0.8])]
    assert rows.fewer_at(some, 2) == pytest.approx(20)
    assert rows.fewer_at(some, (2 * 1.25) ** 0.5) == pytest.approx(30)
    assert rows.fewer_at(some, 3) is None
    assert rows.fewer_at(some, 4, rows.saved) == pytest.approx(20)
    better = row("ToMe", [8.0], 45.0, [0.9])
    assert rows.advantage([*some, better], better) == pytest.approx(5)
    assert rows.advantage(some, some[0]) is None
    assert not rows.is_fewer_steps({"method": "plan of 2 steps"})


@pytest.mark.parametrize(("name", "only"), [("merging_frontier", "^ToMe 0.5, blocks$")])
def test_a_script_writes_its_data_and_a_second_case_beside_it(
    scripts, frontier, tmp_path, name, only
):
    script, data = scripts(name), tmp_path / "data.json"
    for guidance in ("1", "3"):
        parser = frontier.parser("", data, script.DEFAULT)
        given = ["--size", "64", "--steps", "4", "--images", "1", "--guidance", guidance]
        given += ["--only", only, "--work-dir", str(tmp_path), "--memory"]
        frontier.main(parser.parse_args(given), script.methods)
    record = json.loads(data.read_text())
    assert [(row["guidance"], row["method"]) for row in record["rows"]] == [
        (1, only.strip("^$")),
        (3, only.strip("^$")),
    ]
    assert all(row["memory"] > 0.5 for row in record["rows"])


def test_every_merging_method_is_in_the_frontier(scripts):
    script = scripts("merging_frontier")
    methods = script.methods(script.DEFAULT)
    kinds = {one.setting.tome.method for one in methods if one.kind == "ours" and one.setting.tome}
    assert kinds >= set(METHODS)
    assert {one.kind for one in methods} == {"ours", "tomesd", "fewer steps"}


# --- packages that cache steps of transformers ----------------------------------------------------


def test_caches_of_packages_run_on_the_demo_transformer_and_leave_no_trace(scripts, frontier):
    pytest.importorskip("cache_dit")
    peers = importlib.import_module("benchmarks.peers.of_packages")
    bench = frontier.Bench(frontier.Case("transformer", 64, "flow", 3.0, 6))
    baseline = bench.draw("red apple", 0)
    ratios = peers.mag_ratios(bench.pipeline, lambda: bench.draw("pizza", 1), 6)
    assert len(ratios) == 6 and ratios[0] == 1
    strong = [
        peers.taylorseer(3),
        peers.mag_cache(9.0, ratios),
        peers.pyramid_attention_broadcast(2),
        peers.cache_dit(
            "strong", Fn_compute_blocks=1, residual_diff_threshold=9.0, max_warmup_steps=2
        ),
    ]
    for method in strong:
        changed = frontier.relative_error(
            bench.measured(method, "red apple", 0)["latents"], baseline
        )
        assert 0 < changed < 1, method.name
        assert frontier.relative_error(bench.draw("red apple", 0), baseline) == 0, method.name


def test_first_block_cache_of_diffusers_does_not_know_the_last_block(scripts, frontier):
    """Of Stable Diffusion 3 it returns no text; if this fails, diffusers has learned it."""
    peers = importlib.import_module("benchmarks.peers.of_packages")
    bench = frontier.Bench(frontier.Case("transformer", 64, "flow", 1.0, 2))
    with pytest.raises(TypeError, match="NoneType"):
        bench.measured(peers.first_block_cache(0.1), "red apple", 0)
    assert bench.draw("red apple", 0).isfinite().all()
