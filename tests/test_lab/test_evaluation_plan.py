# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What an evaluation is of: options over the config over defaults."""

from pathlib import Path

import pytest
import torch
from toy_runner import ToySource

from mmagic_tome.errors import ToMeError
from mmagic_tome.lab.plan import plan_of
from mmagic_tome.settings import Setting

CONFIGS = Path(__file__).parents[2] / "configs" / "benchmarks"


def source(setting=None, infer_cfg=None, **evaluation):
    """A source whose config says this."""
    found = ToySource()
    found.setting = Setting.coerce(setting)
    found.defaults, found.evaluation = infer_cfg or {}, evaluation
    return found


def names(plan):
    return [method.name for method in plan.methods]


def test_options_are_taken_over_the_config_and_that_over_infer_cfg():
    infer_cfg = dict(prompts=["a cat"], steps=30, guidance=3.0, batch_size=4, seed=9)
    one = source(None, infer_cfg, prompts=["a", "b", "c"], steps=20, rounds=3, metrics=["ssim"])
    plan = plan_of(one, rounds=0, batch_size=2, metrics=[], dtype="fp16", real=None)
    request = plan.request
    assert list(request.prompts) == ["a", "b", "c"]
    assert (request.steps, request.guidance, request.batch_size) == (20, 3.0, 2)
    assert [request.seed_of(number) for number in range(3)] == [9, 10, 11]
    assert (plan.rounds, plan.metrics, plan.dtype) == (0, ["ssim"], torch.float16)
    assert list(plan_of(source(None, infer_cfg)).request.prompts) == ["a cat"]


def test_prompts_are_a_set_or_a_file_beside_the_config(tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt,seed\na cat,5\na dog,\n")
    one = source(prompts="prompts.csv")
    one.path = str(tmp_path / "config.py")
    request = plan_of(one, negative_prompt="rain").request
    assert list(request.prompts) == ["a cat", "a dog"]
    assert [request.seed_of(number) for number in range(2)] == [5, 1]
    assert request.negatives([0, 1]) == ["rain", "rain"]


def test_without_methods_the_config_s_setting_or_three_ratios_are_compared():
    one = source(dict(ratio=0.3, sx=4), prompts=["a"], steps=20)
    assert [method.setting.tome.sx for method in plan_of(one).methods[:1]] == [4]
    assert names(plan_of(one))[1:] == ["16 steps", "13 steps", "10 steps"]
    bare = source(prompts=["a"])
    # How many steps are fewer is not known without a number of steps.
    assert names(plan_of(bare)) == ["ratio 0.25", "ratio 0.5", "ratio 0.75"]


def test_methods_are_texts_or_dicts_and_options_replace_those_of_the_config():
    methods = ["tome:0.5", dict(name="both", tome_cfg=dict(ratio=0.5, cache="fast")), "steps:3"]
    one = source(prompts=["a"], steps=20, methods=methods)
    assert names(plan_of(one)) == ["ratio 0.5", "both", "3 steps"]
    assert names(plan_of(one, methods=["cache:quality"], fewer_steps=[0.5])) == [
        "quality",
        "10 steps",
    ]
    assert names(plan_of(one, only=["b*", "3 steps"])) == ["both", "3 steps"]
    with pytest.raises(ToMeError, match="no method is called 'bot': did you mean 'both'"):
        plan_of(one, only=["bot"])


@pytest.mark.parametrize(
    ("stated", "given", "said"),
    [
        (dict(contenders=[]), {}, "evaluation of the config"),
        ({}, dict(round=3), "round"),
        (dict(prompts=None), {}, "no prompts: pass a file"),
        ({}, dict(rounds=-1), "rounds=-1 must be an integer at least 0"),
        ({}, dict(limit=0), "limit=0 must be an integer at least 1"),
        ({}, dict(dtype="half"), "dtype='half' must be one of fp32"),
        (dict(metrics="psnr"), {}, "metrics must be a list"),
        ({}, dict(metrics=[dict(name="fid", x=5)]), "fid has no option 'x'"),
        ({}, dict(fewer_steps=[0.5]), "fewer_steps than how many"),
        ({}, dict(methods=["tome:0.5", "tome:0.5"]), "would share the folder"),
        ({}, dict(real="nowhere"), "nowhere is not a folder"),
    ],
)
def test_what_is_wrong_is_said(stated, given, said):
    with pytest.raises(ToMeError, match=said):
        plan_of(source(**{"prompts": ["a"], **stated}), **given)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_of_the_benchmarks_is_a_plan(path, tmp_path, monkeypatch):
    pytest.importorskip("mmagic.apis", reason="these are configs of MMagic models")
    from PIL import Image

    from mmagic_tome.lab.runners import open_source

    for number in range(5):
        file = tmp_path / "n01440764" / f"{number}.jpeg"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(file)
    monkeypatch.setenv("IMAGENET_VAL", str(tmp_path))
    plan = plan_of(open_source(path))
    assert len(plan.request) in (16, 60, 128, 2000)
    assert len(plan.methods) > 10
