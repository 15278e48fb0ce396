# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Tuning: the search with invented figures, then commands with tiny models."""

import math
import random
import runpy

import pandas as pd
import pytest

from mmagic_tome import ToMeError, get_handle
from mmagic_tome.lab import tune as module
from mmagic_tome.lab.request import Request
from mmagic_tome.lab.runners import open_source
from mmagic_tome.lab.runners.mmagic import MMagicRunner
from mmagic_tome.lab.tune import HIGH, LOW, PROBES, Target, search, split, tune

PROMPTS = ["cat", "dog", "a", "b"]
QUICK = ["--size", "64", "--steps", "8", "--device", "cpu", "--rounds", "1"]


# --- the search -----------------------------------------------------------------------------------


class Machine:
    """Speed-up and PSNR by tolerance: both monotone, but for noise."""

    def __init__(self, fastest=2.0, noise=0.0, seed=0):
        self.fastest, self.noise, self.random = fastest, noise, random.Random(seed)
        self.tried = []

    def __call__(self, tolerance):
        self.tried.append(tolerance)
        part = math.log(tolerance / LOW) / math.log(HIGH / LOW)
        factor = 1 + self.random.uniform(-self.noise, self.noise)
        speedup = (1 + (self.fastest - 1) * part) * factor
        return {
            "tolerance": tolerance,
            "speedup": speedup,
            "psnr_p5": 20 - 20 * math.log10(tolerance),
        }


@pytest.mark.parametrize(
    ("target", "exact"),
    # Halfway in the logarithm is a speed-up of 1.5; 50 dB is a tolerance of 10 ** -1.5.
    [(Target("speedup", 1.5), math.sqrt(LOW * HIGH)), (Target("psnr_p5", 50), 10**-1.5)],
)
def test_bisection_finds_the_edge(target, exact):
    machine = Machine()
    rows = search(machine, target)
    found = target.best(rows)
    assert target.meets(found) and len(machine.tried) == len(set(machine.tried)) <= PROBES
    # Five halvings of a factor of 500, and two digits.
    resolution = 1.3
    low, high = (1, resolution) if target.key == "speedup" else (1 / resolution, 1)
    assert low * 0.98 <= found["tolerance"] / exact <= high * 1.02
    assert all(float(f"{one:.2g}") == one for one in machine.tried)


@pytest.mark.parametrize("seed", range(20))
def test_noise_does_not_choose_what_missed_the_target(seed):
    target, machine = Target("speedup", 1.5), Machine(noise=0.15, seed=seed)
    rows = search(machine, target)
    found = target.best(rows)
    met = [row for row in rows if row["speedup"] >= 1.5]
    assert found in met and found["psnr_p5"] == max(row["psnr_p5"] for row in met)
    assert len(machine.tried) <= PROBES


def test_a_speed_up_out_of_reach_gets_the_closest_that_is_as_fast():
    def measure(tolerance):
        return {
            "tolerance": tolerance,
            "speedup": min(1.6, 1 + 12 * tolerance),
            "psnr_p5": -tolerance,
        }

    target = Target("speedup", 3)
    found = target.best(search(measure, target))
    assert not target.meets(found) and found["speedup"] >= 0.98 * 1.6
    assert found["tolerance"] < 0.07


def test_a_psnr_out_of_reach_gets_the_closest_images():
    target = Target("psnr_p5", 99)
    found = target.best(search(Machine(), target))
    assert not target.meets(found) and found["tolerance"] < 0.0015


def test_the_largest_tolerance_ends_the_search_if_it_is_close_enough():
    machine = Machine()
    assert len(search(machine, Target("psnr_p5", 20))) == 1 and machine.tried == [HIGH]


def test_the_other_quantity_decides_and_small_differences_in_speed_do_not():
    slow, fast = {"speedup": 1.50, "psnr_p5": 48.0}, {"speedup": 1.80, "psnr_p5": 47.0}
    same = {"speedup": 1.79, "psnr_p5": 47.5}
    assert Target("speedup", 1.4).best([fast, slow, same]) is slow
    assert Target("psnr_p5", 46).best([fast, slow, same]) is same
    assert Target("speedup", 2).best([slow, fast, same]) is same
    assert Target("psnr_p5", 50).best([fast, slow, same]) is slow


@pytest.mark.parametrize(("key", "value"), [("speedup", 1), ("psnr_p5", 0), ("psnr_p5", math.nan)])
def test_targets_that_mean_nothing_are_refused(key, value):
    name = key[:7].removesuffix("_p5")
    with pytest.raises(ToMeError, match=rf"{name}=.*; write {name}="):
        Target(key, value)


# --- prompts --------------------------------------------------------------------------------------


def test_no_prompt_is_in_both_parts_and_images_keep_what_is_theirs():
    request = Request(
        ["a", "b", "a", "c", "d"],
        negative_prompt=["-a", "-b", "-a", "-c", "-d"],
        seed=5,
        images=["0.png", "1.png", "2.png", "3.png", "4.png"],
    )
    parts = split(request, 12)
    assert [*parts["search"].prompts] == ["a", "a", "c"] and parts["search"].seed == [5, 7, 8]
    assert [*parts["check"].prompts] == ["b", "d"] and parts["check"].seed == [6, 9]
    assert parts["search"].images == ["0.png", "2.png", "3.png"]
    assert parts["check"].negative_prompt == ["-b", "-d"]
    assert [len(one) for one in split(Request([*"abcdefghij"]), 4).values()] == [2, 2]
    with pytest.raises(ToMeError, match="state two or more"):
        split(Request(["a", "a"]), 12)


# --- commands -------------------------------------------------------------------------------------


@pytest.fixture
def config(configs):
    return configs["cache_on_top"]


@pytest.fixture
def speeds(monkeypatch):
    """Speed-ups by method and by part, in place of the clock's."""
    measured = module.evaluate_runner

    def set_to(function):
        def changed(runner, methods, metrics, rounds, folder, **how):
            frame = measured(runner, methods, metrics, rounds, folder, **how)
            frame["speedup"] = [function(folder.name, name) for name in frame["method"]]
            return frame

        monkeypatch.setattr(module, "evaluate_runner", changed)

    return set_to


def test_a_config_is_written_that_infer_runs(config, command, tmp_path):
    work_dir = tmp_path / "out"
    words = ["tune", config, "--psnr", "1", "--prompt", *PROMPTS, *QUICK, "--work-dir", work_dir]
    code, out, err = command(*words, "--cfg-options", "model.enable_xformers=False")
    assert code == 0, err
    (folder,) = work_dir.iterdir()
    assert "search: cat, a\n" in out and "check: dog, b\n" in out and "psnr 1 is met" in out
    new = folder / "cache_on_top_tuned.py"
    source = open_source(new)
    assert source.setting.cache[0].tolerance == HIGH and source.defaults["steps"] == 8
    assert source.config.custom_imports.imports == ["mmagic_tome"]
    code, out, err = command("infer", new, "--prompt", "cat", "--device", "cpu")
    assert code == 0 and "step caching" in out, err

    table = pd.read_csv(folder / "check" / "results.csv")
    assert [*table["method"]] == ["baseline", "tolerance 0.5", "6 steps", "5 steps", "4 steps"]
    assert {*table["images"]} == {2} and (folder / "check" / "report.html").is_file()


def test_a_missed_speed_up_is_said_and_ends_with_1(config, command, speeds, tmp_path):
    speeds(lambda part, name: 1.25)
    words = ["tune", config, "--speedup", "9", "--prompt", *PROMPTS, *QUICK]
    code, out, _ = command(*words, "--work-dir", tmp_path / "out")
    assert code == 1 and "speedup 9 is out of reach" in out and "speedup 9 is missed" in out
    assert list(tmp_path.glob("out/*/cache_on_top_tuned.py"))


def test_a_check_that_misses_goes_one_step_on(config, speeds, tmp_path):
    speed = {"tolerance 0.5": 1.9, "tolerance 0.022": 1.6}
    speeds(lambda part, name: speed.get(name, 1.1) - (part == "check") * 0.2)
    request = Request(PROMPTS, steps=6, size=(64, 64))
    how = {"rounds": 1, "folder": tmp_path / "out", "progress": False}
    found = tune(open_source(config), request, Target("speedup", 1.5), **how)
    assert [row["method"] for row in found["table"]] == ["tolerance 0.022", "tolerance 0.5"]
    assert found["met"] and found["tolerance"] == 0.5


def test_what_was_measured_is_not_run_again(config, command, tmp_path, monkeypatch):
    words = ["tune", config, "--prompt", *PROMPTS, *QUICK, "--work-dir", tmp_path / "out"]
    code, _, err = command(*words, "--psnr", "1")
    assert code == 0, err
    monkeypatch.setattr(MMagicRunner, "run", lambda *args, **kw: pytest.fail("was run again"))
    assert command(*words, "--psnr", "2", "--resume")[0] == 0
    assert len(list((tmp_path / "out").iterdir())) == 1
    code, _, err = command(*words, "--psnr", "2", "--resume", "--seed", "3")
    assert code == 2 and "holds another run" in err


def test_a_pipeline_gets_a_python_file(command, pipeline_folder, tmp_path):
    folder, work_dir = pipeline_folder("sd"), tmp_path / "out"
    words = ["tune", "--pipeline", folder, "--psnr", "1", "--prompt", *PROMPTS]
    code, _, err = command(*words, *QUICK, "--work-dir", work_dir)
    assert code == 0, err
    (path,) = work_dir.glob("*/*_tuned.py")
    pipeline = runpy.run_path(str(path))["pipeline"]
    assert get_handle(pipeline, "cache") is not None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--prompt cat dog", "--speedup 1.5, or --psnr 45"),
        ("--psnr 45 --speedup 2 --prompt cat dog", "not allowed with"),
        ("--speedup 0.9 --prompt cat dog", "write speedup=1.5"),
        ("--psnr 45 --prompt cat", "state two or more"),
        ("--psnr 45 --prompt cat dog --steps 3", "too few for step caching"),
        ("--psnr 45 --prompt cat dog --cfg-options model.cache_cfg=fast", "configured twice"),
    ],
)
def test_bad_input_is_found_before_weights_are_loaded(
    words, said, config, command, no_loading, tmp_path
):
    code, _, err = command("tune", config, *words.split(), "--work-dir", tmp_path / "out")
    assert code == 2 and said in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_dry_run_states_both_parts(config, command, no_loading, tmp_path):
    words = ["tune", config, "--speedup", "1.5", "--prompt", *PROMPTS, "--device", "cpu"]
    code, out, _ = command(*words, "--dry-run", "--work-dir", tmp_path / "out")
    assert code == 0 and "tuned for speedup 1.5" in out and "nothing was run" in out
    assert "search: cat, a" in out and "check: dog, b" in out and not (tmp_path / "out").exists()
