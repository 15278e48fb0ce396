# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Each hook in each kind of run, and what is said when something does not fit."""

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmagic")

import tiny

from mmagic_tome import ToMeError, apply_tome, get_handle, remove_cache
from mmagic_tome.lab.request import Request
from mmagic_tome.lab.runners import runner_of
from mmagic_tome.mmagic.hooks import loops, profile
from mmagic_tome.mmagic.hooks.evaluate import ToMeEvalHook
from mmagic_tome.mmagic.hooks.profile import STEP, Recorder, ToMeProfileHook
from mmagic_tome.mmagic.hooks.tome import ToMeHook
from mmagic_tome.patch import interceptors_of
from mmagic_tome.settings import Handles

MODES = ("test", "val", "train")
SCHEDULE = dict(by="iter", points=[(0, 0.0), (2, 0.5)])
HOOKS = [
    dict(type="ToMeHook", tome_cfg=dict(ratio=0.5), schedule=SCHEDULE),
    dict(type="ToMeEvalHook", prompts=["cat", "dog"], seed=[7, 3], interval=4),
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
        self.profile = json.loads(Path(runner.log_dir, "profile.json").read_text())


@pytest.fixture(scope="module")
def ran(make_runner, tmp_path_factory):
    """Runs a mode, once; returns a :class:`Ran`."""
    done = {}

    def ran(mode):
        if mode not in done:
            runner = make_runner(
                mode,
                tmp_path_factory.mktemp(mode),
                tome_cfg=None,
                custom_hooks=HOOKS,
                default_hooks=dict(logger=dict(type="LoggerHook", interval=1)),
                visualizer=dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")]),
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
    where = rf"{mode} at iteration {step}: ratio [\d.]+, .*, against the baseline over 2 prompts: "
    line = re.search(where + r"PSNR ([\d.]+) dB, SSIM ([\d.]+)", run.log)
    assert line, run.log[-2000:]
    scalars = next(line for line in run.scalars if f"tome_{mode}/psnr" in line)
    assert scalars["step"] == step
    assert scalars[f"tome_{mode}/psnr"] == pytest.approx(float(line[1]), abs=0.01)
    assert scalars[f"tome_{mode}/ssim"] == pytest.approx(float(line[2]), abs=1e-3)
    images = sorted(Path(run.runner.work_dir).rglob(f"vis_image/tome_{mode}_*_{step}.png"))
    assert len(images) == 2
    assert len({path.read_bytes() for path in images}) == 2


@pytest.mark.parametrize("mode", MODES)
def test_profile_hook(mode, ran):
    run = ran(mode)
    assert "profile: median milliseconds in a step" in run.log
    rows = {(row["module"], row["method"]): row for row in run.profile}
    # Two batches of 2 steps, baseline and merged; the first batch has a ratio of 0. Training has a
    # forward in each of 4 iterations, the first at a ratio of 0. The first of each does not count,
    # and those of the eval hook never do.
    steps = {"merging": 2} if mode == "train" else {"merging": 1, "baseline": 5}
    assert {method: rows[STEP, method]["steps"] for method in steps} == steps
    assert {method for _, method in rows} == set(steps)
    for row in run.handle.stats():
        for method in steps:
            target = rows[row["target"], method]["ms"]
            block = rows[f"{row['block']} (block)", method]["ms"]
            assert 0 < target < block < rows[STEP, method]["ms"], "each lies within the next"
    marked = [
        m for m in run.handle.network.modules() if any(one.skips for one in interceptors_of(m))
    ]
    assert not marked


def test_order_of_hooks(ran):
    """The ratio before all, the profile after the logger: by the priorities of the page."""
    names = [type(hook).__name__ for hook in ran("train").runner.hooks]
    order = ["ToMeHook", "ToMeEvalHook", "LoggerHook", "ToMeProfileHook"]
    assert sorted(order, key=names.index) == order


def test_validation_in_between_of_training(make_runner, tmp_path):
    seen = []

    class Seen(ToMeHook):
        def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            seen.append(self.handle.ratio)

    runner = make_runner("train", tmp_path, validate=True)
    runner.register_hook(Seen(schedule=dict(points=[(0, 0.5), (4, 0.1)]), summary=False))
    runner.register_hook(ToMeEvalHook(["cat"]))
    runner.register_hook(ToMeProfileHook(warm_up=0))
    torch.manual_seed(0)
    weights = [p.clone() for p in runner.model.parameters()]
    runner.train()
    # After iterations 2 and 4, two batches each, at the ratio of the iteration before.
    assert seen == pytest.approx([0.4, 0.4, 0.2, 0.2])
    rows = json.loads(Path(runner.log_dir, "profile.json").read_text())
    assert {(row["method"], row["steps"]) for row in rows} == {("merging", 4)}
    assert any(not torch.equal(a, b) for a, b in zip(weights, runner.model.parameters()))


@pytest.mark.parametrize("dtype", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_evaluation_in_training_is_as_inference_and_changes_nothing(
    dtype, make_runner, sd_folder, tmp_path, monkeypatch
):
    """In the type that the model infers with, while weights stay in float32 to the last bit."""
    seen = []
    generate = loops.generate

    def seeing(model, *args):
        seen.append({p.dtype for p in model.unet.parameters()})
        return generate(model, *args)

    monkeypatch.setattr(loops, "generate", seeing)
    scheduler = dict(type="DDIMScheduler", clip_sample=False)
    options = dict(folder=sd_folder, scheduler=scheduler, test_scheduler=scheduler, dtype="fp32")

    def trained(evaluated):
        model = tiny.tiny_config("DreamBooth", **options)
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
    assert model.unet.training and {p.dtype for p in model.unet.parameters()} == {torch.float32}
    for (name, a), b in zip(plain.named_parameters(), model.parameters()):
        assert torch.equal(a, b), name


def test_evaluation_disturbs_neither_modes_nor_random_numbers(make_runner, tmp_path):
    runner = make_runner("test", tmp_path)
    hook = ToMeEvalHook(["cat"])
    runner.model.train()
    runner.model.vae.eval()
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    first = hook.evaluate(runner, "train", 1)
    assert torch.equal(torch.randn(3), expected)
    assert runner.model.unet.training and not runner.model.vae.training
    assert hook.evaluate(runner, "train", 2) == first
    assert ToMeEvalHook(["cat"], seed=1).evaluate(runner, "train", 3) != first


def test_identical_images_are_said_and_not_drawn(make_runner, tmp_path):
    runner = make_runner("test", tmp_path, tome_cfg=dict(ratio=0.0))
    assert ToMeEvalHook(["cat"]).evaluate(runner, "test", 0)["psnr"] == float("inf")
    assert "PSNR identical, SSIM 1" in next(tmp_path.rglob("*.log")).read_text()
    scalars = next(tmp_path.rglob("scalars.json")).read_text()
    assert "ssim" in scalars and "psnr" not in scalars


# --- applying ---------------------------------------------------------------------------------


def test_the_config_and_the_hook_agree(make_runner, tmp_path):
    runner = make_runner("test", tmp_path)
    before = get_handle(runner.model)
    hook = ToMeHook(tome_cfg=dict(ratio=0.5), schedule=SCHEDULE)
    for _ in range(2):  # a run after a schedule is no contradiction
        hook.before_run(runner)
        assert hook.handle._patches == before._patches, "not applied a second time"
        hook.before_test_iter(runner, 0)
        assert get_handle(runner.model).ratio == 0
    before.ratio = 0.5
    with pytest.raises(ToMeError, match="configured twice and differently"):
        ToMeHook(tome_cfg=dict(ratio=0.3)).before_run(runner)


def test_step_caching_of_the_hook_and_of_the_config(make_runner, tmp_path):
    runner = make_runner("test", tmp_path, tome_cfg=None, cache_cfg="fast")
    with pytest.raises(ToMeError, match="configured twice and differently"):
        ToMeHook(cache_cfg="quality").before_run(runner)
    with pytest.raises(ToMeError, match="leave the schedule out"):
        ToMeHook(schedule=SCHEDULE).before_run(runner)
    hook = ToMeHook(cache_cfg="fast")
    hook.before_run(runner)
    hook.before_test_iter(runner, 0)
    assert hook.handle is None and get_handle(runner.model, "tome") is None
    remove_cache(runner.model)
    hook = ToMeHook(cache_cfg=dict(region="inner"), tome_cfg=dict(ratio=0.25))
    hook.before_run(runner)
    assert get_handle(runner.model, "cache").config[0].region == "inner"
    hook.after_run(runner)
    log = next(tmp_path.rglob("*.log")).read_text()
    assert "token merging in UNet2D" in log and "step caching in UNet2D" in log


def test_nothing_to_apply_and_nothing_to_compare(make_runner, tmp_path):
    runner = make_runner("test", tmp_path, tome_cfg=None)
    with pytest.raises(ToMeError, match=r"nothing to apply: write tome_cfg"):
        ToMeHook().before_run(runner)
    with pytest.raises(ToMeError, match=r"nothing to compare"):
        ToMeEvalHook(["cat"]).before_run(runner)


# --- the profile ------------------------------------------------------------------------------


@torch.no_grad()
def test_steps_that_are_skipped_are_profiled(make_runner, tmp_path):
    model = make_runner("test", tmp_path, tome_cfg=None, cache_cfg="fast").model
    recorder = Recorder(model, warm_up=0, steps=20)
    runner = runner_of(model, Request(["cat"], steps=6, guidance=3.0, size=(64, 64)))
    runner.run([0])
    (network, _) = get_handle(model).stats()
    assert network["skipped"] > 0
    count = network["computed"] + network["skipped"]
    with profile.running("plain"), Handles.of(model).disabled():
        runner.run([0])
    assert not recorder.full
    recorder.close()
    runner.run([0])
    frame = recorder.frame()
    steps = frame[frame.module == STEP].set_index("method")["steps"]
    assert steps.to_dict() == {"caching": count, "plain": count}
    targets = {name.rpartition(".")[2] for name in frame.module}
    assert {"attn", "crossattn", "mlp", "0 (block)"} <= targets
    computed = frame[(frame.module != STEP) & (frame.method == "caching")].steps
    assert computed.max() < count, "a block that was skipped took no time"


def test_a_profile_ends_after_its_steps():
    unet = tiny.tiny_unet()
    with apply_tome(unet, ratio=0.5, targets=["attn"]):
        recorder = Recorder(unet, warm_up=1, steps=2)
        for _ in range(5):
            with torch.no_grad():
                unet(**tiny.tiny_inputs())
        assert recorder.full
        recorder.close()
        frame = recorder.frame()
        assert set(frame.steps) == {2} and set(frame.method) == {"merging"}
    with torch.no_grad():
        unet(**tiny.tiny_inputs())
    assert recorder.frame().equals(frame)


# --- arguments --------------------------------------------------------------------------------


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


def test_ratio_between_points():
    hook = ToMeHook(schedule=dict(points=[(10, 0.1), (20, 0.5), (30, 0.5), (40, 0.0)]))
    for iteration, ratio in ((0, 0.1), (10, 0.1), (15, 0.3), (20, 0.5), (25, 0.5), (35, 0.25)):
        assert hook.ratio_at(iteration) == pytest.approx(ratio)
    assert hook.ratio_at(1000) == 0.0


@pytest.mark.parametrize(
    "schedule",
    [
        [(0, 0.5)],
        dict(points=[(0, 0.5)], per="iter"),
        dict(by="epoch", points=[(0, 0.5)]),
        dict(by="iter"),
        dict(points=[0.5]),
        dict(points=[(0, "half")]),
        dict(points=[(5, 0.1), (5, 0.2)]),
        dict(points=[(-1, 0.1)]),
    ],
)
def test_schedules_that_cannot_be(schedule):
    with pytest.raises(ToMeError, match=r"schedule of ToMeHook: write dict\(by='iter', points="):
        ToMeHook(schedule=schedule)


def test_arguments_that_cannot_be():
    for build, message in (
        (lambda: ToMeHook(dict(ratio=0.5), schedule=dict(points=[(0, 0.9)])), "0.9 is above"),
        (lambda: ToMeHook(tome_cfg=dict(ratios=0.5)), "tome_cfg of ToMeHook"),
        (lambda: ToMeHook(cache_cfg="slow"), "cache_cfg of ToMeHook: step cache: 'slow'"),
        (lambda: ToMeEvalHook([]), "at least one"),
        (lambda: ToMeEvalHook(["cat"], interval=0), "interval=0"),
        (lambda: ToMeEvalHook(["cat"], metrics=["fidd"]), "unknown metric 'fidd'"),
        (lambda: ToMeProfileHook(steps=0), "steps=0"),
    ):
        with pytest.raises(ToMeError, match=message):
            build()
