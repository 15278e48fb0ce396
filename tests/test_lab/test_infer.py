# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``infer`` with tiny models: files, figures, what the report says, interruption."""

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


def test_images_say_how_they_were_made(results, configs):
    folder, found = results(
        *("out", "infer", configs["tome"], "--prompt", "a cat", "grüner Drache 🐉"),
        *("--negative-prompt", "dog", "--seed", "7", "--guidance", "3", *QUICK),
    )
    names = ["0000_a-cat.png", "0001_gr-ner-drache.png"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "results.json"]
    image = Image.open(folder / names[1])
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
    assert {"torch", "mmagic", "diffusers"} <= json.loads(image.text["versions"]).keys()
    assert [entry["file"] for entry in found["images"]] == names
    assert found["applied"]["done"] == "merged"
    targets = found["applied"]["stats"]["token merging"]
    assert all(row["kept"] == row["tokens"] // 2 and row["calls"] == 2 for row in targets)
    for text in (str(folder), "In the last run: merged", targets[0]["target"], "without a warm-up"):
        assert text in found["printed"]


@pytest.mark.parametrize("config", ["tome", "wrapped"])
def test_compare_measures_against_the_baseline(results, configs, config):
    prompts = ["--prompt", "cat", "dog", *QUICK]
    folder, found = results(
        *("out", "infer", configs[config], *prompts, "--compare", "--rounds", "3")
    )
    alone, _ = results("alone", "infer", configs[config], *prompts, "--ratio", "0")
    errors = []
    for entry in found["images"]:
        image, base = (pixels(folder / entry[key]) for key in ("file", "baseline_file"))
        assert np.array_equal(base, pixels(alone / entry["file"])), "the baseline is the baseline"
        errors.append(((image - base) ** 2).mean())
        assert entry["psnr"] == pytest.approx(10 * np.log10(255**2 / errors[-1]))
        assert 0 < entry["latent_error"] < 1
        text = Image.open(folder / entry["baseline_file"]).text
        assert json.loads(text["method"])["kind"] == "baseline"
    # Two prompts in three rounds are six pairs.
    base, other = found["seconds_per_image"].values()
    assert len(base["whole"]) == len(other["whole"]) == found["speedup"]["count"] == 6
    ratios = np.array(base["whole"]) / np.array(other["whole"])
    assert found["speedup"]["median"] == pytest.approx(np.median(ratios))
    assert all(a > b > 0 for a, b in zip(base["whole"], base["network"]))
    sheet = Image.open(folder / found["compare"])
    assert sheet.width > 3 * 256 and sheet.height > 2 * 256
    assert "Side by side" in found["printed"]
    assert re.search(r"speed-up: ~?\d+\.\d\dx \(\d", found["printed"])
    certain = not found["speedup"]["low"] <= 1 <= found["speedup"]["high"]
    assert ("within noise" not in found["speedup"]["text"]) == certain


@pytest.mark.parametrize(
    ("config", "options", "done"),
    [
        ("tome", ["--cache", "fast"], "merged and cached"),
        ("cache", [], "cached"),
        ("cache", ["--cache", "none"], "baseline"),
        ("plain", ["--method", "both={'ratio': 0.5, 'cache': 'fast'}"], "merged and cached"),
        ("plain", ["--method", "tomesd:0.5"], "tomesd"),
        # Of two steps none is skipped.
        ("plain", ["--cache", "quality", "--steps", "2"], "nothing merged or skipped"),
    ],
)
def test_the_report_says_what_was_done(results, configs, config, options, done):
    words = [configs[config], "--prompt", "cat", "--steps", "6", "--size", "64", "--device", "cpu"]
    _, found = results("out", "infer", *words, *options)
    assert found["applied"]["done"] == done
    assert f"In the last run: {done}\n" in found["printed"]
    skipped = [row["skipped"] for row in found["applied"]["stats"].get("step caching", ())]
    assert any(skipped) == ("cached" in done)


def test_what_is_asked_for_matters(results, configs):
    base = ["infer", configs["plain"], "--prompt", "cat", *QUICK]
    variants = {
        "again": [],
        "seed": ["--seed", "1"],
        "negative": ["--negative-prompt", "dog"],
        "guidance": ["--guidance", "1"],
        "ratio": ["--ratio", "0.5"],
        "bf16": ["--dtype", "bf16"],
    }
    first = pixels(results("base", *base)[0] / "0000_cat.png")
    images = {
        name: pixels(results(name, *base, *options)[0] / "0000_cat.png")
        for name, options in variants.items()
    }
    assert np.array_equal(first, images.pop("again"))
    for name, image in images.items():
        assert not np.array_equal(first, image), name
    assert np.abs(first - images["bf16"]).mean() < 10


def test_defaults_of_a_config_and_what_overrides_them(results, configs):
    words = ["infer", configs["defaults"], "--device", "cpu"]
    _, found = results("a", *words)
    assert (found["settings"]["steps"], found["settings"]["guidance"]) == (3, 2.0)
    assert [(one["prompt"], one["seed"]) for one in found["images"]] == [("dog", 5), ("cat", 6)]
    _, found = results(
        "b", *words, "--prompt", "a", "--seed", "0", "--cfg-options", "infer_cfg.steps=1"
    )
    assert (found["settings"]["steps"], found["settings"]["guidance"]) == (1, 2.0)
    assert [(one["prompt"], one["seed"]) for one in found["images"]] == [("a", 0)]


def test_prompts_come_from_files_and_seeds_go_on_at_zero(results, configs, tmp_path):
    (tmp_path / "one.txt").write_text("\ufeff# animals\ncat\n\n  dog  \n", encoding="utf-8")
    (tmp_path / "two.json").write_text('["猫", {"prompt": "a", "seed": 9}]', encoding="utf-8")
    _, found = results(
        *("out", "infer", configs["plain"], "--prompt", f"@{tmp_path / 'one.txt'}", "a cat"),
        *("--prompt-file", tmp_path / "two.json", "--seed", 2**32 - 2, "--batch-size", "5", *QUICK),
    )
    made = [(one["prompt"], one["seed"], one["file"][:4]) for one in found["images"]]
    last = 2**32 - 1
    assert made == [
        *(("cat", last - 1, "0000"), ("dog", last, "0001"), ("a cat", 0, "0002")),
        *(("猫", 1, "0003"), ("a", 9, "0004")),
    ]


@pytest.mark.parametrize("kind", ["mmagic", "diffusers"])
def test_clips_are_gifs_with_frames_on_the_sheet(
    results, configs, pipeline_folder, sd_folder, tmp_path, kind
):
    source = ["--pipeline", pipeline_folder("wan")]
    if kind == "mmagic":
        # Freshly built, its blocks change nothing.
        torch.save(tiny_model("AnimateDiff", sd_folder).state_dict(), tmp_path / "a.pth")
        source = [configs["clips"], tmp_path / "a.pth"]
    folder, found = results(
        *("out", "infer", *source, "--prompt", "cat", "--frames", "5", "--guidance", "2"),
        *("--ratio", "0.5", "--compare", "--rounds", "1", *QUICK),
    )
    (entry,) = found["images"]
    for key in ("file", "baseline_file"):
        with Image.open(folder / entry[key]) as clip:
            assert clip.format == "GIF" and clip.n_frames == 5 and clip.size == (64, 64)
    assert entry["psnr"] > 0 and entry["latent_error"] > 0
    # Four of the frames side by side, three times.
    assert Image.open(folder / "compare.png").width > 3 * 4 * 64


def test_a_signal_ends_it_with_130(configs, tmp_path):
    """A real signal to a real process, in the middle of its second image."""
    out, output = tmp_path / "out", tmp_path / "output.txt"
    words = ["infer", configs["tome"], "--prompt", *(["cat", "dog"] * 50), "--work-dir", str(out)]

    def work():
        # A run of the tests in the background ignores the signal, and children inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return main([*words, "--size", "64", "--steps", "20", "--device", "cpu"])

    child = forked.start(work, output)
    deadline = time.monotonic() + 300
    while not list(out.glob("*/[!.]*.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    assert forked.status(child, output) == 130, output.read_text()
    text = output.read_text()
    assert "interrupted; " in text.rstrip().splitlines()[-1] and "Traceback" not in text
    (folder,) = out.iterdir()
    assert {path.suffix for path in folder.iterdir()} == {".png"}
    for path in folder.iterdir():
        Image.open(path).load()
