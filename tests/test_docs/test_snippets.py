# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Code of the pages runs as it is pasted: on the demo model, and on tiny models where a page names
another kind. Only the weights, the device, image sizes and the number of steps are replaced."""

import ast
import re

import pytest
import torch
from pages import ROOT, code_of, pages
from PIL import Image
from torch import nn

import mmagic_tome
from mmagic_tome import ToMeConfig
from mmagic_tome.assets import asset_path
from mmagic_tome.cache import coerce_cache
from mmagic_tome.methods import base as methods
from mmagic_tome.vit import ViTConfig

RUN = [
    page
    for page in pages()
    if page in ("README.md", "docs/project/demo_model.md", "docs/reference/methods.md")
    or page.startswith(
        ("docs/get_started/", "docs/howto/", "docs/reference/step", "docs/reference/t")
    )
]
RUN.remove("docs/howto/add_a_model.md")  # which has a test of its own
STEPS = 6
# Class in diffusers -> title of a tiny pipeline; the others are the demo model.
TINY = {
    "StableDiffusionControlNetPipeline": "ControlNet",
    "FluxPipeline": "Flux.1",
    "WanPipeline": "Wan 2.1, 2.2 (video)",
}


def demo():
    """The demo model, which generates few steps whatever it is asked for."""
    from diffusers import StableDiffusionPipeline

    class Pipeline(StableDiffusionPipeline):
        def __call__(self, *args, num_inference_steps=None, height=None, width=None, **kwargs):
            return super().__call__(*args, num_inference_steps=STEPS, **kwargs)

    load = StableDiffusionPipeline.from_pretrained.__func__
    pipeline = load(Pipeline, asset_path("demo_model"), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny(title):
    """A tiny pipeline, which is called with arguments of its own."""
    from tiny_pipelines import PIPELINES

    case = PIPELINES[title]
    pipeline = case.pipeline()
    kind = type(pipeline)

    class Result:
        def __init__(self, made):
            self.images, self.frames = [made], [made]

    def call(self, *_, **__):
        self.__class__ = kind
        try:
            return Result(case.run(self))
        finally:
            self.__class__ = replaced

    replaced = type(kind.__name__, (kind,), {"__call__": call})
    pipeline.__class__ = replaced
    return pipeline


@pytest.fixture
def world(monkeypatch, tmp_path, sd_folder):
    """A folder with what pages name, and libraries that find weights without a network."""
    import diffusers
    import tiny as models
    from diffusers import DiffusionPipeline

    real = demo()

    def from_pretrained(cls, name, **_):
        return tiny(TINY[cls.__name__]) if cls.__name__ in TINY else real

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(DiffusionPipeline, "to", lambda self, *_, **__: self)
    monkeypatch.setattr(
        diffusers.ControlNetModel, "from_pretrained", classmethod(lambda cls, name: None)
    )
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compile_(self, backend="eager"))
    if "mmagic" in sys_modules_after_import():
        from mmagic.apis.inferencers.text2image_inferencer import Text2ImageInferencer

        monkeypatch.setattr(Text2ImageInferencer, "extra_parameters", dict(models.QUICK))
    for name in ("configs", "tools", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("edges.png", "photo.jpg"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))  # a page registers one
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SD_WEIGHTS", str(sd_folder))
    return real


def sys_modules_after_import():
    """Names of modules once MMagic was imported, where it is installed."""
    import sys

    try:
        import mmagic.apis  # noqa: F401
    except ImportError:
        return ()
    return sys.modules


def check(name, value):
    """Options that a block assigns are valid."""
    if name == "tome_cfg":
        (ViTConfig if "r" in value else ToMeConfig)(**value)
    elif name == "cache_cfg":
        coerce_cache(value)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_code_of_pages_runs(page, world, tmp_path, no_default_scope):
    from mmagic_tome import apply_cache, apply_tome

    names = {"pipe": world, "pipeline": world, "apply_tome": apply_tome, "apply_cache": apply_cache}
    torch.manual_seed(0)
    for number, code in enumerate(code_of(page, "python")):
        if re.search(
            r"'\w+', \.\.\.,", code
        ):  # one of several places, with the rest left to the reader
            continue
        if "custom_imports" in code or "_base_" in code:
            pytest.importorskip("mmagic")
            from mmengine.config import Config

            file = tmp_path / f"config_{number}.py"
            file.write_text(code)
            config = Config.fromfile(str(file))
            for name in ("tome_cfg", "cache_cfg"):
                if name in config:
                    check(name, config[name])
            continue
        if "mmagic.apis" in code:
            pytest.importorskip("mmagic")
            code = code.replace("model_config=", "device='cpu', model_config=")
        for statement in ast.parse(code).body:  # one after the other: each assignment is checked
            exec(compile(ast.Module([statement], []), f"{page}, block {number}", "exec"), names)
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                check(statement.targets[0].id, names[statement.targets[0].id])
    assert mmagic_tome.remove_tome(world) in (True, False)


def test_summary_of_the_page_is_that_of_the_demo_model():
    """The prompt 'red apple' at guidance 3, 20 steps of DDIM, seed 0."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(asset_path("demo_model")).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    handle = mmagic_tome.apply_cache(pipeline, tolerance=0.01)
    seed = torch.Generator().manual_seed(0)
    pipeline("red apple", num_inference_steps=20, guidance_scale=3.0, generator=seed)
    (shown,) = code_of("docs/get_started/diffusers.md", "")
    *lines, speed, predicted = handle.summary().splitlines()
    *expected, its_speed, its_predicted = shown.splitlines()
    assert expected == lines
    assert [line.partition(":")[0] for line in (speed, its_speed)] == ["its steps"] * 2
    numbers = [float(line.split()[-1]) for line in (predicted, its_predicted)]
    assert numbers[0] == pytest.approx(numbers[1], abs=2e-4)
