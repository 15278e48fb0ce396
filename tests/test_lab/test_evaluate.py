# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Evaluating methods: what the figures are, after a kill, on two ranks, and when added to."""

import json
import os
import signal

import forked
import numpy as np
import pytest
import torch
from PIL import Image
from toy_runner import CACHED, HALF, METHODS, TOLERANT, ToyRunner, ToySource, run, toy_request

from mmagic_tome.errors import ToMeError
from mmagic_tome.lab.cost import measure_cost
from mmagic_tome.lab.methods import Method, parse_method
from mmagic_tome.lab.ranks import share, start_ranks
from mmagic_tome.lab.results import RunFolder
from mmagic_tome.lab.runners import open_source
from mmagic_tome.lab.table import table


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of an evaluation with rounds."""
    folder = RunFolder(tmp_path_factory.mktemp("finished"))
    run(folder, rounds=2)
    return folder


def images(folder):
    """Path -> pixels of all images."""
    paths = sorted((folder.path / "images").rglob("*.png"))
    return {
        path.relative_to(folder.path).as_posix(): np.asarray(Image.open(path)) for path in paths
    }


def results(folder, *kinds):
    """The rows in an order of their own, which does not depend on who wrote them when."""
    rows = [row for row in folder.rows if row["kind"] in (kinds or ("image", "metric", "applied"))]
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


def same(one, other):
    """Whether two folders have the same images and values."""
    first, second = images(one), images(other)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[path], second[path]) for path in first)
    assert results(one) == results(other)
    return True


# --- figures --------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_files(finished):
    """A second way to the same numbers: numpy over the files that were written."""
    found = table(finished).set_index("method")
    for name, slug in [("half", "half"), ("Cached!", "cached"), ("3 steps", "3-steps")]:
        errors, relative = [], []
        for number in range(5):
            stems = [finished.path / "images" / one / f"{number:06d}" for one in ("baseline", slug)]
            base, other = (np.asarray(Image.open(f"{stem}.png")).astype(float) for stem in stems)
            errors.append(np.square(base - other).mean())
            base, other = (torch.load(f"{stem}.pt", weights_only=True) for stem in stems)
            relative.append(float((other - base).norm() / base.norm()))
        row = found.loc[name]
        assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / np.mean(errors)))
        assert row["psnr_worst"] == pytest.approx(10 * np.log10(255**2 / np.max(errors)))
        assert row["latent_error"] == pytest.approx(np.mean(relative), rel=1e-5)
        assert row["latent_error_worst"] == pytest.approx(max(relative), rel=1e-5)
    assert np.isnan(found.loc["baseline", "psnr"]) and not found["certain"].iloc[1:].any()


def test_the_table_is_what_a_hand_computes_from_rows(finished):
    folder = finished
    found = table(folder).set_index("method")
    assert list(found.index) == ["baseline", "half", "Cached!", "3 steps"]
    assert list(found["images"]) == [5] * 4
    seconds = {
        name: [row["seconds"] for row in folder.find(kind="round", method=name)]
        for name in found.index
    }
    for name in found.index:
        factors = np.array(seconds["baseline"]) / np.array(seconds[name])
        assert found.loc[name, "speedup"] == pytest.approx(np.median(factors))
        assert found.loc[name, "speedup_low"] == factors.min()
        # Two images in a run.
        assert found.loc[name, "seconds"] == pytest.approx(np.median(seconds[name]) / 2)
        assert found.loc[name, "rounds"] == 2
        (flops,) = folder.find(kind="flops", method=name)
        assert found.loc[name, "flops"] == flops["run"] / 2
    assert found.loc["3 steps", "flops"] == found.loc["baseline", "flops"] / 2
    assert found.loc["half", "flops"] < found.loc["baseline", "flops"]
    (applied,) = folder.find(kind="applied", method="Cached!")
    (calls,) = applied["stats"]["step caching"]
    assert calls["skipped"] > 0 and calls["computed"] + calls["skipped"] == 6
    left = calls["computed"] / 6
    assert found.loc["Cached!", "flops"] == pytest.approx(
        found.loc["baseline", "flops"] * left, rel=0.01
    )
    # But for the timesteps themselves.
    memory = found["memory"]
    assert memory["3 steps"] == pytest.approx(memory["baseline"], rel=1e-4)


def test_predicted_errors_stand_beside_measured_ones(tmp_path):
    folder = RunFolder(tmp_path)
    request = toy_request(steps=12)
    found = run(folder, [TOLERANT, HALF], request=request).set_index("method")
    rows = folder.find(kind="image", method=TOLERANT.name)
    predicted = [row["predicted_error"] for row in rows]
    assert len(set(predicted)) == 5 and all(0 < one <= 0.5 for one in predicted)
    assert found.loc[TOLERANT.name, "predicted_error"] == pytest.approx(np.mean(predicted))
    assert found["predicted_error"].isna()[["baseline", "half"]].all()


def test_the_order_of_rounds_is_balanced(finished):
    rows = finished.find(kind="round")
    by_turn = [[row["method"] for row in rows if row["turn"] == turn] for turn in range(2)]
    assert set(by_turn[0]) == set(by_turn[1]) and by_turn[0] != by_turn[1]
    for row in rows:
        assert 0 < row["network_seconds"] < row["seconds"]
    assert finished.manifest["images_per_timed_run"] == 2
    (row,) = finished.find(kind="image", method="Cached!", number=3)
    with Image.open(finished.path / row["file"]) as image:
        assert image.text["prompt"] == row["prompt"] == "a fish"
        assert image.text["seed"] == str(row["seed"]) == "3"


# --- memory ---------------------------------------------------------------------------------------


def test_memory_of_a_caching_method_is_that_of_a_fresh_process(finished, tmp_path):
    def alone():
        folder = RunFolder(tmp_path / "run")
        measure_cost(ToyRunner(ToySource(), toy_request()), [CACHED], 0, folder, progress=False)

    child = forked.start(alone, tmp_path / "output")
    assert forked.status(child, tmp_path / "output") == 0
    (fresh,) = RunFolder(tmp_path / "run").find(kind="memory")
    (after_others,) = finished.find(kind="memory", method="Cached!")
    assert fresh == after_others
    (base,) = finished.find(kind="memory", method="baseline")
    # It keeps outputs from step to step, which the baseline does not.
    kept = after_others["run_bytes"] - base["run_bytes"]
    assert kept > 2 * 2 * 4 * 16 * 16 * 4  # two outputs of two images, in float32


# --- going on -------------------------------------------------------------------------------------


def test_killed_at_every_row_it_ends_with_the_same_images_and_values(finished, tmp_path):
    add, folder = RunFolder.add, RunFolder(tmp_path / "run")
    total = len(finished.find(kind="image")) + len(METHODS) + 1
    killed = 0
    for attempt in range(99):

        def work(attempt=attempt):
            seen = []

            def dying(self, *rows):
                seen.append(rows)
                if len(seen) == 3:
                    # In the middle of a row, or between the image and its row.
                    if attempt % 2:
                        with open(self.path / "rows.jsonl", "ab") as file:
                            file.write(json.dumps(rows[0]).encode()[:-7])
                    os.kill(os.getpid(), signal.SIGKILL)
                add(self, *rows)

            RunFolder.add = dying
            run(folder)

        output = tmp_path / "output"
        if forked.status(forked.start(work, output), output) == 0:
            break
        killed += 1
    assert killed > total / 3
    assert same(RunFolder(folder.path), finished)


def test_a_half_done_batch_is_run_as_a_whole(finished, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    run(folder, [HALF])
    lines = (tmp_path / "rows.jsonl").read_bytes().splitlines(keepends=True)
    lost = [line for line in lines if b'"image", "method": "half", "number": 3' in line]
    (tmp_path / "rows.jsonl").write_bytes(b"".join(line for line in lines if line not in lost))
    (tmp_path / "images" / "half" / "000000.png").unlink()
    loaded = []
    load = ToySource.load
    monkeypatch.setattr(
        ToySource, "load", lambda *args, **kw: loaded.append(load(*args, **kw)) or loaded[-1]
    )
    run(RunFolder(tmp_path), [HALF])
    assert loaded[0].runs == [((0, 1), 6), ((2, 3), 6)]
    assert len(lost) == 1
    kept = {path: pixels for path, pixels in images(finished).items() if "/half/" in path}
    assert all(np.array_equal(images(folder)[path], kept[path]) for path in kept)


def test_methods_metrics_and_rounds_are_added(tmp_path):
    def go_on(methods, metrics, rounds):
        request = toy_request(prompts=["a cat", "a dog"], steps=2)
        found = run(RunFolder(tmp_path), methods, metrics, rounds, request=request)
        return found.set_index("method")

    first = go_on([HALF], ["psnr"], 1)
    made = len(RunFolder(tmp_path).rows)
    assert go_on([HALF], ["psnr"], 1).equals(first)
    assert len(RunFolder(tmp_path).rows) == made
    found = go_on([HALF, Method("1 step", steps=1)], ["psnr", "ssim", "latent_error"], 2)
    # All methods have to take turns: the first round, without the new one, is no round of all.
    assert list(found["rounds"]) == [3, 3, 2]
    assert found.loc["half", "psnr"] == first.loc["half", "psnr"]
    assert found.loc["half", "ssim"] < 1
    assert found.loc["half", "latent_error"] > 0


def test_another_request_is_an_error_that_names_it(finished):
    before = len(RunFolder(finished.path).rows)
    for options, said in [
        (dict(request=toy_request(steps=5)), "request.steps: 6, now 5"),
        (dict(request=toy_request(seed=1)), "request.prompts"),
        (dict(request=toy_request(batch_size=1)), "request.batch_size: 2, now 1"),
        (dict(methods=[Method("half", steps=2)]), "methods.half"),
    ]:
        with pytest.raises(ToMeError, match=said):
            run(RunFolder(finished.path), **options)
    assert len(RunFolder(finished.path).rows) == before


# --- ranks ----------------------------------------------------------------------------------------


def test_two_ranks_make_the_rows_of_one(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", forked.free_port())
    monkeypatch.setenv("WORLD_SIZE", "2")
    folder = RunFolder(tmp_path / "run")

    def rank(number):
        def work():
            os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(number)
            assert start_ranks("pytorch", "cpu") == torch.device("cpu")
            run(folder, rounds=int(number == 0))
            torch.distributed.destroy_process_group()

        return work

    outputs = [tmp_path / f"output{number}" for number in range(2)]
    children = [forked.start(rank(number), outputs[number]) for number in range(2)]
    for child, output in zip(children, outputs):
        assert forked.status(child, output) == 0, output.read_text()
    assert same(folder, finished)
    assert len((folder.path / "rows.1.jsonl").read_bytes()) > 1000
    assert len(folder.find(kind="round")) == 4


def test_launchers_say_what_they_need(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert start_ranks("none", "cpu") == torch.device("cpu")
    with pytest.raises(ToMeError, match="pytorch: this process was not started by it"):
        start_ranks("pytorch", "cpu")
    with pytest.raises(ToMeError, match="slurm: this process was not started by it"):
        start_ranks("slurm", "cpu")
    assert share(range(3)) == [0, 1, 2]


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["diffusers", "mmagic"])
def test_models_are_evaluated_with_every_kind_of_method(kind, pipeline_folder, request, tmp_path):
    """A pipeline's folder, or a config of a MMagic model."""

    def source():
        if kind == "diffusers":
            return open_source(pipeline=pipeline_folder("sd"))
        return open_source(request.getfixturevalue("configs")["plain"])

    methods = [parse_method("tomesd:0.5"), parse_method("deepcache:2"), HALF, CACHED]
    three = toy_request(steps=4, prompts=["cat", "dog", "a cat"], guidance=3.0, size=(64, 64))
    folder = RunFolder(tmp_path / "run")
    found = run(folder, methods, rounds=1, request=three, source=source()).set_index("method")
    assert found["psnr"].notna().sum() == found["latent_error"].gt(0).sum() == 4
    assert (found["flops"][1:] < found.loc["baseline", "flops"]).all()
    # The same again, read anew, is the same run.
    made = len(folder.rows)
    run(folder, methods, rounds=1, request=three, source=source())
    assert len(RunFolder(folder.path).rows) == made
    assert folder.manifest["loaded"]["scheduler"] in ("DDIMScheduler", "EditDDIMScheduler")


# --- metrics --------------------------------------------------------------------------------------


def test_a_metric_that_cannot_be_computed_is_noted_or_an_error(tmp_path):
    with pytest.raises(ToMeError, match="MS-SSIM needs at least 176 pixels a side"):
        run(tmp_path / "asked", [HALF], ["psnr", "ms_ssim"])
    assert not (tmp_path / "asked").exists()
    with pytest.raises(ToMeError, match="unknown metric 'pnsr'"):
        run(tmp_path / "asked", [HALF], ["pnsr"])
    folder = RunFolder(tmp_path / "default")
    found = run(folder, [HALF], None)
    assert {"psnr", "ssim", "latent_error"} <= set(found) and "ms_ssim" not in found
    assert any(
        "ms_ssim is left out: MS-SSIM needs" in row["text"] for row in folder.find(kind="note")
    )


def test_images_that_are_not_finite_are_in_no_mean(finished, tmp_path):
    folder = RunFolder(tmp_path)
    found = run(folder, [HALF], ["psnr"], source=ToySource(bad=[3])).set_index("method")
    assert list(found["images"]) == [4, 4]
    assert folder.has(kind="note", text="1 of 5 images of half are not finite")
    values = [
        row["value"]
        for row in finished.find(kind="metric", method="half", metric="psnr")
        if row["number"] != 3
    ]
    errors = 10 ** (-np.array(values) / 10)
    assert found.loc["half", "psnr"] == pytest.approx(-10 * np.log10(errors.mean()))


def test_clips_are_judged_by_their_frames_without_loss(tmp_path):
    folder = RunFolder(tmp_path)
    found = run(folder, [HALF], ["psnr"], source=ToySource(video=True)).set_index("method")
    (row,) = folder.find(kind="image", method="half", number=0)
    assert row["file"].endswith(".gif") and row["frames"] == 3
    single = run(tmp_path / "image", [HALF], ["psnr"]).set_index("method")
    # Each frame is the image, shifted round: it has the image's error.
    assert found.loc["half", "psnr"] == pytest.approx(single.loc["half", "psnr"])
