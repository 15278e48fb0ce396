# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``ToMeHook`` in each kind of run, and validation in between of training."""

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmagic")

import tiny

from mmagic_tome import ToMeError, get_handle
from mmagic_tome.mmagic.hooks import loops
from mmagic_tome.mmagic.hooks.tome import ToMeHook

SCHEDULE = [(0, 0.0), (2, 0.5)]


def log_of(folder):
    return "\n".join(file.read_text() for file in sorted(Path(folder).rglob("*.log")))


@pytest.mark.parametrize("mode", ["test", "val", "train"])
def test_tables_and_a_schedule(mode, make_runner, tmp_path):
    runner = make_runner(
        mode,
        tmp_path,
        custom_hooks=[dict(type="ToMeHook", schedule=SCHEDULE)],
        default_hooks=dict(logger=dict(type="LoggerHook", interval=1)),
    )
    getattr(runner, mode)()
    log = log_of(tmp_path)
    assert "token merging in UNet2DConditionModel" in log
    assert re.search(r"\.attn_kv +1 +64 +\d+ +\d+% +\d+", log), "the table of what was merged"
    # Two batches of a test or validation are its iterations 0 and 1.
    ratio = get_handle(runner.model).ratio
    assert ratio == pytest.approx(0.5 if mode == "train" else 0.25)
    if mode == "train":
        scalars = next(tmp_path.rglob("scalars.json")).read_text().splitlines()
        logged = [line["tome_ratio"] for line in map(json.loads, scalars) if "tome_ratio" in line]
        assert logged == pytest.approx([0, 0.25, 0.5, 0.5])


def test_validation_in_between_of_training(make_runner, tmp_path):
    seen = []

    class Seen(ToMeHook):
        def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            seen.append(self.handle.ratio)

    runner = make_runner("train", tmp_path, validate=True)
    runner.register_hook(Seen(schedule=[(0, 0.5), (4, 0.1)], summary=False))
    runner.train()
    # After iterations 2 and 4, two batches each, at the ratio of the iteration before.
    assert seen == pytest.approx([0.4, 0.4, 0.2, 0.2])
    assert "token merging in" not in log_of(tmp_path)
    assert len(list(tmp_path.rglob("vis_image/val_*_2.png"))) == 4


def test_validation_is_as_inference_and_changes_nothing(
    make_runner, sd_folder, tmp_path, monkeypatch
):
    """In the type that the model infers with, while weights stay in float32 to the last bit."""
    seen = []
    generate = loops.generate

    def seeing(model, *args):
        assert not any(module.training for module in model.modules())
        seen.append({p.dtype for p in model.unet.parameters()})
        return generate(model, *args)

    monkeypatch.setattr(loops, "generate", seeing)
    scheduler = dict(type="DDIMScheduler", clip_sample=False)
    options = dict(folder=sd_folder, scheduler=scheduler, test_scheduler=scheduler, dtype="fp32")

    def trained(evaluated):
        model = tiny.tiny_config("DreamBooth", **options)
        runner = make_runner("train", tmp_path / str(evaluated), model=model, validate=evaluated)
        runner.model.dtype = torch.float16
        runner.model.prepare_model()
        tiny.randomise(runner.model)
        runner.model.train()
        runner.model.text_encoder.eval()
        torch.manual_seed(0)
        runner.train()
        return runner.model

    plain = trained(False)
    assert not seen
    model = trained(True)
    # Two validations of two batches, each with the baseline and what is applied.
    assert len(seen) == 2 * 2 * 2
    assert all(found == {model.dtype} for found in seen)
    assert model.unet.training and {p.dtype for p in model.unet.parameters()} == {torch.float32}
    for (name, a), b in zip(plain.named_parameters(), model.parameters()):
        assert torch.equal(a, b), name


def test_step_caching_has_no_ratio(make_runner, tmp_path):
    runner = make_runner("test", tmp_path, tome_cfg=None, cache_cfg="fast")
    hook = ToMeHook()
    hook.before_run(runner)
    hook.before_test_iter(runner, 0)
    hook.after_run(runner)
    assert "step caching in UNet2D" in log_of(tmp_path)
    with pytest.raises(ToMeError, match="leave the schedule out"):
        ToMeHook(schedule=SCHEDULE).before_run(runner)


def test_the_ratio_is_linear_between_points():
    hook = ToMeHook(schedule=[(10, 0.1), (20, 0.5), (30, 0.5), (40, 0.0)])
    for iteration, ratio in ((0, 0.1), (10, 0.1), (15, 0.3), (20, 0.5), (25, 0.5), (35, 0.25)):
        assert hook.ratio_at(iteration) == pytest.approx(ratio)
    assert hook.ratio_at(1000) == 0.0
    with pytest.raises(ToMeError, match="schedule of ToMeHook: iterations must rise"):
        ToMeHook(schedule=[(5, 0.1), (5, 0.2)])


def test_what_does_not_fit_the_model(make_runner, tmp_path):
    too_much = ToMeHook(schedule=[(0, 0.95)])
    with pytest.raises(ToMeError, match=r"schedule of ToMeHook: .*0.95 is above"):
        too_much.before_run(make_runner("test", tmp_path))
    with pytest.raises(ToMeError, match=r"nothing to report: .*write tome_cfg"):
        ToMeHook().before_run(make_runner("test", tmp_path, tome_cfg=None))
    runner = make_runner("test", tmp_path)
    runner.model = torch.nn.Linear(1, 1)
    with pytest.raises(ToMeError, match="ToMeHook needs a runner with a diffusion model"):
        ToMeHook().before_run(runner)
