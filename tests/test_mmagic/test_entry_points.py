# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Every place of the keys in a config through the ways of building a model from it."""

import itertools

import numpy as np
import pytest

pytest.importorskip("mmagic")

import tiny

from mmagic_tome import ToMeConfig, ToMeError, apply_cache, apply_tome, get_handle
from mmagic_tome.cache import PRESETS
from mmagic_tome.patch import interceptors_of

_COUNT = itertools.count()
HEADER = "custom_imports = dict(imports=['mmagic_tome'], allow_failed_imports=False)\n"
# The three lines of the README, on a config that MMagic ships. What follows points it to
# weights that exist here.
BASE = "_base_ = 'mmagic::stable_diffusion/stable-diffusion_ddim_denoisingunet.py'\n"
WEIGHTS = """
url = {folder!r}
model = dict(
    unet=dict(from_pretrained=url),
    vae=dict(from_pretrained=url),
    text_encoder=dict(pretrained_model_name_or_path=url),
    tokenizer=url)
"""
KEYS = "tome_cfg=dict(ratio=0.5), cache_cfg='balanced'"
# Place of the keys -> text of a config. The baseline has none, 'tomesd' is MMagic's own config for
# its own implementation, as it ships it; the others have both.
PLACES = {
    "baseline": "model = {model}\n",
    "wrapper": f"model = dict(type='ToMe', model={{model}}, {KEYS})\n",
    "model": f"model = {{model}}\nmodel.update({KEYS})\n",
    "top": BASE + "tome_cfg = dict(ratio=0.5)\ncache_cfg = 'balanced'\n" + WEIGHTS,
    "one each": "model = {model}\nmodel.update(cache_cfg='balanced')\ntome_cfg = dict(ratio=0.5)\n",
    "tomesd": BASE.replace(".py", "-tomesd_5e-1.py") + WEIGHTS,
}


@pytest.fixture
def write(tmp_path, sd_folder):
    """Writes a config, by the name of a place or as text; returns its path."""

    def write(text, **changes):
        model = tiny.tiny_config(folder=sd_folder, **changes)
        file = tmp_path / "config.py"
        text = HEADER + PLACES.get(text, text)
        file.write_text(text.format(model=model, folder=sd_folder))
        return str(file)

    return write


@pytest.fixture(autouse=True)
def _quick_inferencer(monkeypatch):
    from mmagic.apis.inferencers.text2image_inferencer import Text2ImageInferencer

    # The inferencer hands these to ``infer``; it has no other way to ask for 2 steps.
    monkeypatch.setattr(Text2ImageInferencer, "extra_parameters", dict(tiny.QUICK, seed=1))


def by_init_model(file):
    from mmagic.apis import init_model

    return init_model(file, device="cpu")


def by_inferencer(file):
    from mmagic.apis import MMagicInferencer

    with pytest.warns(UserWarning, match="is overridden by"):  # MMagic says so for any config
        editor = MMagicInferencer(model_name="stable_diffusion", model_config=file, device="cpu")
    model = editor.inferencer.inferencer.model
    if hasattr(model, "infer"):
        editor.infer(text="a cat", result_out_dir=file.replace("config.py", "image.png"))
    return model


def by_runner(file):
    from mmengine import Config
    from mmengine.runner import Runner

    config = Config.fromfile(file)
    config.default_scope = "mmagic"
    config.work_dir = file.replace("config.py", "work")
    config.log_level = "ERROR"
    # mmengine keeps scopes and loggers by this name and the second of the start.
    config.experiment_name = f"test_{next(_COUNT)}"
    return Runner.from_cfg(config).model


BUILDERS = {"init_model": by_init_model, "inferencer": by_inferencer, "runner": by_runner}
every_way = pytest.mark.parametrize("builder", BUILDERS)


def image(model):
    model.eval()
    result = model.infer("a cat", seed=3, **{**tiny.QUICK, "num_inference_steps": 6})
    return np.asarray(result["samples"][0], dtype=np.float32)


@pytest.fixture(scope="module")
def expected(sd_folder):
    """Number of keys -> image by calls of ``apply_tome``, and of ``apply_cache`` too; and by what
    MMagic's own key means."""
    from mmagic.registry import MODELS
    from mmengine.registry import init_default_scope

    init_default_scope("mmagic")  # as MMagic's init_model does
    model = MODELS.build(tiny.tiny_config(folder=sd_folder))
    images = {0: image(model)}
    apply_tome(model, ratio=0.5, prop_attn=False)
    images["tomesd"] = image(model)
    apply_tome(model, ratio=0.5)
    images[1] = image(model)
    apply_cache(model, "balanced")
    images[2] = image(model)
    for one, two in itertools.combinations(images.values(), 2):
        assert np.abs(one - two).max() >= 1, "it has to be visible for these tests"
    return images


@every_way
@pytest.mark.parametrize("place", PLACES)
def test_every_place_every_way(place, builder, write, expected):
    model = BUILDERS[builder](write(place))
    assert type(model).__name__ == "StableDiffusion"
    count = {"baseline": 0, "tomesd": 1}.get(place, 2)
    merging, caching = model.tome_handle, model.cache_handle
    # Keys are weighed, but as MMagic's own key means it.
    asked = ToMeConfig(ratio=0.5, prop_attn=False if place == "tomesd" else "auto")
    assert (merging and merging.config) == (asked if count else None)
    assert (caching and caching.config) == (PRESETS["balanced"] if count == 2 else None)
    by_calls = expected["tomesd" if place == "tomesd" else count]
    np.testing.assert_allclose(image(model), by_calls, rtol=0, atol=1)
    if caching:
        assert {row["region"]: row["skipped"] for row in caching.stats()}["network"] > 0
        caching.remove()
        np.testing.assert_array_equal(image(model), expected[1])
    if merging:
        merging.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(interceptors_of(m) for m in model.modules())
    np.testing.assert_array_equal(image(model), expected[0])


@every_way
def test_two_places_must_agree(builder, write):
    keys = "tome_cfg = dict(ratio={ratio})\ncache_cfg = {cache}\n"

    def build(ratio, cache):
        text = keys.replace("{ratio}", ratio).replace("{cache}", cache)
        return BUILDERS[builder](
            write(PLACES["model"] + text.replace("{", "{{").replace("}", "}}"))
        )

    same = repr([config.to_dict() for config in PRESETS["balanced"]])
    model = build("0.5", same)
    assert model.tome_handle.ratio == 0.5 and model.cache_handle.config == PRESETS["balanced"]
    with pytest.raises(ToMeError, match=r"'ratio': 0.5.*top level.*'ratio': 0.25.*keep one"):
        build("0.25", same)
    says = "step caching is configured twice.*cache_cfg of the model.*at the top level.*keep one"
    with pytest.raises(ToMeError, match=says):
        build("0.5", "'fast'")


@every_way
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model = {model}\nmodel.update(tome_cfg=dict(ratio=0.95))\n", "ratio=0.95"),
        ("model = {model}\nmodel.update(tomesd_cfg=dict(ration=0.5))\n", "'ratio'"),
        ("model = {model}\nmodel.update(cache_cfg=dict(intervall=2))\n", "'interval'"),
        ("model = dict(type='ToMe', model={model}, cache_cfg=2)\n", "no step cache"),
        ("model = {model}\ntome_cfg = 'balanced'\n", "tome_cfg: .*dict"),
    ],
)
def test_mistakes_show_before_anything_is_built(text, says, builder, write, monkeypatch):
    import mmengine.model

    def init(*args, **kwargs):
        raise AssertionError("built before the mistake was found")

    monkeypatch.setattr(mmengine.model.BaseModel, "__init__", init)
    with pytest.raises(ToMeError, match=says):
        BUILDERS[builder](write(text))


# A class outside of MMagic's Stable Diffusion family, which does not know this package.
OUTSIDE = """
from mmagic.registry import MODELS
from mmengine.model import BaseModel

@MODELS.register_module(force=True)
class Outside(BaseModel):
    def __init__(self, unet, **others):
        super().__init__()
        self.unet = MODELS.build(unet)

    def forward(self, *args, **kwargs):
        return None
"""
KINDS = {
    "outside": "model.update(type='Outside')\n",
    # In mmengine's config style with imports.
    "class object": "from mmagic.models import StableDiffusion as SD\nmodel.update(type=SD)\n",
}


@every_way
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(kind, builder, write):
    exec(OUTSIDE, {"__name__": "a_module_of_ones_own"})
    keys = "tome_cfg = dict(ratio=0.25)\ncache_cfg = 'fast'\n"
    model = BUILDERS[builder](write("model = {model}\n" + KINDS[kind] + keys))
    assert get_handle(model, "tome").ratio == 0.25
    assert get_handle(model, "cache").config == PRESETS["fast"]
