# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``tools/infer.py`` with a random model: options, complaints, files, interruption."""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_config, write_config

from mmagic_tome import ToMeError, remove_tome
from mmagic_tome.__main__ import main as package_main
from mmagic_tome.apis import cli, command_line, infer, model_config, pictures

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("mmagic", reason="the command runs MMagic models")

QUICK = ["--size", "64", "--steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def configs(sd_folder, tmp_path_factory):
    """Config files of one random model: by name, without and with token merging."""
    folder = tmp_path_factory.mktemp("configs")
    model = tiny_config(folder=sd_folder)
    inpaint = tiny_config("StableDiffusionInpaint", sd_folder)
    elsewhere = tiny_config(folder="/nowhere/at/all")
    hub = tiny_config(folder="somebody/some-model")
    tome, noisy = dict(ratio=0.5), dict(type="DDPMScheduler")
    return {
        "dense": write_config(folder / "dense.py", model),
        "tome": write_config(folder / "tome.py", model, tome_cfg=tome),
        "tome_in_model": write_config(folder / "tome_in_model.py", {**model, "tome_cfg": tome}),
        "wrapped": write_config(
            folder / "wrapped.py", dict(type="ToMe", model=model, tome_cfg=tome)
        ),
        "cache": write_config(folder / "cache.py", model, cache_cfg="fast"),
        "cache_in_model": write_config(
            folder / "cache_in_model.py", {**model, "cache_cfg": dict(timestep_range=(0, 0.9))}
        ),
        "cache_wrapped": write_config(
            folder / "cache_wrapped.py", dict(type="ToMe", model=model, cache_cfg="fast")
        ),
        "stochastic": write_config(
            folder / "stochastic.py",
            {**model, "scheduler": noisy, "test_scheduler": noisy},
            tome_cfg=tome,
        ),
        "sdxl": write_config(
            folder / "sdxl.py", tiny_config("StableDiffusionXL", sd_folder), tome_cfg=tome
        ),
        "inpaint": write_config(folder / "inpaint.py", inpaint, tome_cfg=tome),
        "hub": write_config(folder / "hub.py", hub, tome_cfg=tome),
        "elsewhere": write_config(folder / "elsewhere.py", elsewhere, tome_cfg=tome),
        "contradiction": write_config(
            folder / "contradiction.py", {**model, "tome_cfg": dict(ratio=0.3)}, tome_cfg=tome
        ),
        "defaults": write_config(
            folder / "defaults.py",
            model,
            infer_cfg=dict(prompts=["dog", "cat"], steps=3, guidance=2.0, size=64, seed=5),
        ),
        "texts": write_config(
            folder / "texts.py", model, infer_cfg=dict(prompts="a cat", steps=2, size="64x72")
        ),
        "wrong_defaults": write_config(folder / "wrong.py", model, infer_cfg=dict(prompt="cat")),
        "no_model": write_config(folder / "no_model.py", None),
    }


@pytest.fixture
def run(call_command):
    return functools.partial(call_command, cli.main)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def result(folder):
    return json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))


# --- bad input -------------------------------------------------------------------------


def complaint_cases():
    # Options, and a part of the complaint.
    return {
        "unknown option": (["{tome}", "--foo", "1"], "--foo"),
        "missing config": (["nowhere.py"], "nowhere.py does not exist"),
        "config is a folder": (["{tmp}"], "is a folder"),
        "config is no config": (["{tmp}/text.txt"], "is not a .py"),
        "broken config": (["{tmp}/broken.py", "--prompt", "cat"], "SyntaxError"),
        "config without a model": (["{no_model}", "--prompt", "cat"], "no model=dict"),
        "no such package": (["nopackage::demo/x.py"], "no package 'nopackage'"),
        "no such packaged config": (["mmagic_tome::demo/x.py"], "does not exist in mmagic_tome"),
        "no prompts": (["{tome}"], "no prompts"),
        "empty prompt": (["{tome}", "--prompt", " "], "empty"),
        "prompt file missing": (["{tome}", "--prompt-file", "no.txt"], "cannot read prompt file"),
        "@file missing": (["{tome}", "--prompt", "@no.txt"], "cannot read prompt file"),
        "prompt file empty": (["{tome}", "--prompt-file", "{tmp}/empty.txt"], "holds no prompts"),
        "prompt file binary": (["{tome}", "--prompt-file", "{tmp}/binary.txt"], "not UTF-8"),
        "size is no number": (["{tome}", "--prompt", "cat", "--size", "big"], "N or HxW"),
        "size zero": (["{tome}", "--prompt", "cat", "--size", "0x64"], "N or HxW"),
        "size does not fit": (["{tome}", "--prompt", "cat", "--size", "64x72"], "nearest is 64x64"),
        "no steps": (["{tome}", "--steps", "0"], "at least 1"),
        "steps is no number": (["{tome}", "--steps", "ten"], "whole number"),
        "guidance not finite": (["{tome}", "--guidance", "nan"], "finite"),
        "seed too large": (["{tome}", "--seed", "4294967296"], "less than 4294967296"),
        "seed negative": (["{tome}", "--seed", "-1"], "at least 0"),
        "ratio negative": (["{tome}", "--ratio", "-0.1"], "at least 0"),
        "ratio one": (["{tome}", "--ratio", "1"], "less than 1"),
        "ratio over the ceiling": (["{tome}", "--prompt", "cat", "--ratio", "0.8"], "0.75"),
        "cache unknown": (
            ["{tome}", "--prompt", "cat", "--cache", "faast"],
            "invalid choice: 'faast'",
        ),
        "unknown name of cache_cfg": (
            ["{tome}", "--prompt", "cat", "--cfg-options", "cache_cfg=faast"],
            "'fast'",
        ),
        "ratio in --cfg-options": (
            ["{tome}", "--prompt", "cat", "--cfg-options", "tome_cfg.ratio=0.8"],
            "0.75",
        ),
        "unknown key of tome_cfg": (
            ["{tome}", "--prompt", "cat", "--cfg-options", "tome_cfg.ration=0.4"],
            "ration",
        ),
        "tome_cfg twice": (["{contradiction}", "--prompt", "cat"], "configured twice"),
        "option without value": (["{tome}", "--cfg-options", "tome_cfg.sx"], "KEY=VALUE"),
        "nothing to compare": (["{dense}", "--prompt", "cat", "--compare"], "nothing to compare"),
        "device unknown": (["{tome}", "--prompt", "cat", "--device", "abacus"], "abacus"),
        "device not there": (["{tome}", "--prompt", "cat", "--device", "cuda:99"], "not there"),
        "dtype unknown": (["{tome}", "--dtype", "fp8"], "fp8"),
        "out is a file": (["{tome}", "--prompt", "cat", "--out", "{tmp}/text.txt"], "cannot write"),
        "out below a file": (
            ["{tome}", "--prompt", "cat", "--out", "{tmp}/text.txt/out"],
            "cannot write",
        ),
        "weights not there": (["{elsewhere}", "--prompt", "cat"], "weights are not there"),
        "size of weights with a name": (
            ["{hub}", "--prompt", "cat", "--size", "64x60"],
            "multiples of 8",
        ),
        "config after prompts": (["--prompt", "cat", "{tome}"], "put it first"),
        "packaged config after prompts": (
            ["--prompt", "cat", "mmagic_tome::demo/sd-emoji.py"],
            "put it first",
        ),
        "infer_cfg no dict": (
            ["{tome}", "--prompt", "cat", "--cfg-options", "infer_cfg=5"],
            "infer_cfg of the config: expected a dict",
        ),
        **{
            f"infer_cfg {option}": (
                ["{tome}", "--prompt", "cat", "--cfg-options", f"infer_cfg.{option}"],
                f"infer_cfg of the config: {option.partition('=')[0]}: expected {wanted}",
            )
            for option, wanted in {
                "steps=many": "a whole number, got 'many'",
                "steps=2.5": "a whole number, got '2.5'",
                "steps=True": "a whole number, got 'True'",
                "batch_size=0": "at least 1, got 0",
                "seed=-1": "at least 0, got -1",
                "guidance=nan": "a finite number, got 'nan'",
                "size=64.5": "N or HxW in pixels, got '64.5'",
                "size=64,64,64": "N or HxW in pixels, got '64x64x64'",
                "prompts=5": "a text or a list of texts, got 5",
                "prompts=cat,5": "a text for each prompt, got 5",
                "negative_prompt=5": "a text, got 5",
            }.items()
        },
        "infer_cfg wrong": (["{wrong_defaults}", "--prompt", "cat"], "unknown keys ['prompt']"),
    }


@pytest.mark.parametrize("case", complaint_cases())
def test_bad_input_is_one_line_and_code_2(case, run, configs, tmp_path, monkeypatch):
    def load_nothing(*_):
        pytest.fail("the model was built")

    monkeypatch.setattr(infer, "build_model", load_nothing)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a prompt\n")
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00cat")
    (tmp_path / "broken.py").write_text("model = dict(\n")
    before = sorted(tmp_path.rglob("*"))

    argv, expected = complaint_cases()[case]
    code, out, err = run(*[arg.format(tmp=tmp_path, **configs) for arg in argv])
    assert code == 2
    assert err.count("\n") == 1 and err.startswith("infer: error: ")
    assert expected in err
    assert "Traceback" not in out + err
    assert sorted(tmp_path.rglob("*")) == before, "a failed call leaves nothing behind"


def test_a_model_that_wants_more_than_text_is_refused_unloaded(run, configs, tmp_path, monkeypatch):
    import mmagic.apis

    monkeypatch.setattr(mmagic.apis, "init_model", lambda *_, **__: pytest.fail("built"))
    code, _, err = run(configs["inpaint"], "--prompt", "cat", "--out", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1
    assert "not a text-to-image model" in err and "image" in err


@pytest.mark.parametrize(
    ("spelling", "option", "expected"),
    [
        (
            "tome",
            "model.foo=3",
            "StableDiffusion does not take model.foo; it takes cache_cfg, data_pre",
        ),
        (
            "sdxl",
            "model.foo=3",
            "StableDiffusionXL does not take model.foo; it takes cache_cfg, data_pre",
        ),
        ("wrapped", "model.model.foo=3", "StableDiffusion does not take model.foo"),
        ("wrapped", "model.foo=3", "type='ToMe' does not know 'foo'"),
        ("tome", "model.text_encoder.foo=3", "foo"),
        ("tome", "model.scheduler.type=Nothing", "Nothing"),
        ("tome", "model.dtype=fp8", "'fp32', 'fp16', 'bf16'"),
    ],
)
def test_options_that_the_model_does_not_take(spelling, option, expected, run, configs, tmp_path):
    code, _, err = run(
        *[configs[spelling], "--prompt", "cat", "--out", tmp_path / "out", *QUICK],
        *["--cfg-options", option],
    )
    assert code == 2 and err.count("\n") == 1
    assert expected in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["skimage", "matplotlib"])
def test_compare_without_what_it_draws_with(module, run, configs, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == module else find(name)
    )
    monkeypatch.setattr(infer, "build_model", lambda *_: pytest.fail("the model was built"))
    code, _, err = run(configs["tome"], "--prompt", "cat", "--compare", "--out", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1
    package = {"skimage": "scikit-image"}.get(module, module)
    assert err.endswith(f"pip install {package}\n")


def test_weights_that_would_have_to_be_downloaded(run, tmp_path, monkeypatch):
    monkeypatch.delenv("SD_WEIGHTS", raising=False)
    config = ROOT / "configs" / "stable_diffusion" / "stable-diffusion_ddim_tome-5e-1_local.py"
    code, _, err = run(config, "--prompt", "cat", "--device", "cpu", "--out", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1
    assert "cannot load weights" in err and "HF_HUB_OFFLINE is set" in err
    assert not (tmp_path / "out").exists()


def test_unwritable_folder(run, configs, tmp_path, monkeypatch):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):  # root may write anywhere; refuse as the system would
        monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError))
    code, _, err = run(configs["tome"], "--prompt", "cat", "--out", folder / "out")
    assert code == 2 and err.count("\n") == 1 and "cannot write to" in err


def test_commands_of_the_package(capsys):
    assert package_main(["paint"]) == 2
    assert "unknown command 'paint'" in capsys.readouterr().err
    assert package_main([]) == 2
    assert package_main(["--help"]) == 0
    assert package_main(["infer", "nowhere.py"]) == 2


def test_script_needs_no_installation(tmp_path):
    """``python tools/infer.py`` from anywhere, with its exit code and nothing but its line."""
    command = [sys.executable, str(ROOT / "tools" / "infer.py"), "nowhere.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "infer.py: error: config nowhere.py does not exist\n"


@given(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), st.integers(1, 5), st.integers(1, 5))
def test_the_size_that_a_complaint_suggests_is_right(size, vae_levels, unet_levels):
    unit = model_config.size_unit(vae_levels, unet_levels)
    try:
        model_config.check_size(size, unit)
    except ToMeError as error:
        suggested = command_line.parse_size(str(error).rsplit(" ", 1)[1])
        model_config.check_size(suggested, unit)
        assert all(abs(a - b) < max(unit, b) for a, b in zip(suggested, size))
    else:
        assert size[0] % unit == size[1] % unit == 0


# --- images and their files ------------------------------------------------------------


def test_images_say_how_they_were_made(run, configs, tmp_path):
    out = tmp_path / "out"
    code, printed, err = run(
        *[configs["tome"], "--prompt", "a cat", "grüner Drache 🐉", "--negative-prompt", "dog"],
        *["--seed", "7", "--guidance", "3", "--out", out, *QUICK],
    )
    assert code == 0, err
    names = ["0000_a-cat.png", "0001_gr-ner-drache.png"]
    assert sorted(p.name for p in out.iterdir()) == [*names, "result.json"]

    image = Image.open(out / names[1])
    assert image.size == (64, 64) and image.mode == "RGB"
    expected = {
        "prompt": "grüner Drache 🐉",
        "negative_prompt": "dog",
        "seed": "8",
        "config": configs["tome"],
        "step_caching": "none",
        "steps": "2",
        "guidance": "3.0",
        "size": "64x64",
        "dtype": "float32",
        "device": "cpu",
    }
    assert expected.items() <= image.text.items()
    assert image.text["token_merging"].startswith("ratio 0.5")
    assert {"torch", "mmagic", "diffusers"} <= json.loads(image.text["versions"]).keys()
    assert json.loads(image.text["tome_cfg"])["sx"] == 2

    report = result(out)
    assert report["settings"]["seed"] == 7 and report["settings"]["steps"] == 2
    assert [entry["file"] for entry in report["images"]] == names
    assert report["compare"] is None and "dense" not in report["timing"]
    assert report["timing"]["merged"]["seconds_per_image"]["runs"] == 2
    assert report["timing"]["warm_up"] == "none"
    targets = report["token_merging"]["targets"]
    assert targets and all(row["kept"] == row["tokens"] // 2 for row in targets)
    assert all(row["calls"] == 2 for row in targets), "counted for one run"
    assert report["step_caching"] is None
    assert report["environment"]["versions"]["mmagic_tome"]

    for text in (str(out), "In the last run, token merging", targets[0]["target"], "no warm-up"):
        assert text in printed


def test_one_image_is_the_same_at_every_batch_size(run, configs, tmp_path):
    prompts = ["cat", "dog", "a cat and a dog"]
    for batch in (1, 2, 3):
        code, _, err = run(
            *[configs["tome"], "--prompt", *prompts, "--seed", "3", "--batch-size", batch],
            *["--out", tmp_path / str(batch), *QUICK],
        )
        assert code == 0, err
    for path in (tmp_path / "1").glob("*.png"):
        first = pixels(path)
        assert first.std() > 1, "a blank image would be the same anyhow"
        for batch in (2, 3):
            assert np.abs(first - pixels(tmp_path / str(batch) / path.name)).max() <= 2


def test_a_sampler_with_noise_of_its_own_is_batch_independent_too(run, configs, tmp_path):
    for batch in (1, 2):
        code, _, err = run(
            *[configs["stochastic"], "--prompt", "cat", "dog", "--batch-size", batch],
            *["--out", tmp_path / str(batch), *QUICK],
        )
        assert code == 0, err
    for path in (tmp_path / "1").glob("*.png"):
        assert np.abs(pixels(path) - pixels(tmp_path / "2" / path.name)).max() <= 2


def test_seed_prompt_and_negative_prompt_matter(run, configs, tmp_path):
    base = [configs["dense"], "--prompt", "cat", *QUICK]
    variants = {
        "base": [],
        "again": [],
        "seed": ["--seed", "1"],
        "negative": ["--negative-prompt", "dog"],
        "guidance": ["--guidance", "1"],
    }
    images = {}
    for name, extra in variants.items():
        code, _, err = run(*base, *extra, "--out", tmp_path / name)
        assert code == 0, err
        images[name] = pixels(tmp_path / name / "0000_cat.png")
    assert np.array_equal(images["base"], images["again"])
    for name in ("seed", "negative", "guidance"):
        assert not np.array_equal(images["base"], images[name]), name


@pytest.mark.parametrize("spelling", ["tome", "tome_in_model", "wrapped"])
def test_compare(spelling, run, configs, tmp_path):
    out, dense = tmp_path / "out", tmp_path / "dense"
    prompts = ["--prompt", "cat", "dog", *QUICK]
    code, printed, err = run(
        configs[spelling], *prompts, "--compare", "--repeats", "2", "--out", out
    )
    assert code == 0, err
    assert run(configs[spelling], *prompts, "--ratio", "0", "--out", dense)[0] == 0

    report = result(out)
    for entry in report["images"]:
        merged = pixels(out / entry["file"])
        assert np.array_equal(pixels(out / entry["dense_file"]), pixels(dense / entry["file"]))
        error = ((merged - pixels(out / entry["dense_file"])) ** 2).mean()
        assert error > 0, "merging changes the picture"
        assert entry["psnr_db"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)
        assert Image.open(out / entry["dense_file"]).text["token_merging"] == "none"
        assert Image.open(out / entry["file"]).text["token_merging"].startswith("ratio 0.5")
    timing = report["timing"]
    for mode in ("dense", "merged"):
        assert timing[mode]["seconds_per_image"]["runs"] == 4
        assert timing[mode]["repeats_identical"] is True
        assert all(0 < one["unet"] < one["total"] for one in timing[mode]["runs"])
    assert timing["speedup"]["runs"] == 4
    assert all(row["kept"] < row["tokens"] for row in report["token_merging"]["targets"])

    sheet = Image.open(out / report["compare"])
    _, width, height = pictures.sheet_layout((64, 64), rows=2)
    assert sheet.size == (width, height)
    assert "speed-up" in printed and "compare.png" in printed


def test_cache(run, configs, tmp_path):
    """Steps are skipped, dense is dense all the same, and the report says what was done."""
    out, dense = tmp_path / "out", tmp_path / "dense"
    request = ["--prompt", "cat", "--size", "64", "--steps", "6"]
    options = ["--cache", "fast", "--compare", "--repeats", "1"]
    code, printed, err = run(configs["tome"], *request, *options, "--out", out)
    assert code == 0, err
    assert run(configs["tome"], *request, "--ratio", "0", "--out", dense)[0] == 0
    report = result(out)
    entry = report["images"][0]
    assert np.array_equal(pixels(out / entry["dense_file"]), pixels(dense / entry["file"]))
    assert not np.array_equal(pixels(out / entry["file"]), pixels(dense / entry["file"]))
    assert report["token_merging"]["config"]["ratio"] == 0.5, "that of the config, all the same"
    regions = {row["region"]: row for row in report["step_caching"]["regions"]}
    assert regions["network"]["skipped"] > 0
    assert [one["region"] for one in report["step_caching"]["config"]] == ["network", "inner"]
    assert "In the last run, step caching" in printed
    text = Image.open(out / entry["file"]).text
    assert json.loads(text["cache_cfg"]) == report["step_caching"]["config"]
    assert text["step_caching"].startswith("network every 2 steps")
    assert Image.open(out / entry["dense_file"]).text["step_caching"] == "none"


@pytest.mark.parametrize("spelling", ["cache", "cache_in_model", "cache_wrapped"])
def test_cache_of_the_config(spelling, run, configs, tmp_path):
    out = tmp_path / "out"
    code, printed, err = run(
        *[configs[spelling], "--prompt", "cat", "--size", "64", "--steps", "6", "--out", out]
    )
    assert code == 0, err
    report = result(out)
    assert report["token_merging"] is None and "Nothing was merged" not in printed
    regions = {row["region"]: row for row in report["step_caching"]["regions"]}
    assert regions["network"]["skipped"] > 0


def test_another_model_of_the_family(run, configs, tmp_path):
    """SDXL: two text encoders, its own infer, no attention at the finest level."""
    out = tmp_path / "out"
    code, _, err = run(
        *[configs["sdxl"], "--prompt", "cat", "dog", "--batch-size", "2", "--compare"],
        *["--repeats", "1", "--out", out, *QUICK],
    )
    assert code == 0, err
    report = result(out)
    assert all(entry["psnr_db"] is not None for entry in report["images"])
    assert {row["downsample"] for row in report["token_merging"]["targets"]} == {2}


def test_ratio_for_a_config_without_tome_cfg(run, configs, tmp_path):
    base = [configs["dense"], "--prompt", "cat", *QUICK]
    assert run(*base, "--out", tmp_path / "dense")[0] == 0
    assert result(tmp_path / "dense")["token_merging"] is None
    assert run(*base, "--out", tmp_path / "zero", "--ratio", "0")[0] == 0
    assert run(*base, "--out", tmp_path / "half", "--ratio", "0.5")[0] == 0
    images = [pixels(tmp_path / name / "0000_cat.png") for name in ("dense", "zero", "half")]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_a_model_that_was_built_without_its_tome_cfg(run, configs, tmp_path, monkeypatch):
    def build(*args):
        model = model_config.build_model(*args)
        assert remove_tome(model)
        return model

    monkeypatch.setattr(infer, "build_model", build)
    out = tmp_path / "out"
    code, printed, err = run(configs["tome"], "--prompt", "cat", "--out", out, *QUICK)
    assert code == 0, err
    assert "Nothing was merged" not in printed
    assert result(out)["token_merging"]["config"]["ratio"] == 0.5


def test_cfg_options_reach_the_model(run, configs, tmp_path):
    code, _, err = run(
        *[configs["tome"], "--prompt", "cat", "--out", tmp_path / "out", *QUICK],
        *["--cfg-options", "tome_cfg.sx=4", "tome_cfg.use_rand=False"],
    )
    assert code == 0, err
    merging = result(tmp_path / "out")["token_merging"]["config"]
    assert (merging["sx"], merging["use_rand"], merging["ratio"]) == (4, False, 0.5)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision(dtype, run, configs, tmp_path):
    base = [configs["tome"], "--prompt", "cat", *QUICK]
    assert run(*base, "--out", tmp_path / "full")[0] == 0
    code, _, err = run(*base, "--out", tmp_path / "half", "--dtype", dtype)
    assert code == 0, err
    full, half = (pixels(tmp_path / name / "0000_cat.png") for name in ("full", "half"))
    assert result(tmp_path / "half")["settings"]["dtype"] == {"fp16": "float16"}.get(
        dtype, "bfloat16"
    )
    assert np.abs(full - half).mean() < 10


def test_seeds_go_on_at_zero_after_the_largest(run, configs, tmp_path):
    """Neither numpy nor torch's generator on the CPU looks at more than 32 bits of one."""
    base = [configs["dense"], *QUICK, "--prompt"]
    last = 2**32 - 1
    for batch in (1, 2):
        out = ["--out", tmp_path / str(batch), "--batch-size", batch]
        code, _, err = run(*base, "cat", "dog", "--seed", last, *out)
        assert code == 0, err
    assert run(*base, "dog", "--seed", 0, "--out", tmp_path / "zero")[0] == 0
    assert [entry["seed"] for entry in result(tmp_path / "1")["images"]] == [last, 0]
    assert Image.open(tmp_path / "1" / "0001_dog.png").text["seed"] == "0"
    dog = pixels(tmp_path / "zero" / "0000_dog.png")
    assert np.array_equal(dog, pixels(tmp_path / "1" / "0001_dog.png"))
    assert np.abs(dog - pixels(tmp_path / "2" / "0001_dog.png")).max() <= 2


def test_prompts_from_files(run, configs, tmp_path):
    (tmp_path / "one.txt").write_text("\ufeff# animals\ncat\n\n  dog  \n", encoding="utf-8")
    (tmp_path / "two.txt").write_text("猫\n", encoding="utf-8")
    code, _, err = run(
        *[configs["dense"], "--prompt", "@" + str(tmp_path / "one.txt"), "a cat"],
        *["--prompt-file", tmp_path / "two.txt", "--out", tmp_path / "out", *QUICK],
        *["--batch-size", "4"],
    )
    assert code == 0, err
    report = result(tmp_path / "out")
    assert [entry["prompt"] for entry in report["images"]] == ["cat", "dog", "a cat", "猫"]
    assert report["images"][3]["file"] == "0003.png"


def test_defaults_of_a_config_and_what_overrides_them(run, configs, tmp_path):
    code, _, err = run(configs["defaults"], "--device", "cpu", "--out", tmp_path / "a")
    assert code == 0, err
    settings = result(tmp_path / "a")["settings"]
    assert (settings["steps"], settings["guidance"], settings["seed"]) == (3, 2.0, 5)
    assert len(result(tmp_path / "a")["images"]) == 2
    code, _, err = run(
        *[configs["defaults"], "--device", "cpu", "--out", tmp_path / "b"],
        *["--prompt", "a", "--seed", "0", "--guidance", "0"],
    )
    assert code == 0, err
    settings = result(tmp_path / "b")["settings"]
    assert (settings["steps"], settings["guidance"], settings["seed"]) == (3, 0.0, 0)


def test_defaults_written_as_texts(run, configs, tmp_path):
    size = ["--cfg-options", "infer_cfg.size=64,64"]
    code, _, err = run(configs["texts"], "--device", "cpu", "--out", tmp_path / "a", *size)
    assert code == 0, err
    assert [entry["prompt"] for entry in result(tmp_path / "a")["images"]] == ["a cat"]
    assert result(tmp_path / "a")["settings"]["size"] == "64x64"
    code, _, err = run(configs["texts"], "--device", "cpu", "--out", tmp_path / "b")
    assert code == 2 and "size 64x72 does not fit" in err


def test_earlier_results_are_not_overwritten(run, configs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = [configs["dense"], *QUICK]
    assert run(*base, "--prompt", "cat")[0] == 0
    folder = tmp_path / "outputs" / "dense"
    first = (folder / "0000_cat.png").read_bytes()
    code, printed, _ = run(*base, "--prompt", "dog")
    assert code == 0 and "writing to outputs/dense-2" in printed
    assert (folder / "0000_cat.png").read_bytes() == first
    assert not (folder / "0000_dog.png").exists()
    assert (tmp_path / "outputs" / "dense-2" / "0000_dog.png").exists()

    (folder / "notes.txt").write_text("mine")
    assert run(*base, "--prompt", "dog", "--overwrite")[0] == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["0000_dog.png", "notes.txt", "result.json"]


# --- interruption ----------------------------------------------------------------------


def test_interrupt_keeps_whole_images_only(run, configs, tmp_path, monkeypatch):
    generate = infer.Generator.run

    def interrupted(self, numbers, *args, **kwargs):
        if numbers[0] == 1:
            raise KeyboardInterrupt
        return generate(self, numbers, *args, **kwargs)

    monkeypatch.setattr(infer.Generator, "run", interrupted)
    out = tmp_path / "out"
    code, _, err = run(configs["tome"], "--prompt", "cat", "dog", "--out", out, *QUICK)
    assert code == 130
    assert err.rstrip().splitlines()[-1].startswith("infer: interrupted; 1 of 2 prompts")
    assert [path.name for path in out.iterdir()] == ["0000_cat.png"]
    Image.open(out / "0000_cat.png").load()


def test_interrupt_while_a_file_is_written(tmp_path, monkeypatch):
    folder = pictures.ResultFolder(tmp_path)
    folder.save_png("a.png", Image.new("RGB", (8, 8)), {"prompt": "old"})

    def half(self, path, **_):
        Path(path).write_bytes(b"\x89PNG")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(KeyboardInterrupt):
        folder.save_png("a.png", Image.new("RGB", (8, 8)), {"prompt": "new"})
    with pytest.raises(KeyboardInterrupt):
        folder.save_png("b.png", Image.new("RGB", (8, 8)), {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert Image.open(tmp_path / "a.png").text == {"prompt": "old"}


def test_ctrl_c(configs, tmp_path):
    """A real signal to a real process, in the middle of its second image."""
    out, output = tmp_path / "out", tmp_path / "output.txt"
    argv = [configs["tome"], "--prompt", *(["cat", "dog"] * 50), "--size", "64", "--steps", "20"]

    def work():
        # A run of the tests in the background ignores the signal, and children inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return cli.main([*argv, "--device", "cpu", "--out", str(out)])

    child = forked.start(work, output)
    deadline = time.monotonic() + 300
    while not list(out.glob("[!.]*.png")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    assert forked.status(child, output) == 130, output.read_text()
    err = output.read_text()
    assert "interrupted; " in err.rstrip().splitlines()[-1] and "Traceback" not in err
    assert {path.suffix for path in out.iterdir()} == {".png"}
    assert not list(out.glob(".*"))
    for path in out.glob("*.png"):
        Image.open(path).load()


# --- pictures --------------------------------------------------------------------------


def test_difference_of_pictures():
    dense = Image.fromarray(np.full((16, 16, 3), 100, np.uint8))
    merged = Image.fromarray(np.full((16, 16, 3), 110, np.uint8))
    found = pictures.picture_difference(dense, merged)
    assert found["psnr_db"] == pytest.approx(10 * np.log10(255**2 / 100), abs=1e-3)
    assert found["mean_abs_difference"] == 10
    assert pictures.picture_difference(dense, dense)["psnr_db"] is None
    assert np.asarray(pictures.difference_map(dense, dense)).max() <= 4, "no difference is black"


@pytest.mark.parametrize("size", [(32, 32), (320, 200), (512, 768)])
def test_sheet_has_the_size_of_its_layout(size):
    image = Image.new("RGB", size, "red")
    rows = [("a long caption " * 40, image, image), ("Ünï 🍎", image, image)]
    sheet = pictures.compare_sheet("title", [("dense", "1 s"), ("merged", "2 s")], rows)
    factor, *expected = pictures.sheet_layout(size, 2)
    assert sheet.size == tuple(expected)
    x, y = pictures.MARGIN, pictures.MARGIN + 3 * pictures.LINE
    corner = (x + size[0] * factor - 1, y + size[1] * factor - 1)
    assert sheet.getpixel((x, y)) == sheet.getpixel(corner) == (255, 0, 0)
    assert sheet.getpixel((corner[0] + 1, y)) == (255, 255, 255)


# --- the configs -----------------------------------------------------------------------


def config_files():
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/*/*.py"))


# Those of vision transformers have a test of their own, in test_vit/test_vit_registry.py.
DENOISERS = [name for name in config_files() if name.split("/")[1] not in ("vit", "video", "audio")]


@pytest.mark.parametrize("name", DENOISERS)
def test_configs_can_be_read(name, monkeypatch):
    monkeypatch.setenv("SD_WEIGHTS", "/some/folder")
    config = model_config.load_config(ROOT / name)
    assert config.get("default_scope", "mmagic") == "mmagic"
    setting = model_config.setting_config(config)
    assert setting.baseline != ("_tome-" in name)
    if name.endswith("_local.py"):
        sources = (config.model.unet.from_pretrained, config.model.tokenizer)
        assert sources == ("/some/folder", "/some/folder")


def test_every_config_is_in_the_index():
    import yaml

    index = yaml.safe_load((ROOT / "model-index.yml").read_text())["Import"]
    assert sorted(index) == sorted(
        path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/*/metafile.yml")
    )
    listed = []
    for metafile in index:
        content = yaml.safe_load((ROOT / metafile).read_text())
        collections = {collection["Name"] for collection in content["Collections"]}
        for collection in content["Collections"]:
            assert (ROOT / collection["README"]).is_file()
        for model in content["Models"]:
            assert model["In Collection"] in collections
            listed.append(model["Config"])
    assert sorted(listed) == config_files()
