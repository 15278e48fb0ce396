# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The whole command, on a random model."""

import json
import math
import shutil
import signal
from types import SimpleNamespace

import drawings
import forked
import pytest
import torch
from PIL import Image
from tiny import tiny_config, write_config

from mmagic_tome import StepCacheConfig, ToMeError
from mmagic_tome.apis.model_config import load_config, setting_config
from mmagic_tome.apis.text2image import Generator, Request
from mmagic_tome.settings import Setting
from mmagic_tome.tuning import check, cli, command, costs, judge, search
from mmagic_tome.tuning.folder import KEPT, SearchFolder
from mmagic_tome.tuning.plot import write_plot
from mmagic_tome.tuning.search import Goal, Trial, psnr_of
from mmagic_tome.tuning.space import Candidate, Window

QUICK = ["--size", "64", "--steps", "6", "--device", "cpu", "--search-prompts", "2"]
QUICK += ["--unseen-prompts", "2"]


def steady_run(generator, numbers, setting, steps, on_step):
    """Costs that are the same on every machine, in place of the clock's: what can be reached, and
    whether at all, depends on them."""
    kinds = {"rest": 0.1, "full": 1.0}
    for one in setting.cache or ():
        kinds[one.region] = {"network": 0.02, "inner": 0.5}[one.region]
    if setting.tome is not None:
        # Merging pays at the coarse level, and at the highest ratio only: few to search among.
        ((level, ratio),) = setting.tome.ratio["downsample"].items()
        kinds["full"] = 1.0 if level == 1 else 4 / 3 - 2 * ratio / 3
    return kinds


@pytest.fixture(scope="module")
def tuning(sd_folder, tmp_path_factory):
    """A config, prompts, and a function that runs the command with costs that are steady."""
    pytest.importorskip("mmagic", reason="the command runs MMagic models")
    folder = tmp_path_factory.mktemp("tuning")
    prompts = folder / "prompts.txt"
    prompts.write_text("a cat\na dog\na cat in red\ndog\n")
    config = write_config(folder / "tiny.py", tiny_config(folder=sd_folder))

    def run(out, *options, config=config, code=0):
        argv = [config, "--prompts", prompts, *QUICK, "--out", out, *options]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(costs, "_run", steady_run)
            patch.setattr(costs, "ROUNDS", 1)
            patch.setattr(costs, "TARGETS", ("attn",))
            patch.setattr(check, "LEAST_PAIRS", 2)
            patch.setattr(search, "MOST_NEIGHBOURS", 3)
            assert cli.main([str(arg) for arg in argv]) == code
        return SimpleNamespace(
            **{
                path.stem: json.loads(path.read_text())
                for path in out.glob("[!.]*.json")
                if path.stem != "manifest"
            }
        )

    return SimpleNamespace(run=run, config=config, folder=folder, prompts=prompts)


@pytest.fixture(scope="module")
def finished(tuning, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    return SimpleNamespace(out=out, found=tuning.run(out, "--psnr", "35"))


def test_the_config_is_what_was_tried(finished):
    result = finished.found.result
    setting = setting_config(load_config(finished.out / "tiny_psnr-35.py"))
    assert setting == Setting.coerce(result["chosen"]["options"]) and not setting.baseline
    assert result["chosen"]["psnr"] is None or result["chosen"]["psnr"] >= 35
    assert result["chosen"]["speedup"] > 1
    # No trial meets the goal and is faster.
    better = [t for t in result["trials"] if t["speedup"] > result["chosen"]["speedup"]]
    assert all(t["psnr"] < 35 for t in better)


def test_the_config_runs_as_it_was_measured(finished, tmp_path):
    """With the size and steps of the search, which its base does not say."""
    from mmagic_tome.apis import cli as infer

    config = str(finished.out / "tiny_psnr-35.py")
    out = tmp_path / "pictures"
    assert infer.main([config, "--prompt", "a cat", "--device", "cpu", "--out", str(out)]) == 0
    (picture,) = out.glob("*.png")
    with Image.open(picture) as image:
        assert image.size == (64, 64) and image.text["steps"] == "6"
        setting = setting_config(load_config(config))
        texts = {key: json.loads(image.text.get(key, "null")) for key in ("tome_cfg", "cache_cfg")}
        told = {} if texts["tome_cfg"] is None else texts["tome_cfg"]
        assert Setting.coerce({**told, "cache": texts["cache_cfg"]}) == setting


def test_trials_are_told_apart_from_the_unseen(finished):
    result = finished.found.result
    assert {len(trial["psnr"]) for trial in finished.found.trials.values()} == {2}
    assert len(result["unseen"]["psnr_of"]) == 2 and result["unseen"]["pairs"] == 2
    assert result["unseen"]["speedup"]["median"] > 0
    assert [one["name"] for one in result["others"]][:3] == ["5 steps", "4 steps", "3 steps"]
    text = (finished.out / "tiny_psnr-35.py").read_text()
    assert f"{result['unseen']['speedup']['median']:.2f}x" in text and "Versions: " in text


def test_the_picture(finished):
    with Image.open(finished.out / "pareto.png") as image:
        assert image.size == (1040, 728)


def test_what_is_in_the_picture(tmp_path, monkeypatch):
    figures = drawings.kept_figures(monkeypatch)
    slow, fast, worse, same = (
        Trial(Candidate(Window(2, 0.1, 0.5)), mse, speedup)
        for mse, speedup in ((1.0, 1.5), (10.0, 2.0), (10.0, 1.2), (0.0, 1.1))
    )
    others = [("preset fast", 1.8, 30.0), ("5 steps", 1.9, 25.0), ("preset none", 1.0, math.inf)]
    checked = {"speedup": {"median": 1.9, "p10": 1.7, "p90": 2.2}, "psnr": 36.0}
    trials, goal = [slow, fast, worse, same], Goal(psnr=35)
    write_plot(tmp_path / "a.png", "title", trials, others, goal, fast, checked)
    (axes,) = figures[0].axes
    lines = drawings.lines_of(axes)
    points = [(trial.speedup, trial.psnr) for trial in (slow, fast, worse)]
    assert points[1] == (2.0, pytest.approx(10 * math.log10(255**2 / 10)))
    assert lines["tried (4)"] == points, "pictures that are the same have no PSNR"
    assert sorted(lines["nothing tried is better in both"]) == points[:2]
    assert lines["chosen: predicted"] == [points[1]]
    assert lines["presets"] == [(1.8, 30.0)] and lines["fewer steps"] == [(1.9, 25.0)]
    assert {y for _, y in lines[f"goal: {goal.text()}"]} == {35}
    (bars,) = [one for one in axes.containers if one.get_label().startswith("chosen: measured")]
    assert bars.lines[0].get_xydata().tolist() == [[1.9, 36.0]]
    assert [cap.get_xdata()[0] for cap in bars.lines[1]] == pytest.approx([1.7, 2.2])
    assert {text.get_text() for text in axes.texts} >= {"preset fast", "5 steps"}


def test_interrupted_and_run_again(tuning, finished, tmp_path, monkeypatch, capsys):
    """Nothing twice, the same result. Costs are the other run's: a clock says nothing twice."""
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(finished.out / "costs.json", out)
    runs = []
    real = judge.Generator.run

    def counted(self, numbers, steps=None, on_step=None):
        runs.append((tuple(numbers), steps))
        if len(runs) == 15:
            raise KeyboardInterrupt
        return real(self, numbers, steps, on_step)

    monkeypatch.setattr(judge.Generator, "run", counted)
    tuning.run(out, "--psnr", "35", code=130)
    assert "run the same command again to go on" in capsys.readouterr().err
    held = json.loads((out / "trials.json").read_text())
    assert held and not (out / "tiny_psnr-35.py").exists()
    found = tuning.run(out, "--psnr", "35")
    expected = finished.found
    assert found.result["chosen"] == expected.result["chosen"]
    assert list(found.trials) == list(expected.trials)
    for key, trial in expected.trials.items():
        assert found.trials[key]["psnr"] == trial["psnr"]
        if key in held:  # the very one: to the last digit of its seconds
            assert found.trials[key] == held[key]
    # Dense pictures and trials once each, but for the one that was broken off; then the warm-ups
    # and pairs of every check.
    per_trial, per_check = 2, 2 + 2 * 2

    def checks(of):
        return sum(map(len, of.checks.values()))

    made = 2 + per_trial * len(found.trials) + per_check * checks(found)
    assert made <= len(runs) <= made + per_trial
    # A third time, with another goal: what was tried is there already.
    before = len(runs)
    more = tuning.run(out, "--psnr", "36", "--overwrite")
    new = len(more.trials) - len(found.trials)
    new_checks = checks(more) - checks(found)
    assert len(runs) - before == per_trial * new + per_check * new_checks


def whole(folder):
    """Name -> time of writing, of all files with a final name; every one of them can be read."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name.startswith("."):
            continue
        if path.suffix == ".json":
            assert json.loads(path.read_text())
        else:
            Image.open(path).load()
        found[str(path.relative_to(folder))] = path.stat().st_mtime_ns
    return found


def test_killed_and_started_again(tuning, tmp_path, monkeypatch):
    """SIGKILL in mid-search, and again while the result is written: whole files, nothing twice."""
    out, output = tmp_path / "run", tmp_path / "output.txt"
    goal = ["--psnr", "35"]

    def killed_at(name, count=1):
        with monkeypatch.context() as patch:
            forked.kill_at(name, patch, count)
            child = forked.start(lambda: tuning.run(out, *goal), output)
        assert forked.status(child, output) == -signal.SIGKILL, output.read_text()
        assert (out / f".part.{name}").exists(), "it was to be killed in the middle"
        return whole(out), json.loads((out / "trials.json").read_text())

    first, held = killed_at("trials.json", 6)
    assert len(held) == 5 and "checks.json" not in first and not list(out.glob("*.py"))
    second, more = killed_at("result.json")
    assert {"checks.json", "pareto.png"} <= set(second) and "result.json" not in second
    assert len(more) > len(held) and not list(out.glob("*.py"))
    # The very ones: seconds of a trial that is made again are others.
    assert all(more[key] == trial for key, trial in held.items())
    changed = {name for name, when in first.items() if second[name] != when}
    assert changed <= {"trials.json", "manifest.json"}

    monkeypatch.setattr(judge.Generator, "run", lambda *_, **__: pytest.fail("made again"))
    found = tuning.run(out, *goal)
    result = found.result
    assert found.trials == more and not list(out.rglob("*.part*"))
    written = setting_config(load_config(out / "tiny_psnr-35.py"))
    assert written == Setting.coerce(result["chosen"]["options"])
    assert len(result["trials"]) + len(result["others"]) >= len(more)


def test_what_cannot_be_reached(tuning, finished, capsys):
    tuning.run(finished.out, "--speedup", "50", code=2)
    error = capsys.readouterr().err
    assert "--speedup 50 cannot be reached" in error and "write --speedup" in error
    assert not (finished.out / "tiny_speedup-50.py").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seed", "5"], "prompts: "),
        (["--cfg-options", "model.unet.attention_head_dim=16"], "networks.unet.attention_head_dim"),
        # Other prompts for the search, though all of them in the same order.
        (["--search-prompts", "1", "--unseen-prompts", "3"], "search_prompts: 2, now 1"),
    ],
)
def test_another_search_is_left_alone(tuning, finished, options, said, capsys):
    tuning.run(finished.out, "--psnr", "30", *options, code=2)
    error = capsys.readouterr().err
    assert "holds another evaluation" in error and said in error


def test_weights_that_changed_are_another_search(tuning, finished, monkeypatch, capsys):
    real = command.build_model

    def changed(*args):
        model = real(*args)
        with torch.no_grad():
            next(model.vae.parameters()).view(-1)[0] += 1e-3
        return model

    monkeypatch.setattr(command, "build_model", changed)
    tuning.run(finished.out, "--psnr", "30", code=2)
    assert "weights: " in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["mmagic_tome", "search_prompts"])
def test_overwriting_another_search_keeps_nothing_of_it(finished, changed, tmp_path):
    """Also where the same pictures would be made: its errors are of other prompts or other code."""
    folder = SearchFolder(tmp_path)
    basis = json.loads((finished.out / "manifest.json").read_text())["fingerprint"]
    assert changed in basis
    folder.open(basis, {}, overwrite=False)
    for name in ("trials.json", "costs.json", "checks.json", "trace.json"):
        folder.keep(name, {"old": 1})
    folder.open(basis, {}, overwrite=True)
    assert folder.kept("trials.json") == {"old": 1}  # the same search
    folder.open({**basis, changed: 3}, {}, overwrite=True)
    assert not any(folder.kept(name) for name in KEPT)


def test_times_of_another_place_are_measured_anew(tuning, finished, tmp_path, monkeypatch, capsys):
    """Costs and pairs of the check; the errors stay what they are."""
    out = tmp_path / "run"
    shutil.copytree(finished.out, out)
    real = command._place
    monkeypatch.setattr(command, "_place", lambda device: {**real(device), "threads": 77})
    found = tuning.run(out, "--psnr", "35", "--overwrite")
    (note,) = [note for note in found.result["notes"] if "another place" in note]
    assert f"threads {torch.get_num_threads()}, now 77" in note and note in capsys.readouterr().out
    assert found.costs["place"]["threads"] == 77 and found.costs != finished.found.costs
    places = [json.loads(place) for place in found.checks]
    assert [place["threads"] for place in places] == [torch.get_num_threads(), 77]
    here = list(found.checks.values())[1]
    seconds = [pair["tuned"] for pairs in here.values() for pair in pairs]
    assert len(seconds) >= 2
    assert found.result["unseen"]["seconds"] == pytest.approx(sum(seconds[-2:]) / 2)
    assert all(found.trials[key] == trial for key, trial in finished.found.trials.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "either --speedup X or --psnr DB, neither was given"),
        (["--speedup", "1.5", "--psnr", "30"], "both were given"),
        (["--speedup", "1"], "--speedup: expected at least 1.01"),
        (["--speedup", "fast"], "--speedup: expected a number, got 'fast'"),
        (["--speedup", "2", "--serch-prompts", "2"], "--serch-prompts"),
        (["--psnr", "30", "--search-prompts", "9"], "write --search-prompts 1 --unseen-prompts 3"),
        (["--psnr", "30", "--prompt-set", "demo"], "--prompts and --prompt-set are both given"),
        (["--psnr", "30", "--write", "a.json"], "ends in .py"),
        (["--psnr", "30", "--size", "60"], "size 60x60 does not fit"),
        (["--psnr", "30", "--cfg-options", "model.tome_cfg.ratio=0.5"], "inside model=dict"),
        (["--psnr", "30", "--cfg-options", "model.cache_cfg=fast"], "to the top as cache_cfg"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(
    tuning, options, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "build_model", lambda *_: pytest.fail("loaded"))
    tuning.run(tmp_path / "out", *options, code=2)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.json"))


def test_no_file_is_replaced_unasked(tuning, tmp_path, capsys):
    target = tmp_path / "mine.py"
    target.write_text("precious")
    for options in ((), ("--overwrite",)):
        path = tuning.config if options else target
        tuning.run(tmp_path / "out", "--psnr", "30", "--write", path, *options, code=2)
    error = capsys.readouterr().err
    assert "mine.py exists; write --overwrite" in error and "is the config to tune" in error
    assert target.read_text() == "precious"


def test_a_sampler_with_noise_keeps_the_network_running(sd_folder):
    from tiny import tiny_model

    schedule = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    sampler = dict(type="EulerAncestralDiscreteScheduler", **schedule)
    request = SimpleNamespace(steps=6)
    for changes, expected in (
        ({}, (["network", "inner"], 1)),
        (dict(scheduler=sampler, test_scheduler=sampler), (["inner"], 0)),
    ):
        model = tiny_model(folder=sd_folder, **changes)
        notes = []
        found = command._regions(SimpleNamespace(model=model, request=request), notes)
        assert found == expected
        assert bool(notes) == bool(changes)
    assert "EulerAncestralDiscreteScheduler adds noise" in notes[0]


def test_prompts_of_a_config(tmp_path):
    """Those of its evaluation, else enough of its pictures, else the demo model's with a note."""
    args = SimpleNamespace(
        prompts=None,
        prompt_set=None,
        search_prompts=2,
        unseen_prompts=4,
        config_path=tmp_path / "c",
    )
    plain = SimpleNamespace(seed=3, negative_prompt="rain")
    (tmp_path / "mine.txt").write_text("\n".join("abcdef"))
    own = dict(infer_cfg=dict(prompts=list("uvwxyz")))
    for config, source, first in (
        (own, "the config", ["u", "x"]),
        ({**own, "evaluation": dict(prompts="mine.txt")}, "mine.txt", ["a", "d"]),
        (dict(infer_cfg=dict(prompts=["one"])), "built-in set 'demo'", None),
    ):
        notes = []
        found, prompts = command._prompts(args, config, plain, notes)
        assert found == source and len(prompts) == 6 and bool(notes) == (first is None)
        assert first is None or [prompt.text for prompt in prompts[:2]] == first
        assert len({prompt.seed for prompt in prompts}) == 6
        assert all(prompt.negative == "rain" for prompt in prompts)


class FakeSearch:
    """Finds just what is asked for."""

    top = 3.0

    def __init__(self):
        self.goals = []

    def run(self, goal):
        assert goal.speedup <= self.top
        self.goals.append(goal.speedup)
        return Trial(Candidate(Window(2, 0.1, 0.5)), 10.0, goal.speedup)


@pytest.mark.parametrize(("pace", "checks"), [(1.0, 1), (0.9, 2), (0.2, 2)])
def test_a_goal_that_was_only_predicted_is_set_higher(pace, checks, monkeypatch):
    """`pace`: what the clock says of a prediction."""
    fake, notes = FakeSearch(), []

    def measured(judge, unseen, options, place):
        return {"speedup": {"median": pace * fake.goals[-1]}, "psnr": 40.0}

    monkeypatch.setattr(command, "check", measured)
    bar = SimpleNamespace(close=lambda: None)
    trial, checked = command._best(fake, Goal(speedup=1.5), None, range(2), {}, bar, notes)
    assert len(fake.goals) == checks and fake.goals == sorted(fake.goals)
    assert checked["speedup"]["median"] == pace * trial.speedup
    missed = [note for note in notes if note.startswith("MISSED: 1.5x")]
    assert bool(missed) == (pace == 0.2)
    assert (checked["speedup"]["median"] >= 1.5) == (pace != 0.2)


@pytest.mark.parametrize(
    ("harder", "top", "checks", "missed"),
    [
        (0.0, 60, 1, False),
        (2.0, 60, 2, False),  # the second time round the goal is 2 dB higher
        (2.0, 31, 1, True),  # and here nothing has so many
        (None, 60, 3, True),  # whatever the goal, 1 dB too few
    ],
)
def test_a_psnr_that_only_the_search_prompts_have(harder, top, checks, missed, monkeypatch):
    """`harder`: dB that the unseen prompts have less; `top`: dB beyond which nothing is found."""
    goals, made = [], []

    def run(goal):
        if goal.psnr > top:
            raise ToMeError("cannot be reached")
        goals.append(goal.psnr)
        return Trial(Candidate(Window(2, 0.1, 0.5)), 255**2 / 10 ** (goal.psnr / 10), 2.0)

    def measured(*_):
        made.append(29.0 if harder is None else goals[-1] - harder)
        return {"speedup": {"median": 1.9}, "psnr": made[-1]}

    monkeypatch.setattr(command, "check", measured)
    notes = []
    bar = SimpleNamespace(close=lambda: None)
    search = SimpleNamespace(run=run)
    trial, checked = command._best(search, Goal(psnr=30.0), None, range(2), {}, bar, notes)
    assert len(goals) == checks and goals == sorted(goals)
    assert bool([note for note in notes if note.startswith("MISSED: 30 dB")]) == missed
    assert checked["psnr"] == max(made) and (checked["psnr"] >= 30) == (not missed)
    assert trial.psnr == pytest.approx(goals[made.index(max(made))])


@pytest.mark.parametrize(
    ("measured", "said"), [(1.9, "2.00x measures 1.90x"), (0.9, "MISSED: 0.90x is no faster")]
)
def test_a_psnr_that_takes_longer_than_was_predicted(measured, said, monkeypatch):
    checked = {"speedup": {"median": measured}, "psnr": None}
    monkeypatch.setattr(command, "check", lambda *_: checked)
    fake = SimpleNamespace(run=lambda goal: Trial(Candidate(Window(2, 0.1, 0.5)), 0.0, 2.0))
    notes = []
    bar = SimpleNamespace(close=lambda: None)
    command._best(fake, Goal(psnr=30.0), None, range(2), {}, bar, notes)
    (note,) = notes
    assert said in note


def test_fewer_steps_that_are_better_are_said():
    trial = Trial(Candidate(Window(2, 0.1, 0.5)), 10.0, 1.5)
    worse = [("8 steps", 1.2, trial.psnr + 9), ("5 steps", 1.9, trial.psnr - 1)]
    assert command._beaten_by(worse, trial, Goal(psnr=30)) == []
    (note,) = command._beaten_by(
        [*worse, ("6 steps", 1.4, trial.psnr + 1)], trial, Goal(speedup=1.4)
    )
    assert "with 6 steps is better" in note and "1.40x" in note


def test_pairs_in_turn():
    pairs = [
        dict(dense=2.0, tuned=1.0, psnr=[30.0, None], pictures=2),
        dict(dense=3.0, tuned=1.0, psnr=[20.0], pictures=1),
        dict(dense=8.0, tuned=2.0, psnr=[10.0, 10.0], pictures=2),  # a second time round
    ]
    found = check.summary(pairs, batches=2)
    assert found["speedup"]["median"] == 3 and found["pairs"] == 3
    errors = [10**-3.0, 0.0, 10**-2.0]
    assert found["psnr"] == pytest.approx(psnr_of(255**2 * sum(errors) / 3))
    assert found["psnr_of"] == [30.0, None, 20.0] and found["seconds"] == 1.0


def test_costs_become_a_space():
    measured = dict(
        network_skipped=0.01, inner_skipped=1.1, rest=1.0, inner_levels=[2], prop_attn=["attn"],
        merges=[["attn", 1, 0.25, -0.1], ["attn", 1, 0.5, -0.05], ["attn", 1, 0.75, -0.2]],
    )  # fmt: skip
    space = costs.space_of(measured, order=1)
    # An inner region that costs more when it is skipped, and a ratio that saves less.
    assert space.regions == ("network",) and space.merges == {"attn": {1: (0.25, 0.75)}}
    assert costs.costs_of(measured).merges["attn", 1, 0.75] == -0.2


def test_costs_by_the_clock(sd_folder):
    """Seconds of calls by what is skipped at them, and of all around the calls."""
    from tiny import tiny_model

    request = Request(["a cat"], steps=4, size=(64, 64), guidance=3.0)
    generator = Generator(tiny_model(folder=sd_folder), request)
    cached = Setting(cache=(StepCacheConfig(region="network", timestep_range=(0.0, 1.0)),))
    merged = costs.merging("attn", 1, 0.5, False)
    for setting, kinds in (
        (Setting(), {"full"}),
        (cached, {"full", "network"}),
        (merged, {"full"}),
    ):
        steps = []
        found = costs._run(generator, [0], setting, 4, lambda steps=steps: steps.append(1))
        assert set(found) == {"rest", *kinds} and min(found.values()) > 0 and len(steps) == 4
        # The first call is left out; the other three are of these kinds.
        others = generator.step_seconds[1:]
        assert min(others) <= min(found[kind] for kind in kinds)
        assert max(found[kind] for kind in kinds) <= max(others)


@pytest.fixture
def clock(monkeypatch, sd_folder):
    """Costs of a tiny model by a clock of arithmetic: (measured, what ran, in turn)."""
    from tiny import tiny_model

    generator = SimpleNamespace(
        model=tiny_model(folder=sd_folder), request=SimpleNamespace(steps=8, batch_size=1)
    )
    ran = []

    def run(generator, numbers, setting, steps, on_step):
        ran.append((setting, steps))
        if setting.tome is None:
            return {"rest": 1.0, "full": 1.0}
        # Matching costs a third of all; what is merged costs nothing.
        ((_, ratio),) = setting.tome.ratio["downsample"].items()
        return {"rest": 1.0, "full": 4 / 3 - 2 * ratio / 3}

    monkeypatch.setattr(costs, "_run", run)
    monkeypatch.setattr(costs, "TARGETS", ("attn",))

    def measure(**options):
        ran.clear()
        return costs.measure_costs(generator, [0], [], 1, 60.0, **options), list(ran)

    return measure


def test_merging_that_pays_at_a_high_ratio_only_is_found(clock):
    measured, _ = clock()
    found = {ratio for _, _, ratio, _ in measured["merges"]}
    assert found == {0.75}
    assert all(added == pytest.approx(-1 / 6) for *_, added in measured["merges"])


def test_costs_that_were_broken_off_go_on(clock, monkeypatch):
    expected, ran = clock()
    real, rounds, files = costs._run, {}, []

    def keep():
        files.append(json.dumps(rounds))

    for end in (7, 2 + 2 * 3):  # in the second round; in the second one after that
        runs = iter(range(end))

        def stops(*args, runs=runs):
            if next(runs, None) is None:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(costs, "_run", stops)
        with pytest.raises(KeyboardInterrupt):
            clock(rounds=rounds, keep=keep)
        rounds = json.loads(files[-1])
    held = json.loads(files[-1])
    monkeypatch.setattr(costs, "_run", real)
    found, again = clock(rounds=rounds, keep=keep)
    assert found == expected
    assert rounds["first"][: len(held["first"])] == held["first"] and len(held["first"]) >= 2
    assert len(rounds["first"]) == costs.ROUNDS and len(again) < len(ran)
    # Nothing is left to do; and rounds of other code are not taken.
    assert clock(rounds=rounds, keep=keep) == (expected, [])
    rounds["first"][0].popitem()
    assert len(clock(rounds=rounds)[1]) == len(ran)


def test_a_picture_that_is_not_a_number_ends_it(monkeypatch, tmp_path):
    class Watch:
        def __init__(self, model):
            self.finite = [True, False]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    class NoTrace(Watch):
        times = ()

    monkeypatch.setattr(judge, "LatentWatch", Watch)
    monkeypatch.setattr(judge, "Trace", NoTrace)
    generator = SimpleNamespace(
        model=None, request=SimpleNamespace(steps=1, batch_size=2), run=lambda *_, **__: ([], None)
    )
    one = judge.Judge(generator, range(2), judge.SearchFolder(tmp_path))
    with pytest.raises(ToMeError, match="write --dtype fp32"):
        one.make_dense()
