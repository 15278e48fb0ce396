# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Sources from configs and folders, and requests from what a user and a config say."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from PIL import Image

from mmagic_tome import ToMeError, get_handle
from mmagic_tome.lab import runners
from mmagic_tome.lab.request import Request, make_request
from mmagic_tome.settings import Setting

QUICK = dict(prompts=["a cat"], steps=2, size=64)


@pytest.fixture
def folder(pipeline_folder):
    return pipeline_folder("sd")


def config_of(folder, **entries):
    entries = dict(pipeline=dict(from_pretrained=folder), infer_cfg=QUICK, **entries)
    return Config(entries, cfg_text=" ", filename="configs/mine.py")


def test_a_config_of_a_pipeline_is_loaded_with_its_setting(folder):
    config = config_of(folder, tome_cfg=dict(ratio=0.25), evaluation=dict(metrics=["psnr"]))
    source = runners.open_source(config, cfg_options={"tome_cfg.ratio": 0.5})
    assert (source.name, source.path) == ("mine", "configs/mine.py")
    assert source.setting == Setting.coerce(dict(ratio=0.5))
    assert source.evaluation == dict(metrics=["psnr"])
    request = make_request(source)
    runner = source.load(request)
    assert get_handle(runner.model).config.ratio == 0.5
    merged = runner.run([0]).latents
    get_handle(runner.model).remove()
    baseline = runner.run([0]).latents
    bare = runners.open_source(pipeline=folder).load(request)
    assert torch.equal(bare.run([0]).latents, baseline)
    assert not torch.equal(merged, baseline)


def test_a_config_file_names_class_and_precision_of_a_pipeline(folder, tmp_path):
    path = tmp_path / "img2img.py"
    entry = dict(
        from_pretrained=folder, type="StableDiffusionImg2ImgPipeline", torch_dtype="bfloat16"
    )
    path.write_text(f"pipeline = {entry!r}\ninfer_cfg = dict(prompts='a cat', steps=2)\n")
    source = runners.open_source(str(path), cfg_options={"cache_cfg": "balanced"})
    assert (source.name, source.class_name) == ("img2img", "StableDiffusionImg2ImgPipeline")
    assert source.path == str(path)
    assert source.setting.cache == Setting.coerce(dict(cache="balanced")).cache
    request = make_request(source, images=[Image.new("RGB", (64, 64), "red")])
    assert source.load(request).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "either a config or a pipeline"),
        (dict(config="a.py", pipeline="b"), "either a config or a pipeline"),
        (dict(pipeline="b", checkpoint="c.pth"), "has no checkpoint"),
        (dict(config=Config(dict(model={}, pipeline={}))), "has a model and a pipeline"),
        (dict(config=Config(dict(pipeline={}))), r"write pipeline=dict\(from_pretrained=FOLDER\)"),
        (dict(config=Config(dict(model={})), checkpoint="/no/c.pth"), "/no/c.pth is not there"),
        (dict(config=Config(dict(model={}, load_from="no.pth"))), "no.pth is not there"),
        # A list is MMagic's transforms of training data.
        (dict(config=Config(dict(model={}, pipeline=[{}], load_from="no.pth"))), "is not there"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_line(arguments, message):
    with pytest.raises(ToMeError, match=message):
        runners.open_source(**arguments)


def test_a_runner_around_a_pipeline_that_is_there(folder):
    request = Request(["a cat"], steps=2, size=(64, 64))
    source = runners.open_source(pipeline=folder)
    pipeline = source.load(request).model
    runner = runners.runner_of(pipeline, request)
    assert runner.source is None and runner.model is pipeline
    assert runner.network is pipeline.unet
    assert (runner.steps, runner.guidance, runner.scheduler) == (2, 7.5, "DDIMScheduler")
    # Defaults of the class, and the model's own size.
    runner = runners.runner_of(pipeline, Request(["a cat"]))
    assert (runner.steps, runner.size) == (50, (128, 128))
    with pytest.raises(ToMeError, match="cannot generate with a UNet2DConditionModel"):
        runners.runner_of(pipeline.unet, request)


# --- requests -------------------------------------------------------------------------------------


def request(infer_cfg=None, **given):
    return make_request(SimpleNamespace(defaults=infer_cfg or {}), **given)


def test_what_is_given_comes_before_what_the_config_says():
    says = dict(prompts="of the config", steps=30, size=[32, 64], extra=dict(eta=0.5, strength=1))
    found = request(says, prompts=["a", "b"], steps=20, guidance=None, extra=dict(eta=0.0))
    assert found == Request(("a", "b"), steps=20, size=(32, 64), extra=dict(eta=0.0, strength=1))
    assert request(says, size="96").size == (96, 96)
    assert request(says, images=[]) == request(says)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(), "no prompt"),
        (dict(prompts=["a", " "]), "prompts=' ' must be a text"),
        (dict(prompts=["a"], steps=0), "steps=0 must be an integer at least 1; write steps=1"),
        (dict(prompts=["a"], guidance=-1.0), "guidance=-1.0 must be a number at least 0"),
        (dict(prompts=["a"], seed=2**32), "seed=4294967296 must be an integer in"),
        (dict(prompts=["a"], seed=[1, 2]), "seed has 2 entries for 1 prompts"),
        (dict(prompts=["a", "b", "c"], images=["x", "y"]), "images has 2 entries for 3 prompts"),
        (dict(prompts=["a"], size="64x0"), "size='64x0' must be height and width"),
        (dict(prompts=["a"], size=64.5), "size=64.5 must be height and width"),
        (dict(prompts=["a"], extra="x"), "extra='x' must be a dict"),
        (dict(prompts=["a"], stepz=3), "no option 'stepz': did you mean 'steps'"),
        (dict(infer_cfg=dict(step=3)), "infer_cfg of the config has no option 'step'"),
        (dict(infer_cfg=dict(steps="many")), "infer_cfg of the config: steps='many' must be"),
    ],
)
def test_values_that_cannot_be_are_refused(given, message):
    with pytest.raises(ToMeError, match=message):
        request(**given)
