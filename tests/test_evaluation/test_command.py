# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``tools/evaluate.py`` with a random model: from start to end, killed, on two processes."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from evaluations import METRICS, QUICK, pixels, quality
from PIL import Image
from tiny import tiny_config, write_config

from mmagic_tome.__main__ import main as package_main
from mmagic_tome.apis import asset_path
from mmagic_tome.evaluation import cli, command, generate, report, timing
from mmagic_tome.evaluation.contenders import Contender
from mmagic_tome.evaluation.store import RunFolder

ROOT = Path(__file__).resolve().parents[2]
NO_COST = ["--cost-rounds", "0"]


def test_results(finished):
    rows = {row["name"]: row for row in finished.results["contenders"]}
    assert list(rows) == ["dense", "ratio 0.25", "ratio 0.5", "tomesd 0.5", "2 steps"]
    assert [row["kind"] for row in rows.values()] == ["dense", "tome", "tome", "tomesd", "steps"]
    assert all(row["pictures"] == 5 for row in rows.values())
    assert "skipped" in rows["dense"]["quality"]["psnr"]
    # The sites that merge lose what was asked for.
    assert rows["ratio 0.25"]["tokens_removed"] == pytest.approx(0.25, abs=0.02)
    assert rows["ratio 0.5"]["tokens_removed"] == pytest.approx(0.5, abs=0.02)
    assert rows["ratio 0.25"]["quality"]["latent_error"]["value"] > 0
    for row in rows.values():
        assert len(row["cost"]["step_ms"]) == row["steps"]
        assert 0 < row["cost"]["unet_tflop_per_image"] < row["cost"]["tflop_per_image"]
        # Tensors of a forward are held within a run; the weights are in neither.
        assert 0 < row["cost"]["unet_memory_per_image"] <= row["cost"]["memory_per_image"]
        assert row["cost"]["joules_per_image"] is None  # no GPU that counts them
    dense, half = rows["dense"]["cost"], rows["2 steps"]["cost"]
    assert half["memory_factor"] == half["unet_memory_factor"] == 1  # exactly, unlike a process's
    assert half["unet_tflop_per_image"] == pytest.approx(dense["unet_tflop_per_image"] / 2)
    assert dense["speedup"] == {"median": 1, "p10": 1, "p90": 1}
    raw = json.loads((finished.folder / "cost.json").read_text())["contenders"]["dense"]
    assert len(raw["seconds"]) == 3 and len(raw["blocks"]) > 0


def test_values_are_those_of_the_pictures(finished):
    """A second way to the same numbers: numpy over the files that were written."""
    folder = RunFolder(finished.folder)
    errors = []
    for number in range(5):
        dense, merged = (
            np.asarray(folder.picture(name, number)).astype(float)
            for name in ("dense", "ratio-0.5")
        )
        errors.append(np.square(dense - merged).mean())
    row = finished.results["contenders"][2]["quality"]
    assert row["psnr"]["value"] == pytest.approx(10 * np.log10(255**2 / np.mean(errors)))
    relative = []
    for number in range(5):
        dense, merged = (folder.latents(name, number) for name in ("dense", "ratio-0.5"))
        relative.append(np.linalg.norm(merged - dense) / np.linalg.norm(dense))
    assert row["latent_error"]["value"] == pytest.approx(np.mean(relative), rel=1e-5)


def test_seeds_and_negative_prompts_are_the_prompts_own(finished, evaluation, tmp_path):
    """One picture alone, without a batch or neighbours, has the noise it had among them."""
    record = RunFolder(finished.folder).record("dense", 1)
    assert (record["seed"], record["negative_prompt"]) == (7, "a cat")
    alone = tmp_path / "alone.json"
    alone.write_text('[{"prompt": "a dog", "negative_prompt": "a cat", "seed": 7}]')
    evaluation.run(tmp_path / "run", *METRICS, *NO_COST, prompts=alone)
    picture = np.asarray(RunFolder(tmp_path / "run").picture("dense", 0)).astype(int)
    among = np.asarray(RunFolder(finished.folder).picture("dense", 1)).astype(int)
    assert np.abs(picture - among).max() <= 1  # another batch size, another order of sums


def test_again_makes_nothing_and_adds_what_is_new(finished, evaluation, tmp_path, monkeypatch):
    before = pixels(finished.folder)
    made = []
    real_run = generate.Generator.run

    def run(self, numbers, *args, **kwargs):
        made.append(numbers)
        return real_run(self, numbers, *args, **kwargs)

    monkeypatch.setattr(generate.Generator, "run", run)
    again = evaluation.run(finished.folder, *finished.options, "--cost-rounds", "3")
    assert not made
    assert quality(again) == quality(finished.results)
    assert again["contenders"][1]["cost"] == finished.results["contenders"][1]["cost"]
    # Dense pictures serve another folder too; a contender with a preset of its own is added.
    out = tmp_path / "other"
    named = ["--tome", "mine={'ratio': 0.5, 'use_rand': False}"]
    options = [*named, "--batch-size", "2", *METRICS, *NO_COST, "--dense", finished.folder]
    results = evaluation.run(out, *options)
    assert [row["name"] for row in results["contenders"]] == ["dense", "mine", "2 steps"]
    assert len(made) == 6  # three batches of each of the other two
    assert {k: v for k, v in pixels(out).items() if "/dense/" in k}.items() <= before.items()


@pytest.mark.usefixtures("no_page")
def test_step_caching(evaluation, tmp_path):
    """Alone and with merging: other pictures, fewer operations, and on record what was skipped."""
    out = tmp_path / "run"
    named = ["--tome", "both={'ratio': 0.5, 'cache': 'fast'}"]
    options = ["--cache", "fast", *named, "--batch-size", "5", "--steps", "6", *METRICS]
    results = evaluation.run(out, *options, "--cost-rounds", "1")
    rows = {row["name"]: row for row in results["contenders"]}
    assert list(rows) == ["dense", "cache fast", "both", "3 steps"]
    cost = json.loads((out / "cost.json").read_text())["contenders"]
    for name in ("cache fast", "both"):
        assert rows[name]["quality"]["psnr"]["value"] is not None
        regions = {row["region"]: row for row in cost[name]["regions"]}
        assert regions["network"]["skipped"] > 0
        assert cost[name]["flops"] < cost["dense"]["flops"]
        steps = [len(cost[one]["step_seconds"][0]) for one in ("dense", name)]
        assert steps[0] == steps[1], "steps that were skipped are timed, too"
    assert cost["both"]["targets"] and not cost["cache fast"]["targets"]
    specs = json.loads((out / "manifest.json").read_text())["contenders"]
    assert specs["cache fast"]["cache_cfg"] == specs["both"]["cache_cfg"]
    assert "tome_cfg" not in specs["cache fast"] and specs["both"]["tome_cfg"] == {}
    table = (out / "table.md").read_text()
    assert "| cache fast | 0 + cache | 6 |" in table and "| both | 50 + cache | 6 |" in table


@pytest.fixture
def no_page(monkeypatch):
    """No ``report.html``, whose plots take longer than all else where times were measured."""
    monkeypatch.setattr(report, "page", lambda *_: "")


@pytest.mark.usefixtures("no_page")
def test_timing_comes_later_and_goes_on_round_by_round(evaluation, tmp_path, monkeypatch):
    """Pictures first, times another day; killed between two rounds, none is lost or repeated."""
    out = tmp_path / "run"
    # Memory and operations, which `test_results` looks at, are not what this is about.
    inside = dict(blocks=[], peak_bytes=8, unet_peak_bytes=4, unet_flops=1, flops=2)
    looked_inside = []
    monkeypatch.setattr(timing, "_inside", lambda *args: looked_inside.append(args) or dict(inside))
    options = ["--ratios", "0.5", "--batch-size", "2", *METRICS]
    results = evaluation.run(out, *options, *NO_COST)
    assert results["cost_measured"] is None and not (out / "cost.json").exists()
    assert "s/img" not in (out / "table.md").read_text()
    before = pixels(out)
    real_round, turns = timing._round, []

    def stops_in_the_second(*args):
        turns.append(args[-2])
        if len(turns) == 2:
            raise KeyboardInterrupt
        real_round(*args)

    monkeypatch.setattr(timing, "_round", stops_in_the_second)
    argv = [evaluation.config, "--prompts", str(evaluation.prompts), *QUICK, *options]
    code = cli.main([*argv, "--out", str(out), "--cost-rounds", "3"])
    assert code == 130
    first = json.loads((out / "cost.json").read_text())
    assert first["rounds"] == 1
    # Half a measurement is none in a report.
    assert evaluation.run(out, *options, *NO_COST)["cost_measured"] is None
    results = evaluation.run(out, *options, "--cost-rounds", "3")
    assert turns == [0, 1, 1, 2] and len(looked_inside) == 3
    cost = json.loads((out / "cost.json").read_text())
    assert cost["rounds"] == results["cost_measured"]["rounds"] == 3
    for name, figures in cost["contenders"].items():
        assert len(figures["seconds"]) == 3
        assert figures["seconds"][0] == first["contenders"][name]["seconds"][0]
    # More rounds are added, fewer are all there, and none are asked for: all as they are.
    assert evaluation.run(out, *options, "--cost-rounds", "4")["cost_measured"]["rounds"] == 4
    assert turns == [0, 1, 1, 2, 3] and len(looked_inside) == 3
    assert evaluation.run(out, *options, *NO_COST)["cost_measured"]["rounds"] == 4
    assert len(turns) == 5 and pixels(out) == before
    # Runs of other pictures are no rounds of the same measurement.
    results = evaluation.run(out, *options, "--cost-rounds", "1", "--cost-batch-size", "1")
    measured = results["cost_measured"]
    assert (measured["rounds"], measured["pictures_per_run"]) == (1, 1)
    assert turns[5:] == [0] and len(looked_inside) == 6
    # Nothing to measure: what is there stays.
    assert evaluation.run(out, *options, *NO_COST)["cost_measured"] == measured
    assert pixels(out) == before


def test_cost_of_more_pictures_than_a_batch_is_refused(evaluation, tmp_path, capsys):
    options = ["--batch-size", "2", *METRICS, "--cost-batch-size", "3"]
    evaluation.run(tmp_path / "run", *options, code=2)
    error = capsys.readouterr().err
    assert "cost_batch_size 3 is more than batch_size 2" in error and "write at most 2" in error
    assert not (tmp_path / "run").exists()


def test_few_rounds_are_certain_of_nothing():
    figures = dict(
        unet_seconds=[1.0, 1.0], step_seconds=[[1.0]] * 2, joules=[None] * 2,
        process_peak_bytes=[None] * 2, peak_bytes=8, unet_peak_bytes=4, unet_flops=1, flops=2,
    )  # fmt: skip

    def found(fast):
        rounds = {"dense": [2.0] * len(fast), "fast": fast}
        contenders = {name: {**figures, "seconds": seconds} for name, seconds in rounds.items()}
        cost = dict(pictures=1, rounds=len(fast), contenders=contenders)
        return timing.summarise(cost, "dense")["fast"]

    assert not found([1.0] * 4)["certain"]
    five = found([1.0, 1.1, 1.2, 1.3, 1.9])
    assert five["certain"] and five["speedup"]["median"] == 2 / 1.2
    assert found([2.1, 2.2, 2.3, 2.4, 3.0])["certain"], "slower is certain, too"
    # One round on the other side is enough for doubt, however far the others are.
    assert not found([1.0, 1.0, 1.0, 1.0, 2.1])["certain"]
    assert found([1.0] * 8 + [2.1])["certain"], "but not of nine"
    # Where there is no difference it is certain as seldom as its intervals promise.
    noise = np.random.default_rng(0)
    sure = [found((2 * noise.lognormal(0, 0.1, 5)).tolist())["certain"] for _ in range(1000)]
    assert 0.04 < np.mean(sure) < 0.085, "2 / 2**5"


def test_dense_runs_again_among_many_and_its_time_is_the_mean():
    """One slow run of it must not make all others look fast; few need it once."""
    dense = Contender("dense")
    others = [Contender(f"{n} steps", steps=n) for n in range(1, 19)]
    names = [x.name for x in timing._order([dense, *others])]
    assert [i for i, name in enumerate(names) if name == "dense"] == [0, 9, 18]
    assert [name for name in names if name != "dense"] == [x.name for x in others]
    assert timing._order([dense, *others[:8]]) == [dense, *others[:8]]
    assert timing._order([dense]) == [dense]

    runs = [
        dict(zip(timing.PER_RUN, (1.0, 0.5, [0.2, 0.3], 10, None))),
        dict(zip(timing.PER_RUN, (3.0, 1.5, [0.6, 0.5], 30, None))),
    ]
    assert timing._together(runs) == dict(
        seconds=2.0, unet_seconds=1.0, step_seconds=[0.4, 0.4], process_peak_bytes=30, joules=None
    )
    assert timing._together(runs[:1]) == runs[0]


def test_a_full_disk_is_one_line_and_what_is_there_serves(
    evaluation, tmp_path, monkeypatch, capsys
):
    """In the middle of the pictures; with room again the same command goes on."""
    out = tmp_path / "run"
    options = ["--ratios", "0.5", "--batch-size", "2", *METRICS, *NO_COST]
    real_save, saved = Image.Image.save, []

    def save(self, path, *args, **kwargs):
        if len(saved) == 3:
            Path(path).write_bytes(b"half a pict")
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(path)
        real_save(self, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save)
        assert evaluation.run(out, *options, code=2) is None
    error = capsys.readouterr().err
    assert f"cannot write to {out}: No space left on device" in error
    assert "run the same command again" in error and "Traceback" not in error
    assert len(pixels(out)) == 3 and not list(out.rglob("*.part*"))
    assert all(row["pictures"] == 5 for row in evaluation.run(out, *options)["contenders"])


def test_what_does_not_fit_is_named(finished, evaluation, tmp_path, capsys):
    evaluation.run(finished.folder, *finished.options, "--steps", "6", code=2)
    error = capsys.readouterr().err
    assert "holds another evaluation" in error and "steps: 4, now 6" in error
    assert "--overwrite" in error and error.count("\n") == error.count("\n", -1)
    options = ["--ratios", "0.5", *METRICS, *NO_COST, "--batch-size", "3"]
    evaluation.run(tmp_path / "x", *options, "--dense", finished.folder, code=2)
    assert "do not fit: they differ in batch_size: 2, now 3" in capsys.readouterr().err


def test_killed_and_started_again(finished, evaluation, tmp_path, monkeypatch):
    """SIGKILL in the middle of the pictures: nothing half-written, the same results."""
    out, output = tmp_path / "run", tmp_path / "output.txt"
    with monkeypatch.context() as patch:
        forked.kill_at("ratio-0.25/000003.json", patch)
        child = forked.start(lambda: evaluation.run(out, *finished.options, *NO_COST), output)
    assert forked.status(child, output) == -signal.SIGKILL, output.read_text()
    half = pixels(out)
    assert len(half) == 5 + 3, "all dense ones, and of the next contender those before the fourth"
    folder = out / "pictures" / "ratio-0.25"
    assert (folder / ".part.000003.json").exists() and (folder / "000003.png").exists()
    times = {name: (out / name).stat().st_mtime_ns for name in half}

    results = evaluation.run(out, *finished.options, *NO_COST)
    assert pixels(out) == pixels(finished.folder)
    assert quality(results) == quality(finished.results)
    assert all((out / name).stat().st_mtime_ns == when for name, when in times.items())
    assert not list(out.rglob(".part.*"))


@pytest.mark.slow
def test_two_processes(finished, evaluation, tmp_path):
    """A rank that dies hands its traceback to torchrun; again, and all is as with one."""
    out = tmp_path / "run"
    port, commit = forked.free_port(), generate._commit

    def dies(folder, contender, *rest):
        if contender.name == "ratio 0.5":
            raise RuntimeError("the disk of rank 1 is on fire")
        commit(folder, contender, *rest)

    def rank(number):
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", RANK=str(number),
            # Where torchrun, which ends the others and shows it, looks for what a rank died of.
            TORCHELASTIC_ERROR_FILE=str(tmp_path / f"error{number}.json"),
        )  # fmt: skip
        if number == 1:
            generate._commit = dies
        evaluation.run(out, *finished.options, *NO_COST, "--launcher", "pytorch")

    outputs = [tmp_path / f"output{number}.txt" for number in (0, 1)]
    ranks = [forked.start(lambda n=n: rank(n), outputs[n]) for n in (0, 1)]
    try:
        assert forked.status(ranks[1], outputs[1]) == 1
    finally:
        os.kill(ranks[0], signal.SIGKILL)
    assert forked.status(ranks[0], outputs[0]) == -signal.SIGKILL, "it was to wait for the other"
    told = json.loads((tmp_path / "error1.json").read_text())["message"]
    assert "the disk of rank 1 is on fire" in told["message"]
    assert "in dies" in told["extraInfo"]["py_callstack"]
    assert not (out / "results.json").exists()
    half = pixels(out)
    assert 0 < len(half) < 25

    # The real thing: the script and torchrun, which start both ranks.
    command = ["bash", ROOT / "tools" / "dist_evaluate.sh", evaluation.config, "2"]
    options = [*QUICK, *map(str, finished.options), *NO_COST]
    done = subprocess.run(
        [*command, "--prompts", evaluation.prompts, *options, "--out", out],
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "PORT": forked.free_port(),
        },
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["processes"] == 2
    assert pixels(out) == pixels(finished.folder)
    for mine, theirs in zip(quality(results), quality(finished.results)):
        for name, metric in mine["quality"].items():
            other = theirs["quality"][name]
            assert metric.get("skipped") == other.get("skipped")
            if "skipped" not in metric:
                assert metric["value"] == pytest.approx(other["value"], rel=1e-9)


def test_pictures_with_nan_are_in_no_mean(finished, evaluation, tmp_path, monkeypatch):
    real_infer = command.build_model

    def build(*args):
        model = real_infer(*args)
        decode = model.decode_latents

        def spoil(latents):
            # The second picture of every batch of the merged model.
            if generate.LatentWatch.spoil and len(latents) > 1:
                latents = latents.clone()
                latents[1] = float("nan")
            return decode(latents)

        model.decode_latents = spoil
        return model

    real_on = generate.Contender.on

    def on(self, model):
        generate.LatentWatch.spoil = self.kind == "tome"
        return real_on(self, model)

    monkeypatch.setattr(generate.LatentWatch, "spoil", False, raising=False)
    monkeypatch.setattr(generate.Contender, "on", on)
    monkeypatch.setattr(command, "build_model", build)
    out = tmp_path / "run"
    results = evaluation.run(out, "--ratios", "0.5", "--batch-size", "2", *METRICS, *NO_COST)
    row = results["contenders"][1]
    assert (row["pictures"], row["skipped_pictures"]) == (3, 2)
    assert row["quality"]["psnr"]["n"] == row["quality"]["latent_error"]["n"] == 3
    assert any("NaN or infinity" in note and "2 of ratio 0.5" in note for note in results["notes"])
    values = [
        float(line.split(",")[5])
        for line in (finished.folder / "pictures.csv").read_text().splitlines()
        if line.startswith("ratio 0.5,") and line.split(",")[1] in "024"
    ]
    mean = -10 * np.log10(np.mean(10 ** (-np.array(values) / 10)))
    assert row["quality"]["psnr"]["value"] == pytest.approx(mean)
    assert "report.html" in os.listdir(out)


def test_nothing_but_nan(evaluation, tmp_path, monkeypatch):
    """A merging whose every picture is broken has no figures, and the others have theirs."""

    class Broken(generate.LatentWatch):
        def __exit__(self, *exc_info):
            super().__exit__(*exc_info)
            if generate.LatentWatch.broken:
                self.finite = [False] * len(self.finite)

    real_on = generate.Contender.on

    def on(self, model):
        generate.LatentWatch.broken = self.kind == "tome"
        return real_on(self, model)

    monkeypatch.setattr(generate.LatentWatch, "broken", False, raising=False)
    monkeypatch.setattr(generate.Contender, "on", on)
    monkeypatch.setattr(generate, "LatentWatch", Broken)
    options = ["--ratios", "0.5", "--metrics", "psnr", "latent_error", *NO_COST]
    results = evaluation.run(tmp_path / "run", *options)
    broken, steps = results["contenders"][1:]
    assert (broken["pictures"], broken["skipped_pictures"]) == (0, 5)
    assert broken["quality"]["psnr"]["skipped"] == "no pair of pictures without NaN"
    assert steps["quality"]["psnr"]["n"] == 5
    assert "| ratio 0.5 | 50 | 4 | – | – |" in (tmp_path / "run" / "table.md").read_text()


def test_metrics_of_sets(evaluation, tmp_path):
    """Against the dense set, then against real pictures, some of which cannot be read."""
    pytest.importorskip("efficientnet_lite_pytorch")
    name = "frechet_efficientnet_lite0"
    metrics = ["--metrics", f"{name}={{'min_samples': 4}}", "psnr"]
    options = ["--ratios", "0.5", "--batch-size", "2", *NO_COST]
    out = tmp_path / "run"
    results = evaluation.run(out, *options, *metrics)
    dense, merged = results["contenders"][:2]
    assert dense["quality"][name]["skipped"] == "the dense set is the reference"
    assert merged["quality"][name]["reference"] == "dense set"
    assert any("no real pictures were given" in note for note in results["notes"])
    real = tmp_path / "real"
    real.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (4, 70, 90, 3), dtype=np.uint8)
    for number, pixels_ in enumerate(noise):
        Image.fromarray(pixels_).save(real / f"{number}.png")
    (real / "broken.png").write_bytes(b"no picture")
    results = evaluation.run(out, *options, *metrics, "--real", real)
    dense, merged = results["contenders"][:2]
    assert dense["quality"][name]["reference"] == "real pictures"
    assert dense["quality"][name]["value"] > merged["quality"][name]["value"] * 0.5
    assert any("1 of 5 real pictures cannot be read" in note for note in results["notes"])


def bad_input():
    return {
        "no prompts": (["{config}"], "no prompts: pass --prompts"),
        "missing prompts": (["{config}", "--prompts", "no.txt"], "cannot read prompt file"),
        "empty prompts": (["{config}", "--prompts", "{tmp}/empty.txt"], "is empty"),
        "contender twice": (["{good}", "--ratios", "0.5", "0.5"], "name of another"),
        "ratio too high": (["{good}", "--ratios", "0.9"], "ceiling"),
        "tome_cfg wrong": (["{good}", "--tome", "a={'ration': 0.5}"], "ration"),
        "no fewer steps": (["{good}", "--fewer-steps", "50"], "not fewer"),
        "metric unknown": (["{good}", "--metrics", "psnrr"], "unknown metric 'psnrr'"),
        "metric option": (["{good}", "--metrics", "psnr={'a': 1}"], "does not take"),
        "too few pictures": (["{good}", "--metrics", "frechet_efficientnet_lite0"], "at least 50"),
        "pictures too small": (["{good}", "--size", "64", "--metrics", "ms_ssim"], "at least 176"),
        "real is no folder": (["{good}", "--metrics", "psnr", "--real", "no"], "is not a folder"),
        "launcher alone": (["{good}", "--metrics", "psnr", "--launcher", "pytorch"], "torchrun"),
        "out is a file": (["{good}", "--out", "{tmp}/empty.txt"], "cannot write"),
        "unknown key": (["{good}", "--cfg-options", "evaluation.promts=1"], "did you mean"),
        "key of the config": (
            ["{good}", "--cfg-options", "evaluation.steps=many"],
            "evaluation.steps of the config: expected a whole number",
        ),
        "no markers": (["{good}", "--write-table", "{tmp}/empty.txt"], "needs the two lines"),
    }


@pytest.mark.parametrize("case", bad_input())
def test_bad_input_is_one_line_and_code_2(case, evaluation, tmp_path, monkeypatch, capsys):
    def load_nothing(*_):
        pytest.fail("the model was built")

    monkeypatch.setattr(command, "build_model", load_nothing)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "empty.txt").write_text("")
    argv, complaint = bad_input()[case]
    known = {"config": evaluation.config, "tmp": tmp_path}
    argv = [
        text
        for word in argv
        for text in (
            [evaluation.config, "--prompts", str(evaluation.prompts)]
            if word == "{good}"
            else [word.format(**known) if "{tmp}" in word or "{config}" in word else word]
        )
    ]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert complaint in error and "\n" not in error.replace("metrics of sets", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt"]


def test_prompts_that_are_too_long_for_a_batch(evaluation, tmp_path, capsys):
    prompts = tmp_path / "long.txt"
    prompts.write_text("a cat\n" + "dog " * 30 + "\n")
    options = ["--ratios", "0.5", *METRICS, *NO_COST]
    evaluation.run(tmp_path / "a", *options, "--batch-size", "2", prompts=prompts, code=2)
    assert "longer than the model reads, such as number 2" in capsys.readouterr().err
    results = evaluation.run(tmp_path / "b", *options, prompts=prompts)
    assert "1 prompts are longer than the model reads; it cuts" in results["notes"]


def test_the_config_says_what_to_do(evaluation, tmp_path, sd_folder):
    """``evaluation`` of a config, a table into a page, the command of the package."""
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    page = tmp_path / "page.md"
    page.write_text("<!-- evaluation table: begin -->\n<!-- evaluation table: end -->\n")
    config = write_config(
        tmp_path / "with.py",
        tiny_config(folder=sd_folder),
        evaluation=dict(
            prompts="p.txt",  # beside the config
            size=64,
            steps=4,
            batch_size=2,
            contenders=[dict(name="half", tome_cfg=dict(ratio=0.5)), dict(name="one", steps=1)],
            metrics=["psnr", "latent_error"],
            cost_rounds=0,
        ),
    )
    out = tmp_path / "run"
    options = ["--device", "cpu", "--out", str(out), "--write-table", str(page)]
    assert package_main(["evaluate", config, *options]) == 0
    rows = json.loads((out / "results.json").read_text())["contenders"]
    assert [row["name"] for row in rows] == ["dense", "half", "one"]
    assert "| half | 50 | 4 |" in page.read_text()


def test_dry_run_of_the_demo_table(tmp_path, capsys):
    config = ROOT / "configs" / "benchmarks" / "demo_table.py"
    out = tmp_path / "run"
    argv = [str(config), "--dry-run", "--out", str(out), "--metrics", "psnr", "--device", "cpu"]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert "MISSING" not in printed and "everything is there" in printed
    assert not out.exists()


def test_protocol_of_the_published_table(sd_folder, tmp_path, monkeypatch, capsys):
    """Checked without what it needs, then run from end to end on a random model."""
    config = str(ROOT / "configs" / "benchmarks" / "tomesd_table.py")
    monkeypatch.setenv("SD_WEIGHTS", str(tmp_path / "nowhere"))
    monkeypatch.setenv("IMAGENET_VAL", str(tmp_path / "val"))
    argv = [config, "--out", str(tmp_path / "run"), "--device", "cpu"]
    # Weights as a name: a path that does not exist is an error before the dry run.
    monkeypatch.setenv("SD_WEIGHTS", "no-one/no-such-model")
    assert cli.main([*argv, "--dry-run"]) == 2
    printed = capsys.readouterr().out
    assert "2000 pictures of built-in set 'imagenet'" in printed
    for problem in ("weights of unet", "metric fid", "val is not a folder"):
        assert problem in printed

    # The demo model in place of Stable Diffusion: all is there but FID's weights.
    monkeypatch.setenv("SD_WEIGHTS", asset_path("demo_model"))
    noise = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    (tmp_path / "val" / "n01440764").mkdir(parents=True)
    for number, pixels_ in enumerate(noise):
        Image.fromarray(pixels_).save(tmp_path / "val" / "n01440764" / f"{number}.JPEG")
    few = ["--metrics", "psnr", "ssim", "latent_error"]
    assert cli.main([*argv, "--dry-run", *few, "--batch-size", "1"]) == 0
    printed = capsys.readouterr().out
    assert "MISSING" not in printed and "everything is there" in printed
    assert "contenders (16)" in printed

    monkeypatch.setenv("SD_WEIGHTS", sd_folder)
    small = ["--limit", "1", "--size", "64", "--steps", "3", "--dtype", "fp32", "--batch-size", "1"]
    other = ["--metrics", "psnr", "--ratios", "0.5", "--fewer-steps", "0.5", *NO_COST]
    assert cli.main([*argv, *small, *other]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["scheduler"] == "PNDMScheduler"
    assert results["prompts"]["pictures"] == 2 and results["real"]["n"] == 5
    records = RunFolder(tmp_path / "run")
    assert records.record("dense", 0)["prompt"] == "A high quality photograph of a tench."
    assert records.record("dense", 0)["sha256"] != records.record("dense", 1)["sha256"]


def test_weights_are_told_apart(sd_folder):
    from tiny import tiny_unet

    one, other = tiny_unet(), tiny_unet()
    assert generate.weights_digest(one) == generate.weights_digest(other)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    assert generate.weights_digest(one) != generate.weights_digest(other)
