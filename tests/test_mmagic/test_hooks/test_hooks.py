# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Each hook in each kind of run, and what is said when something does not fit."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmagic")

import tiny

from mmagic_tome import ToMeError, apply_tome, get_handle, remove_cache, remove_tome
from mmagic_tome.apis.text2image import Generator, Request
from mmagic_tome.mmagic.hooks.evaluate import ToMeEvalHook, dense_and_merged, to_tensor
from mmagic_tome.mmagic.hooks.profile import Recorder, ToMeProfileHook
from mmagic_tome.mmagic.hooks.tome import ToMeHook
from mmagic_tome.settings import Handles, Setting

MODES = ("test", "val", "train")
SCHEDULE = dict(by="iter", points=[(0, 0.0), (2, 0.5)])
HOOKS = [
    dict(type="ToMeHook", tome_cfg=dict(ratio=0.5), schedule=SCHEDULE),
    dict(type="ToMeEvalHook", prompts=["cat", "dog"], seeds=[7, 3], interval=4),
    dict(type="ToMeProfileHook", warm_up=1),
]


class Ran:
    """What a run of a kind with all three hooks left behind."""

    def __init__(self, mode, runner):
        self.mode, self.runner = mode, runner
        files = sorted(Path(runner.work_dir).rglob("*.log"))
        self.log = "\n".join(file.read_text() for file in files)
        scalars = next(Path(runner.work_dir).rglob("scalars.json"))
        self.scalars = [json.loads(line) for line in scalars.read_text().splitlines()]
        self.handle = get_handle(runner.model)


@pytest.fixture(scope="module")
def ran(make_runner, tmp_path_factory):
    """Runs a mode, once; returns a :class:`Ran`."""
    done = {}

    def ran(mode):
        if mode not in done:
            second = str(tmp_path_factory.mktemp("second"))
            backends = [
                dict(type="LocalVisBackend"),
                dict(type="LocalVisBackend", name="second", save_dir=second),
            ]
            runner = make_runner(
                mode,
                tmp_path_factory.mktemp(mode),
                tome_cfg=None,
                custom_hooks=HOOKS,
                loop=dict(dense=True),
                default_hooks=dict(logger=dict(type="LoggerHook", interval=1)),
                visualizer=dict(type="Visualizer", vis_backends=backends),
            )
            getattr(runner, mode)()
            done[mode] = Ran(mode, runner)
        return done[mode]

    return ran


@pytest.mark.parametrize("mode", MODES)
def test_tome_hook(mode, ran):
    run = ran(mode)
    assert "token merging in UNet2DConditionModel" in run.log
    assert re.search(r"\.attn +1 +64 +\d+ +\d+% +\d+", run.log), "the table of what was merged"
    if mode == "train":
        logged = [line["tome_ratio"] for line in run.scalars if "tome_ratio" in line]
        assert logged == pytest.approx([0, 0.25, 0.5, 0.5])
    # Two batches of a test or validation are its iterations 0 and 1.
    assert run.handle.ratio == pytest.approx(0.5 if mode == "train" else 0.25)


@pytest.mark.parametrize("mode", MODES)
def test_eval_hook(mode, ran):
    run = ran(mode)
    step = 4 if mode == "train" else 0
    where = rf"dense and merged \(ratio [\d.]+, .*\), 2 prompts, {mode} at iteration {step}: "
    line = re.search(where + r"PSNR ([\d.]+) dB, SSIM ([\d.]+)", run.log)
    assert line, run.log[-2000:]
    scalars = next(line for line in run.scalars if f"tome_{mode}/psnr" in line)
    assert scalars["step"] == step
    assert scalars[f"tome_{mode}/psnr"] == pytest.approx(float(line[1]), abs=0.01)
    assert scalars[f"tome_{mode}/ssim"] == pytest.approx(float(line[2]), abs=1e-3)
    assert scalars[f"tome_{mode}/ssim"] < 1
    backends = run.runner.visualizer._vis_backends.values()
    for backend in backends:
        pictures = sorted(Path(backend._img_save_dir).glob(f"tome_{mode}_*.png"))
        assert len(pictures) == 2
        picture = np.asarray(Image.open(pictures[0]).convert("RGB")).astype(int)
        assert picture.shape == (80, 3 * 64, 3)
        dense, merged = picture[:64, :64], picture[:64, 64:128]
        assert np.abs(dense - merged).max() > 0
        # The third shows where they differ most in white, under a red ring perhaps.
        worst = np.abs(dense - merged).max(-1)
        place = np.unravel_index(worst.argmax(), worst.shape)
        assert picture[:64, 128:][place].max() == 255
    assert len(backends) == 2


@pytest.mark.parametrize("mode", MODES)
def test_profile_hook(mode, ran):
    run = ran(mode)
    assert f"profile of {mode} on cpu" in run.log
    report = json.loads((Path(run.runner.work_dir) / f"tome_profile_{mode}.json").read_text())
    assert report["mode"] == mode
    # 2 batches of 2 steps, each dense and merged; the first batch has a ratio of 0. Training
    # has a forward for each of 4 iterations, of which the first has a ratio of 0. The first
    # step does not count, and those of the eval hook never do.
    merged = [step["merged"] for step in report["steps"]]
    expected = [True] * 3 if mode == "train" else [False] * 5 + [True] * 2
    assert merged == expected
    assert all(step["ms"] > 0 for step in report["steps"])
    sites = {site["site"]: site for site in report["sites"]}
    for site in run.handle.stats():
        found = sites[site["target"]]
        assert found["tokens"] == 64
        for key, calls in (("merged", sum(expected)), ("dense", len(expected) - sum(expected))):
            if calls == 0:
                assert found[key] is None
                continue
            assert found[key]["calls"] == calls
            assert 0 < found[key]["share"] < 1
            whole = sites[site["block"]][key]
            assert whole["ms"] > found[key]["ms"], "a block takes longer than its site"
    assert not [
        hook
        for module in run.runner.model.modules()
        for hook in module._forward_hooks.values()
        if "mmagic_tome.mmagic.hooks" in getattr(hook, "__module__", "")
    ], "no measuring hook stays"


def test_validation_in_between_of_training(make_runner, tmp_path):
    seen = []

    class Seen(ToMeHook):
        def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            seen.append(self.handle.ratio)

    runner = make_runner("train", tmp_path, validate=True, images=True)
    runner.register_hook(Seen(schedule=dict(points=[(0, 0.5), (4, 0.1)]), summary=False))
    runner.register_hook(ToMeEvalHook(["cat"]))
    runner.register_hook(ToMeProfileHook(warm_up=0))
    torch.manual_seed(0)
    weights = [p.clone() for p in runner.model.parameters()]
    runner.train()
    # After iterations 2 and 4, two batches each, at the ratio of the iteration before.
    assert seen == pytest.approx([0.4, 0.4, 0.2, 0.2])
    report = json.loads((tmp_path / "tome_profile_train.json").read_text())
    assert len(report["steps"]) == 4
    assert not (tmp_path / "tome_profile_val.json").exists()
    assert any(not torch.equal(a, b) for a, b in zip(weights, runner.model.parameters()))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_evaluation_in_training_is_as_inference_and_changes_nothing(
    dtype, make_runner, sd_folder, tmp_path, monkeypatch
):
    """In the type that the model infers with, while weights stay in float32 to the last bit."""
    seen = []
    real_run = Generator.run

    def run(self, *args, **kwargs):
        seen.append({p.dtype for p in self.model.unet.parameters()})
        images = real_run(self, *args, **kwargs)
        return images

    monkeypatch.setattr(Generator, "run", run)
    scheduler = dict(type="DDIMScheduler", clip_sample=False)

    def trained(evaluated):
        model = tiny.tiny_config(
            "DreamBooth",
            folder=sd_folder,
            scheduler=scheduler,
            test_scheduler=scheduler,
            dtype="fp32",
        )
        where = tmp_path / str(evaluated)
        runner = make_runner("train", where, model=model, images=True, validate=evaluated)
        # As its ``dtype`` would do; MMagic's wrappers of networks do not know bf16.
        runner.model.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
        runner.model.prepare_model()
        tiny.randomise(runner.model)
        runner.model.train()
        if evaluated:
            runner.register_hook(ToMeEvalHook(["cat"], interval=1))
        torch.manual_seed(0)
        runner.train()
        return runner.model

    plain = trained(False)
    assert not seen
    model = trained(True)
    # Four evaluations of a pair each, two validations of two batches of pairs, and a pair each
    # by the hook after them.
    assert len(seen) == 2 * (4 + 2 * 2 + 2)
    assert all(found == {model.dtype} for found in seen)
    assert model.dtype in (torch.float16, torch.bfloat16)
    assert model.unet.training and {p.dtype for p in model.unet.parameters()} == {torch.float32}
    for (name, a), b in zip(plain.named_parameters(), model.parameters()):
        assert torch.equal(a, b), name


CELLS = "cells 2x2, random destinations"
FAST = "network every 2 steps in [0, 0.95), inner every 2 steps in [0, 0.7)"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            dict(ratio=0.5, plan_interval=2, residual=True),
            f"ratio 0.5, {CELLS}, plans computed every 2 steps, residual added",
        ),
        (
            dict(ratio=dict(downsample={1: 0.5})),
            f"ratio by schedule {{'downsample': {{1: 0.5}}}}, {CELLS}",
        ),
        (dict(cache="fast"), FAST),
        (dict(ratio=0.25, cache="fast"), f"ratio 0.25, {CELLS}, {FAST}"),
    ],
)
def test_dense_is_the_baseline_whatever_is_kept_between_steps(options, said, make_runner, tmp_path):
    tome = {key: value for key, value in options.items() if key != "cache"}
    keys = dict(tome_cfg=tome or None, cache_cfg=options.get("cache"))
    runner = make_runner("test", tmp_path, images=False, **keys)
    model, handles = runner.model, Handles.of(runner.model)
    request = Request(["cat"], steps=6, guidance=3.0, size=(64, 64))
    dense, merged = dense_and_merged(model, handles, request, [0])
    assert not torch.equal(dense.pictures, merged.pictures)
    found = Setting(*(handle and handle.config for handle in (handles.tome, handles.cache)))
    assert found == Setting.coerce(options)
    recorder = Recorder(model, warm_up=0, steps=20)
    assert recorder.report()["merging"] == said
    ToMeEvalHook(["cat"], metrics=["psnr", "latent_error"]).evaluate(runner, "test", 0)
    recorder.close()
    assert [step["merged"] for step in recorder.report()["steps"]] == []  # it was aside
    assert f"dense and merged ({said})" in next(tmp_path.rglob("*.log")).read_text()
    remove_tome(model)
    remove_cache(model)
    images, _ = Generator(model, request).run([0])
    assert torch.equal(to_tensor(images), dense.pictures)


def test_order_of_hooks(ran):
    """The ratio before all, the profile's table after the logger: by the priorities of the page."""
    names = [type(hook).__name__ for hook in ran("train").runner.hooks]
    order = ["ToMeHook", "ToMeEvalHook", "LoggerHook", "ToMeProfileHook"]
    assert sorted(order, key=names.index) == order


def test_evaluation_disturbs_neither_modes_nor_random_numbers(make_runner, tmp_path):
    runner = make_runner("test", tmp_path, images=False)
    hook = ToMeEvalHook(["cat"])
    runner.model.train()
    runner.model.vae.eval()
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    first = hook.evaluate(runner, "train", 1)
    assert torch.equal(torch.randn(3), expected)
    assert runner.model.unet.training
    assert not runner.model.vae.training
    assert hook.evaluate(runner, "train", 2) == first
    other = ToMeEvalHook(["cat"], seeds=1).evaluate(runner, "train", 3)
    assert other != first


def test_identical_pictures_are_said_and_not_drawn(make_runner, tmp_path):
    runner = make_runner("test", tmp_path, images=False, tome_cfg=dict(ratio=0.0))
    means = ToMeEvalHook(["cat"]).evaluate(runner, "test", 0)
    assert means["psnr"] == float("inf")
    log = next(tmp_path.rglob("*.log")).read_text()
    assert "PSNR identical, SSIM 1" in log
    scalars = next(tmp_path.rglob("scalars.json")).read_text()
    assert "ssim" in scalars
    assert "psnr" not in scalars


# --- applying ---------------------------------------------------------------------------------


def test_what_the_config_applied_is_taken_as_it_is(make_runner, tmp_path):
    runner = make_runner("test", tmp_path, images=False)
    before = get_handle(runner.model)
    hook = ToMeHook()
    hook.before_run(runner)
    assert hook.handle._patches == before._patches, "not applied a second time"
    assert hook.handle.ratio == 0.5


def test_another_tome_cfg_in_the_hook_is_an_error(make_runner, tmp_path):
    runner = make_runner("test", tmp_path, images=False)
    with pytest.raises(ToMeError, match="configured twice and differently"):
        ToMeHook(tome_cfg=dict(ratio=0.3)).before_run(runner)
    ToMeHook(tome_cfg=dict(ratio=0.5)).before_run(runner)


def test_a_run_after_a_schedule_is_no_contradiction(make_runner, tmp_path):
    runner = make_runner("test", tmp_path, images=False)
    hook = ToMeHook(tome_cfg=dict(ratio=0.5), schedule=SCHEDULE)
    for _ in range(2):
        hook.before_run(runner)
        hook.before_test_iter(runner, 0)
        assert get_handle(runner.model).ratio == 0


def test_step_caching_of_the_hook_and_of_the_config(make_runner, tmp_path):
    runner = make_runner("test", tmp_path, images=False, tome_cfg=None, cache_cfg="fast")
    with pytest.raises(ToMeError, match="configured twice and differently"):
        ToMeHook(cache_cfg="quality").before_run(runner)
    with pytest.raises(ToMeError, match="leave the schedule out"):
        ToMeHook(schedule=SCHEDULE).before_run(runner)
    hook = ToMeHook(cache_cfg="fast")
    hook.before_run(runner)
    hook.before_test(runner)
    hook.before_test_iter(runner, 0)
    assert hook.handle is None and get_handle(runner.model, "tome") is None
    remove_cache(runner.model)
    runner.cfg.pop("cache_cfg")
    hook = ToMeHook(cache_cfg=dict(region="inner"), tome_cfg=dict(ratio=0.25))
    hook.before_run(runner)
    assert get_handle(runner.model, "cache").config == hook.cache_handle.config
    hook.after_test(runner)
    log = next(tmp_path.rglob("*.log")).read_text()
    assert "token merging in UNet2D" in log and "step caching in UNet2D" in log


def test_steps_that_are_skipped_are_profiled(make_runner, tmp_path):
    runner = make_runner("test", tmp_path, images=False, tome_cfg=None, cache_cfg="fast")
    recorder = Recorder(runner.model, warm_up=0, steps=20)
    request = Request(["cat"], steps=6, guidance=3.0, size=(64, 64))
    with torch.no_grad():
        Generator(runner.model, request).run([0])
        with Handles.of(runner.model).disabled():
            Generator(runner.model, request).run([0])
    recorder.close()
    report = recorder.report()
    (network, _) = get_handle(runner.model).stats()
    count = network["computed"] + network["skipped"]
    assert network["skipped"] > 0 and count >= 6
    assert [step["merged"] for step in report["steps"]] == [True] * count + [False] * count
    assert report["merging"] == FAST


def test_nothing_to_apply_and_nothing_to_compare(make_runner, tmp_path):
    runner = make_runner("test", tmp_path, images=False, tome_cfg=None)
    with pytest.raises(ToMeError, match=r"nothing to apply: write tome_cfg"):
        ToMeHook().before_run(runner)
    with pytest.raises(ToMeError, match=r"nothing to compare"):
        ToMeEvalHook(["cat"]).before_run(runner)
    # The dense model can be profiled: all sites of all blocks.
    hook = ToMeProfileHook()
    hook.before_run(runner)
    hook.before_test(runner)
    kinds = {record.kind for record in hook.recorder.records.values()}
    hook.after_run(runner)
    assert {"attn", "crossattn", "mlp", "whole block"} <= kinds
    assert hook.recorder is None


@pytest.mark.parametrize("kind", ["attn_kv", "block", "stack"])
def test_profile_of_every_kind_of_target(kind):
    unet = tiny.tiny_unet()
    handle = apply_tome(unet, ratio=0.5, targets=[kind])
    recorder = Recorder(unet, warm_up=0, steps=1)
    with torch.no_grad():
        unet(**tiny.tiny_inputs())
    recorder.close()
    found = {site["site"]: site for site in recorder.report()["sites"]}
    for site in handle.stats():
        row = found[site["target"]]
        assert row["kind"] == kind and row["tokens"] == 256
        assert row["kept"] == site["kept"] < 256
        assert row["merged"]["ms"] > 0


@pytest.mark.parametrize(
    "hook", [ToMeHook(dict(ratio=0.5)), ToMeEvalHook(["cat"]), ToMeProfileHook()]
)
def test_a_runner_without_a_diffusion_model(hook, tmp_path):
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Linear(BaseModel):
        def forward(self, inputs, data_samples=None, mode="tensor"):
            return inputs

    name = f"no_diffusion_{type(hook).__name__}"
    runner = Runner(Linear(), str(tmp_path), experiment_name=name)
    with pytest.raises(ToMeError, match=rf"{type(hook).__name__} needs a runner with a diffusion"):
        hook.before_run(runner)


# --- arguments --------------------------------------------------------------------------------


def test_ratio_between_points():
    hook = ToMeHook(schedule=dict(points=[(10, 0.1), (20, 0.5), (30, 0.5), (40, 0.0)]))
    for iteration, ratio in ((0, 0.1), (10, 0.1), (15, 0.3), (20, 0.5), (25, 0.5), (35, 0.25)):
        assert hook.ratio_at(iteration) == pytest.approx(ratio)
    assert hook.ratio_at(1000) == 0.0


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([(0, 0.5)], "expected schedule=dict"),
        (dict(points=[(0, 0.5)], per="iter"), "expected schedule=dict"),
        (dict(by="epoch", points=[(0, 0.5)]), "by='epoch' is not known"),
        (dict(by="iter"), "no points"),
        (dict(points=[0.5]), "0.5 is no \\(iteration, ratio\\)"),
        (dict(points=[(0, "half")]), "is no \\(iteration, ratio\\)"),
        (dict(points=[(5, 0.1), (5, 0.2)]), "rise from 0"),
        (dict(points=[(-1, 0.1)]), "rise from 0"),
    ],
)
def test_schedules_that_cannot_be(schedule, message):
    with pytest.raises(ToMeError, match=message):
        ToMeHook(schedule=schedule)


def test_a_schedule_above_the_ceiling():
    with pytest.raises(ToMeError, match=r"schedule of ToMeHook: ratio=0\.9 is above"):
        ToMeHook(tome_cfg=dict(ratio=0.5), schedule=dict(points=[(0, 0.9)]))


def test_arguments_that_cannot_be():
    with pytest.raises(ToMeError, match="write a list of them"):
        ToMeEvalHook("a cat")
    with pytest.raises(ToMeError, match="2 prompts and 1 seeds"):
        ToMeEvalHook(["cat", "dog"], seeds=[1])
    with pytest.raises(ToMeError, match="interval=0"):
        ToMeEvalHook(["cat"], interval=0)
    with pytest.raises(ToMeError, match="unknown paired metric 'fid'"):
        ToMeEvalHook(["cat"], metrics=["fid"])
    with pytest.raises(ToMeError, match="steps=0"):
        ToMeProfileHook(steps=0)
    with pytest.raises(ToMeError, match="tome_cfg of ToMeHook"):
        ToMeHook(tome_cfg=dict(ratios=0.5))
    with pytest.raises(ToMeError, match="cache_cfg of ToMeHook: step cache: 'slow'"):
        ToMeHook(cache_cfg="slow")
