# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``infer`` with tiny models: files, figures, what is printed, interruption."""

import json
import os
import re
import signal
import time

import forked
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from mmagic_tome.__main__ import main

pytest.importorskip("mmagic", reason="most of these models are MMagic's")

QUICK = ["--size", "64", "--steps", "2", "--device", "cpu"]


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def images(run):
    """The rows of the images of the last method."""
    name = [*run.manifest["methods"]][-1]
    return run.find(kind="image", method=name)


def test_images_say_how_they_were_made(runs, configs):
    run, printed = runs(
        *("out", "infer", configs["tome"], "--prompt", "a cat", "grüner Drache 🐉"),
        *("--negative-prompt", "dog", "--seed", "7", "--guidance", "3", *QUICK),
    )
    (method,) = run.manifest["methods"]
    made = images(run)
    image = Image.open(run.path / made[1]["file"])
    expected = {
        "prompt": "grüner Drache 🐉",
        "negative_prompt": "dog",
        "seed": "8",
        "model": "tome",
        "source": configs["tome"],
        "steps": "2",
        "guidance": "3.0",
        "size": "64x64",
        "dtype": "float32",
        "device": "cpu",
    }
    assert expected.items() <= image.text.items()
    assert json.loads(image.text["method"])["tome_cfg"]["ratio"] == 0.5
    (applied,) = run.find(kind="applied")
    targets = applied["stats"]["token merging"]
    assert all(row["kept"] == row["tokens"] // 2 and row["calls"] == 2 for row in targets)
    for text in (str(run.path), method, made[0]["file"], targets[0]["target"]):
        assert text in printed + method


@pytest.mark.parametrize("config", ["tome", "wrapped"])
def test_compare_measures_against_the_baseline(runs, configs, config):
    prompts = ["--prompt", "cat", "dog", *QUICK]
    run, printed = runs("out", "infer", configs[config], *prompts, "--compare", "--rounds", "6")
    alone, _ = runs("alone", "infer", configs[config], *prompts, "--ratio", "0")
    baseline = run.find(kind="image", method="baseline")
    for base, row, same in zip(baseline, images(run), alone.find(kind="image")):
        one, other = (pixels(run.path / entry["file"]) for entry in (base, row))
        assert np.array_equal(one, pixels(alone.path / same["file"])), "the baseline is it"
        keys = {"method": row["method"], "number": row["number"]}
        (psnr,) = run.find(kind="metric", metric="psnr", **keys)
        assert psnr["value"] == pytest.approx(10 * np.log10(255**2 / ((one - other) ** 2).mean()))
        (error,) = run.find(kind="metric", metric="latent_error", **keys)
        assert 0 < error["value"] < 1
    assert len(run.find(kind="round")) == 12 and not run.find(kind="memory")
    sheet = Image.open(run.path / "compare.png")
    assert sheet.width > 3 * 256 and sheet.height > 2 * 256
    assert "Side by side" in printed
    assert re.search(r"speed-up: ~?\d+\.\d\dx \(\d.*\), pairs: 6", printed)


def test_without_a_method_balanced_is_compared_and_one_pair_has_no_interval(runs, configs):
    words = ["--prompt", "cat", "--compare", "--rounds", "1", *QUICK]
    run, printed = runs("out", "infer", configs["plain"], *words)
    assert [*run.manifest["methods"]] == ["baseline", "balanced"]
    assert "no method is stated: the baseline is compared with --method cache:balanced" in printed
    assert re.search(r"speed-up: ~\d+\.\d\dx \(one pair gives no interval\)", printed)


@pytest.mark.parametrize(
    ("config", "options", "techniques"),
    [
        ("tome", ["--cache", "fast"], {"token merging", "step caching"}),
        ("cache", [], {"step caching"}),
        ("cache", ["--cache", "none"], set()),
        ("plain", ["--method", "both={'ratio': 0.5, 'cache': 'fast'}"],
         {"token merging", "step caching"}),
        ("plain", ["--method", "tomesd:0.5"], set()),
    ],
)  # fmt: skip
def test_the_report_says_what_was_done(runs, configs, config, options, techniques):
    words = [configs[config], "--prompt", "cat", "--steps", "6", "--size", "64", "--device", "cpu"]
    run, printed = runs("out", "infer", *words, *options)
    (applied,) = run.find(kind="applied")
    assert set(applied["stats"]) == techniques
    assert all(f"{one} in " in printed for one in techniques)


def test_what_is_asked_for_matters(runs, configs):
    base = ["infer", configs["plain"], "--prompt", "cat", *QUICK]
    variants = {
        "again": [],
        "seed": ["--seed", "1"],
        "negative": ["--negative-prompt", "dog"],
        "guidance": ["--guidance", "1"],
        "ratio": ["--ratio", "0.5"],
        "bf16": ["--dtype", "bf16"],
    }

    def image(name, options):
        run, _ = runs(name, *base, *options)
        return pixels(run.path / images(run)[0]["file"])

    first = image("base", [])
    found = {name: image(name, options) for name, options in variants.items()}
    assert np.array_equal(first, found.pop("again"))
    for name, one in found.items():
        assert not np.array_equal(first, one), name
    assert np.abs(first - found["bf16"]).mean() < 10


def test_defaults_of_a_config_and_what_overrides_them(runs, configs):
    words = ["infer", configs["defaults"], "--device", "cpu"]
    run, _ = runs("a", *words)
    asked = run.manifest["request"]
    assert (asked["steps"], asked["guidance"]) == (3, 2.0)
    assert [(one["prompt"], one["seed"]) for one in images(run)] == [("dog", 5), ("cat", 6)]
    options = ["--prompt", "a", "--seed", "0", "--cfg-options", "infer_cfg.steps=1"]
    run, _ = runs("b", *words, *options)
    asked = run.manifest["request"]
    assert (asked["steps"], asked["guidance"]) == (1, 2.0)
    assert [(one["prompt"], one["seed"]) for one in images(run)] == [("a", 0)]


def test_prompts_come_from_files_and_seeds_go_on_at_zero(runs, configs, tmp_path):
    (tmp_path / "one.txt").write_text("\ufeff# animals\ncat\n\n  dog  \n", encoding="utf-8")
    (tmp_path / "two.json").write_text('["猫", {"prompt": "a", "seed": 9}]', encoding="utf-8")
    run, _ = runs(
        *("out", "infer", configs["plain"], "--prompt", f"@{tmp_path / 'one.txt'}", "a cat"),
        *("--prompt-file", tmp_path / "two.json", "--seed", 2**32 - 2, "--batch-size", "5", *QUICK),
    )
    made = [(one["prompt"], one["seed"]) for one in images(run)]
    last = 2**32 - 1
    assert made == [("cat", last - 1), ("dog", last), ("a cat", 0), ("猫", 1), ("a", 9)]


@pytest.mark.parametrize("kind", ["mmagic", "diffusers"])
def test_clips_are_gifs_with_frames_on_the_sheet(
    runs, configs, pipeline_folder, sd_folder, tmp_path, kind
):
    source = ["--pipeline", pipeline_folder("wan")]
    if kind == "mmagic":
        # Freshly built, its blocks change nothing.
        torch.save(tiny_model("AnimateDiff", sd_folder).state_dict(), tmp_path / "a.pth")
        source = [configs["clips"], tmp_path / "a.pth"]
    run, printed = runs(
        *("out", "infer", *source, "--prompt", "cat", "--frames", "5", "--guidance", "2"),
        *("--ratio", "0.5", "--compare", "--rounds", "1", *QUICK),
    )
    for row in run.find(kind="image"):
        with Image.open(run.path / row["file"]) as clip:
            assert clip.format == "GIF" and clip.n_frames == 5 and clip.size == (64, 64)
    assert "PSNR " in printed and "latent error " in printed
    # Four of the frames side by side, three times.
    assert Image.open(run.path / "compare.png").width > 3 * 4 * 64


def test_a_signal_ends_it_with_130_and_it_goes_on(configs, runs, tmp_path):
    """A real signal to a real process, in the middle of its second image."""
    out, output = tmp_path / "out", tmp_path / "output.txt"
    words = ["infer", configs["tome"], "--prompt", "cat", "dog", "a", "b", *QUICK]

    def work():
        # A run of the tests in the background ignores the signal, and children inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return main([*words, "--work-dir", str(out)])

    child = forked.start(work, output)
    deadline = time.monotonic() + 300
    while not list(out.glob("*/images/*/[!.]*.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    assert forked.status(child, output) == 130, output.read_text()
    text = output.read_text()
    (folder,) = out.iterdir()
    assert f"interrupted; --resume goes on with {folder}" in text and "Traceback" not in text
    run, _ = runs("out", *words, "--resume")
    assert run.path == folder and len(images(run)) == 4
