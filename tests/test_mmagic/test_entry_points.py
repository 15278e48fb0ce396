# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Three spellings of a config through three ways of building a model from it."""

import copy
import itertools

import numpy as np
import pytest

pytest.importorskip("mmagic")

import tiny

from mmagic_tome import ToMeConfig, ToMeError, apply_cache, apply_tome, get_handle
from mmagic_tome.cache import PRESETS
from mmagic_tome.patch import interceptors_of

RATIO = 0.5
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
SPELLINGS = {
    "baseline": HEADER + "model = {model}\n",
    "wrapper": HEADER + "model = dict(type='ToMe', model={model}, tome_cfg=dict(ratio=0.5))\n",
    "key": HEADER + "model = {model}\nmodel.update(tome_cfg=dict(ratio=0.5))\n",
    "top": BASE + HEADER + "tome_cfg = dict(ratio=0.5)\n" + WEIGHTS,
    # MMagic's own config for its own implementation, as it ships it.
    "tomesd": BASE.replace(".py", "-tomesd_5e-1.py") + HEADER + WEIGHTS,
}
MERGED = [name for name in SPELLINGS if name != "baseline"]


@pytest.fixture
def write(tmp_path, sd_folder):
    """Writes a config, by the name of a spelling or as text; returns its path."""

    def write(spelling, **changes):
        text = SPELLINGS.get(spelling, spelling)
        model = tiny.tiny_config(folder=sd_folder, **changes)
        file = tmp_path / "config.py"
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


def image(model, **changes):
    model.eval()
    call = {**tiny.QUICK, **changes}
    return np.asarray(model.infer("a cat", seed=3, **call)["samples"][0], dtype=np.float32)


@pytest.fixture(scope="module")
def expected(sd_folder):
    """(baseline, merged) image, merged by a call of ``apply_tome``."""
    model = tiny.tiny_model(folder=sd_folder)
    # tiny_model draws new weights; the configs here take those of the folder.
    model.load_state_dict(_from_folder(sd_folder).state_dict())
    baseline = image(model)
    apply_tome(model, ratio=RATIO)
    merged = image(model)
    assert np.abs(baseline - merged).max() > 1, "merging has to be visible for these tests"
    return baseline, merged


def _from_folder(folder):
    from mmagic.registry import MODELS
    from mmengine.registry import init_default_scope

    init_default_scope("mmagic")  # as MMagic's init_model does
    return MODELS.build(tiny.tiny_config(folder=folder))


@pytest.mark.parametrize("builder", BUILDERS)
def test_without_the_key_nothing_happens(builder, write, expected):
    model = BUILDERS[builder](write("baseline"))
    assert model.tome_handle is None and model.cache_handle is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(interceptors_of(m) for m in model.modules())
    np.testing.assert_array_equal(image(model), expected[0])


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("spelling", MERGED)
def test_every_spelling_every_way(spelling, builder, write, expected):
    import mmagic.models

    model = BUILDERS[builder](write(spelling))
    assert isinstance(model, mmagic.models.StableDiffusion)
    assert type(model).__name__ == "StableDiffusion"
    assert model.tome_handle.config == ToMeConfig(ratio=RATIO)
    np.testing.assert_array_equal(image(model), expected[1])
    model.tome_handle.remove()
    assert model.tome_handle is None
    np.testing.assert_array_equal(image(model), expected[0])


# The same, with both keys.
BOTH = "tome_cfg=dict(ratio=0.5), cache_cfg='balanced'"
BOTH_KEYS = {
    "wrapper": f"model = dict(type='ToMe', model={{model}}, {BOTH})\n",
    "key": f"model = {{model}}\nmodel.update({BOTH})\n",
    "top": "model = {model}\ntome_cfg = dict(ratio=0.5)\ncache_cfg = 'balanced'\n",
    "one each": "model = {model}\nmodel.update(cache_cfg='balanced')\ntome_cfg = dict(ratio=0.5)\n",
}
CACHES = {name: text.replace("tome_cfg=dict(ratio=0.5), ", "") for name, text in BOTH_KEYS.items()}
CACHES = {name: text.replace("tome_cfg = dict(ratio=0.5)\n", "") for name, text in CACHES.items()}


@pytest.fixture(scope="module")
def with_caching(sd_folder):
    """Images of six steps: step caching alone, and both techniques."""
    model = _from_folder(sd_folder)
    apply_cache(model, "balanced")
    cached = image(model, num_inference_steps=6)
    apply_tome(model, ratio=RATIO)
    both = image(model, num_inference_steps=6)
    assert np.abs(cached - both).max() > 1
    return cached, both


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("merged", [False, True], ids=["caching alone", "both"])
@pytest.mark.parametrize("spelling", BOTH_KEYS)
def test_step_caching_in_every_spelling_every_way(spelling, merged, builder, write, with_caching):
    texts = BOTH_KEYS if merged else CACHES
    model = BUILDERS[builder](write(HEADER + texts[spelling]))
    assert type(model).__name__ == "StableDiffusion"
    assert type(model.unet).__name__ == "UNet2DConditionModel"
    assert model.cache_handle.config == PRESETS["balanced"]
    assert (model.tome_handle is not None) == merged
    found = image(model, num_inference_steps=6)
    np.testing.assert_allclose(found, with_caching[merged], rtol=0, atol=1)
    skipped = {row["region"]: row["skipped"] for row in model.cache_handle.stats()}
    assert skipped["network"] > 0
    model.cache_handle.remove()
    assert model.cache_handle is None and (model.tome_handle is not None) == merged


@pytest.mark.parametrize("builder", BUILDERS)
def test_step_caching_in_two_places_must_agree(builder, write):
    both = HEADER + CACHES["key"] + "cache_cfg = {value}\n"
    same = [config.to_dict() for config in PRESETS["balanced"]]
    agreeing = write(both.replace("{value}", repr(same).replace("{", "{{").replace("}", "}}")))
    assert BUILDERS[builder](agreeing).cache_handle.config == PRESETS["balanced"]
    says = "step caching is configured twice.*cache_cfg of the model.*at the top level.*keep one"
    with pytest.raises(ToMeError, match=says):
        BUILDERS[builder](write(both.replace("{value}", "'fast'")))


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEADER + "model = {model}\nmodel.update(tome_cfg=dict(ratio=0.95))\n", "ratio=0.95"),
        (HEADER + "model = {model}\nmodel.update(tome_cfg=0.5)\n", "dict"),
        (HEADER + "model = {model}\nmodel.update(tomesd_cfg=dict(ration=0.5))\n", "'ratio'"),
        (HEADER + "model = dict(type='ToMe', model={model}, tome_cfg=dict(sx=0))\n", "sx=0"),
        (HEADER + "model = {model}\ntome_cfg = dict(max_downsample=3)\n", "max_downsample=3"),
        (HEADER + "model = {model}\ntome_cfg = 'balanced'\n", "tome_cfg: .*dict"),
        (HEADER + "model = {model}\ncache_cfg = 'balancd'\n", "cache_cfg: .*'balanced'"),
        (HEADER + "model = {model}\nmodel.update(cache_cfg=dict(intervall=2))\n", "'interval'"),
        (HEADER + "model = dict(type='ToMe', model={model}, cache_cfg=2)\n", "no step cache"),
    ],
)
def test_bad_values(text, says, builder, write):
    with pytest.raises(ToMeError, match=says):
        BUILDERS[builder](write(text))


@pytest.mark.parametrize("builder", BUILDERS)
def test_two_places_must_agree(builder, write):
    both = SPELLINGS["key"] + "tome_cfg = dict(ratio={ratio})\n"
    agreeing = write(both.replace("{ratio}", "0.5"))
    assert BUILDERS[builder](agreeing).tome_handle.ratio == RATIO
    contradicting = write(both.replace("{ratio}", "0.25"))
    with pytest.raises(ToMeError, match=r"'ratio': 0.5.*top level.*'ratio': 0.25.*keep one"):
        BUILDERS[builder](contradicting)


@pytest.mark.parametrize("builder", BUILDERS)
def test_the_top_level_is_checked_before_anything_is_built(builder, write, monkeypatch):
    import mmagic.apis.inferencers.base_mmagic_inferencer as inferencer
    import mmagic.apis.inferencers.inference_functions as functions
    from mmengine.runner import runner

    def build(*args, **kwargs):
        raise AssertionError("built before the mistake was found")

    for module in (runner, inferencer, functions):
        monkeypatch.setattr(module.MODELS, "build", build)
    with pytest.raises(ToMeError, match="ratio=2"):
        BUILDERS[builder](write(HEADER + "model = {model}\ntome_cfg = dict(ratio=2)\n"))
    with pytest.raises(ToMeError, match="order=3"):
        BUILDERS[builder](write(HEADER + "model = {model}\ncache_cfg = dict(order=3)\n"))


# Classes that know nothing of this package: one of a user's own, and one outside of
# MMagic's Stable Diffusion family.
MINE = """
import mmagic.models
from mmagic.registry import MODELS

@MODELS.register_module(force=True)
class MyDiffusion(mmagic.models.StableDiffusion):
    pass
"""
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
    "subclass": MINE + HEADER + "model = {model}\nmodel.update(type='MyDiffusion')\n",
    "subclass in ToMe": MINE + HEADER + "model = {model}\nmodel.update(type='MyDiffusion')\n"
    "model = dict(type='ToMe', model=model)\n",
    "outside": OUTSIDE + HEADER + "model = {model}\nmodel.update(type='Outside')\n",
}
# mmengine's config style with imports.
CLASS_OBJECT = """
from mmagic.models import StableDiffusion
model = {model}
model.update(type=StableDiffusion)
"""


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(kind, builder, write, monkeypatch):
    from mmengine import Config

    config = _config_of(KINDS[kind], write)
    config.tome_cfg = dict(ratio=0.25)
    config.cache_cfg = "fast"
    monkeypatch.setattr(Config, "fromfile", lambda *args, **kwargs: copy.deepcopy(config))
    model = BUILDERS[builder](config.filename)
    assert get_handle(model, "tome").ratio == 0.25
    assert get_handle(model, "cache").config == PRESETS["fast"]


@pytest.mark.parametrize("key", ["tome_cfg", "tomesd_cfg"])
def test_the_key_of_a_class_of_ones_own(key, write):
    from mmagic.apis import init_model

    config = _config_of(KINDS["subclass"], write)
    config.model[key] = dict(ratio=0.25)
    config.model.cache_cfg = "fast"
    model = init_model(config, device="cpu")
    assert model.tome_handle.ratio == 0.25
    assert model.cache_handle.config == PRESETS["fast"]


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("spelling", ["tome_cfg = {}", "model.update(tome_cfg={})"])
def test_a_class_object_in_place_of_a_name(spelling, builder, write):
    file = write(CLASS_OBJECT + spelling.format("dict(ratio=0.25)") + "\n")
    assert BUILDERS[builder](file).tome_handle.ratio == 0.25


def _config_of(text, write):
    from mmengine import Config

    file = write(text)
    names = {}
    with open(file) as stream:
        exec(stream.read(), names)
    return Config(dict(model=names["model"], default_scope="mmagic"), filename=file)


@pytest.mark.parametrize("builder", ["init_model", "runner"])
def test_what_cannot_be_merged_says_so(builder, write):
    text = HEADER + "model = dict(type='BaseEditModel', generator=dict(type='SRCNNNet'),\n"
    text += "    pixel_loss=dict(type='L1Loss'))\n"
    for key in ("tome_cfg = dict(ratio=0.5)\n", "cache_cfg = 'balanced'\n"):
        with pytest.raises(ToMeError, match="BaseEditModel"):
            BUILDERS[builder](write(text + key))


def test_flexible_runner(write, tmp_path):
    from mmengine import Config
    from mmengine.runner import FlexibleRunner

    def runner(file):
        config = Config.fromfile(file)
        settings = dict(work_dir=str(tmp_path), default_scope="mmagic", env_cfg={})
        config.update(settings, experiment_name=f"test_{next(_COUNT)}")
        return FlexibleRunner.from_cfg(config)

    merged = runner(write("top"))
    merged.strategy.prepare(merged.model)  # as train, val and test do
    assert get_handle(merged.strategy.model).ratio == RATIO
    cached = runner(write(HEADER + CACHES["top"]))
    cached.strategy.prepare(cached.model)
    assert get_handle(cached.strategy.model, "cache").config == PRESETS["balanced"]
    with pytest.raises(ToMeError, match="ratio=2"):
        runner(write(HEADER + "model = {model}\ntome_cfg = dict(ratio=2)\n"))


def test_runner_applies_to_a_model_object(tmp_path):
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Plain(BaseModel):
        def __init__(self):
            super().__init__()
            self.unet = tiny.tiny_unet()

        def forward(self, *args, **kwargs):
            return None

    def run(cfg):
        name = f"test_{next(_COUNT)}"
        settings = dict(work_dir=str(tmp_path), log_level="ERROR", experiment_name=name)
        return Runner(Plain(), cfg=cfg, **settings).model

    assert get_handle(run({})) is None
    assert get_handle(run({"tome_cfg": None})) is None
    assert get_handle(run({"tome_cfg": {"ratio": 0.25}})).ratio == 0.25
    assert get_handle(run({"cache_cfg": "fast"}), "cache").config == PRESETS["fast"]


def test_runner_data_preprocessor_goes_to_the_inner_model(write, tmp_path):
    """mmengine puts a top-level data_preprocessor into the outermost model config."""
    text = SPELLINGS["wrapper"] + "data_preprocessor = dict(type='DataPreprocessor', mean=7)\n"
    model = by_runner(write(text))
    assert float(model.data_preprocessor.mean.flatten()[0]) == 7
