# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The keys ``tome_cfg`` and ``cache_cfg`` of MMagic's nine Stable Diffusion classes."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("mmagic")

import mmagic.models
import tiny
from mmagic.registry import MODELS
from mmengine.model import BaseModel
from PIL import Image

from mmagic_tome import (
    StepCacheConfig,
    ToMeConfig,
    ToMeError,
    apply_tome,
    remove_cache,
    remove_tome,
)
from mmagic_tome.cache import PRESETS
from mmagic_tome.mmagic.family import patch

FAMILY = (
    "StableDiffusion",
    "StableDiffusionInpaint",
    "StableDiffusionXL",
    "ControlStableDiffusion",
    "DreamBooth",
    "TextualInversion",
    "ViCo",
    "FastComposer",
    "AnimateDiff",
)
ALIASES = {
    "sd": "StableDiffusion",
    "sd-inpaint": "StableDiffusionInpaint",
    "sdxl": "StableDiffusionXL",
    "animatediff": "AnimateDiff",
    "ControlStableDiffusionImg2Img": "ControlStableDiffusionImg2Img",
}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """With CLIP's own number of words, on which ViCo insists."""
    return tiny.tiny_sd_folder(tmp_path_factory.mktemp("clip_sd"), vocabulary=49408)


def infer(kind, model, **changes):
    """One small image (or clip) as an array; the same at every call."""
    noise = np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    arguments = {
        "StableDiffusionInpaint": dict(
            image=image, mask_image=Image.fromarray((np.eye(64) * 255).astype(np.uint8))
        ),
        "ControlStableDiffusion": dict(control=image),
        "TextualInversion": dict(prompt="a <x>"),
        "ViCo": dict(prompt="a S*", image_reference=image),
        "FastComposer": dict(prompt="a cat img", reference_subject_images=[image]),
        "AnimateDiff": dict(video_length=2),
    }.get(kind, {})
    quick = dict(tiny.QUICK)
    if kind in ("FastComposer", "AnimateDiff"):
        del quick["show_progress"]
    torch.manual_seed(0)  # some of them have no seed argument
    result = model.infer(**{"prompt": "a cat", **quick, **arguments, **changes})
    if isinstance(result, dict):
        result = result["samples"]
    return np.asarray(result[0] if isinstance(result, (list, tuple)) else result, dtype=np.float32)


@pytest.mark.parametrize("name", [*FAMILY, *ALIASES])
def test_every_name_is_still_mmagics_own_class(name):
    cls = MODELS.get(name)
    assert cls.__module__.startswith("mmagic.models.editors.")
    assert cls.__name__ == ALIASES.get(name, name)
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert "tokenizer" in inspect.signature(cls).parameters or name in (
        "StableDiffusionInpaint",  # whose own is (*args, **kwargs)
        "sd-inpaint",
        "StableDiffusionXL",
        "sdxl",
    )


@pytest.mark.parametrize("kind", [*FAMILY, "native"])
def test_infer(kind, clip_folder):
    baseline = tiny.tiny_model(kind, clip_folder)
    model = tiny.tiny_model(kind, clip_folder, tome_cfg=dict(ratio=0.5))
    assert list(model.state_dict()) == list(baseline.state_dict())
    before = infer(kind, baseline)
    merged = infer(kind, model)
    for row in model.tome_handle.stats():
        assert row["calls"] > 0
        assert row["kept"] == row["tokens"] / 2
    assert np.isfinite(merged).all()
    assert np.abs(merged - before).max() > 1e-3
    np.testing.assert_array_equal(infer(kind, model), merged)  # however often
    model.tome_handle.ratio = 0
    np.testing.assert_array_equal(infer(kind, model), before)
    model.tome_handle.ratio = 0.5
    assert remove_tome(model)
    np.testing.assert_array_equal(infer(kind, model), before)


@pytest.mark.parametrize("region", ["network", "inner"])
@pytest.mark.parametrize("kind", [*FAMILY, "native"])
def test_step_caching(kind, region, clip_folder):
    """Alone, and with token merging; of five steps the second and the fourth are skipped."""
    options = dict(region=region, timestep_range=(0, 1), order=0)
    model = tiny.tiny_model(kind, clip_folder, cache_cfg=options)
    handle = model.cache_handle
    assert model.tome_handle is None and handle.active
    assert handle.config == (StepCacheConfig(**options),)

    def image():
        return infer(kind, model, num_inference_steps=5)

    cached = image()
    rows = {row["region"]: (row["computed"], row["skipped"]) for row in handle.stats()}
    calls = sum(rows[region])
    assert calls in (5, 10)  # with or without guidance in one batch
    assert rows[region] == (calls * 3 // 5, calls * 2 // 5)
    assert ("controlnet.network" in rows) == (kind == "ControlStableDiffusion" and len(rows) == 2)
    assert np.isfinite(cached).all()
    np.testing.assert_array_equal(image(), cached)  # however often
    with handle.disabled():
        baseline = image()
    assert np.abs(cached - baseline).max() > 1e-3
    apply_tome(model, ratio=0.5)
    both = image()
    assert np.abs(both - cached).max() > 1e-3
    assert all(row["kept"] == row["tokens"] / 2 for row in model.tome_handle.stats())
    assert remove_tome(model)
    np.testing.assert_array_equal(image(), cached)
    assert remove_cache(model) and model.cache_handle is None
    np.testing.assert_array_equal(image(), baseline)


@pytest.mark.parametrize("kind", [*FAMILY, "native"])
def test_both_keys_of_one_model(kind, clip_folder):
    keys = dict(tome_cfg=dict(ratio=0.25), cache_cfg="balanced")
    model = tiny.tiny_model(kind, clip_folder, **keys)
    assert model.tome_handle.config == ToMeConfig(ratio=0.25)
    assert model.cache_handle.config == PRESETS["balanced"]
    assert type(model) is MODELS.get("StableDiffusion" if kind == "native" else kind)
    assert np.isfinite(infer(kind, model, num_inference_steps=6)).all()
    skipped = {row["region"]: row["skipped"] for row in model.cache_handle.stats()}
    assert skipped["network"] > 0
    model.tome_handle.remove()
    assert model.tome_handle is None and model.cache_handle.active
    with pytest.raises(ToMeError, match=r"step caching is configured twice.*keep one"):
        model.cfg = dict(cache_cfg="fast")


@pytest.mark.parametrize("target", ["attn_kv", "block"])
@pytest.mark.parametrize("kind", [*FAMILY, "native"])
def test_targets_and_residual(kind, target, clip_folder):
    if (kind, target) == ("ViCo", "block"):
        return
    options = dict(ratio=0.5, targets=[target], plan_interval=2, residual=True)
    model = tiny.tiny_model(kind, clip_folder, tome_cfg=options)
    merged = infer(kind, model)
    for row in model.tome_handle.stats():
        assert row["kept"] == row["tokens"] / 2, "at the second of two steps"
        assert 0 < row["unmerged_calls"] < row["calls"]
    np.testing.assert_array_equal(infer(kind, model), merged)
    assert np.isfinite(merged).all()
    # What one merged step of two leaves to see may be less than a level of 8 bits.
    remove_tome(model)
    assert np.abs(merged - infer(kind, model)).mean() < 0.1 * np.abs(merged).mean()


@pytest.mark.parametrize("target", ["crossattn", "block"])
def test_vico_reads_the_cross_attention_of_all_tokens(target, clip_folder):
    model = tiny.tiny_model("ViCo", clip_folder)
    with pytest.raises(ToMeError, match="ViCo reads the cross-attention"):
        apply_tome(model, targets=[target])
    apply_tome(model, targets=["attn", "mlp"])


@pytest.mark.parametrize("kind", ["StableDiffusion", "native", "StableDiffusionXL"])
def test_tomesd_cfg_is_served_by_this_package(kind, sd_folder):
    """Its keys and defaults, without ``max_downsample``, which merges nothing in SDXL."""
    model = tiny.tiny_model(kind, sd_folder, tomesd_cfg=dict(ratio=0.5))
    assert model.tome_handle.config == ToMeConfig(ratio=0.5)
    assert not any("ToMeBlock" in type(module).__name__ for module in model.modules())
    assert model.tomesd_cfg == dict(ratio=0.5)


def test_set_tomesd_called_by_hand(sd_folder):
    model = tiny.tiny_model("StableDiffusion", sd_folder)
    model.set_tomesd()
    assert model.tome_handle is None
    model.tomesd_cfg = dict(ratio=0.25)
    model.set_tomesd()
    assert model.tome_handle.ratio == 0.25


def test_both_keys(sd_folder):
    def build(**keys):
        return tiny.tiny_model("StableDiffusion", sd_folder, **keys)

    agreeing = build(tome_cfg=dict(ratio=0.25), tomesd_cfg=dict(ratio=0.25, sx=2))
    assert agreeing.tome_handle.ratio == 0.25
    with pytest.raises(ToMeError, match=r"tome_cfg: {'ratio': 0.25}; tomesd_cfg: {'ratio': 0.5}"):
        build(tome_cfg=dict(ratio=0.25), tomesd_cfg=dict(ratio=0.5))


@pytest.mark.parametrize("key", ["tome_cfg", "tomesd_cfg"])
@pytest.mark.parametrize("kind", FAMILY)
def test_bad_values_show_before_the_model_is_built(kind, key, monkeypatch):
    def init(self, *args, **kwargs):
        raise AssertionError("built before the mistake was found")

    monkeypatch.setattr(BaseModel, "__init__", init)
    with pytest.raises(ToMeError, match=f"{key}: ratio=0.9 is above"):
        MODELS.get(kind)(**{key: dict(ratio=0.9)})
    with pytest.raises(ToMeError, match=r"cache_cfg: .*write 'fast'"):
        MODELS.get(kind)(cache_cfg="fst")


def _deepcopy(model):
    # MMagic's wrapper of diffusers' schedulers recurses without end when it is copied.
    shared = (model.scheduler, model.test_scheduler)
    return copy.deepcopy(model, {id(scheduler): scheduler for scheduler in shared})


def _through_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    ("kind", "duplicate"),
    [
        ("StableDiffusion", _deepcopy),
        ("ViCo", _deepcopy),
        ("FastComposer", _deepcopy),
        ("native", _deepcopy),
        ("native", _through_pickle),
    ],
)
def test_duplicates_are_independent(kind, duplicate, clip_folder):
    keys = dict(tome_cfg=dict(ratio=0.5), cache_cfg=dict(order=0))
    model = tiny.tiny_model(kind, clip_folder, **keys)
    expected = infer(kind, model)
    other = duplicate(model)
    # Its weights lie elsewhere in memory: rounding may differ, by one of 256 levels.
    np.testing.assert_allclose(infer(kind, other), expected, rtol=0, atol=1)
    assert other.tome_handle.ratio == 0.5
    other.tome_handle.remove()
    assert other.tome_handle is None
    assert model.tome_handle is not None
    other.cache_handle.remove()
    assert other.cache_handle is None and model.cache_handle is not None
    np.testing.assert_array_equal(infer(kind, model), expected)
    assert np.abs(infer(kind, other) - expected).max() > 1e-3


def test_assigning_cfg(sd_folder):
    model = tiny.tiny_model("StableDiffusion", sd_folder)
    assert not hasattr(model, "cfg")
    for without in (None, {}, dict(tome_cfg=None), dict(cache_cfg=None)):
        model.cfg = without
        assert model.cfg is without
        assert model.tome_handle is None and model.cache_handle is None
    model.cfg = dict(tome_cfg=dict(ratio=0.25))
    assert model.tome_handle.ratio == 0.25
    model.cfg = dict(tome_cfg=dict(ratio=0.5))  # a later config replaces an earlier one
    assert model.tome_handle.ratio == 0.5
    model.cfg = {}  # and one that says nothing changes nothing
    assert model.tome_handle.ratio == 0.5
    apply_tome(model, ratio=0.25)
    assert model.tome_handle.ratio == 0.25
    assert model.cache_handle is None
    model.cfg = dict(cache_cfg="quality")
    assert model.cache_handle.config == PRESETS["quality"] and model.tome_handle.ratio == 0.25


class Plain(mmagic.models.StableDiffusion):
    pass


class PassesOn(mmagic.models.StableDiffusion):
    def __init__(self, *args, mine=1, **kwargs):
        super().__init__(*args, **kwargs)
        self.mine = mine


class ReplacesTheUnet(mmagic.models.StableDiffusionInpaint):
    """Names every argument, and is no longer what its base built."""

    def __init__(
        self, vae, text_encoder, tokenizer, unet, scheduler, test_scheduler, enable_xformers
    ):
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            test_scheduler,
            enable_xformers=enable_xformers,
        )
        self.unet = copy.deepcopy(self.unet)


class HasADefault(mmagic.models.StableDiffusion):
    def __init__(self, *args, tome_cfg=None, **kwargs):
        super().__init__(*args, tome_cfg=tome_cfg or dict(ratio=0.125), **kwargs)


class KeepsIt(mmagic.models.StableDiffusion):
    def __init__(self, *args, tome_cfg=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.options = tome_cfg


class SetsCfg(mmagic.models.StableDiffusion):
    def __init__(self, *args, **kwargs):
        self.cfg = dict(tome_cfg=dict(ratio=0.25))  # before there is a UNet
        super().__init__(*args, **kwargs)


OWN = (Plain, PassesOn, ReplacesTheUnet, HasADefault, KeepsIt, SetsCfg)


@pytest.mark.parametrize("own", OWN)
def test_a_class_of_ones_own(own, sd_folder):
    def build(**keys):
        return tiny.tiny_model("StableDiffusion", sd_folder, type=own, **keys)

    default = {HasADefault: 0.125, SetsCfg: 0.25}.get(own)
    handle = build().tome_handle
    assert (handle and handle.ratio) == default
    model = build(tome_cfg=dict(ratio=0.25))
    assert type(model) is own
    assert model.tome_handle.ratio == 0.25
    assert {name for name in vars(model) if "tome" in name} == {"_mmagic_tome_cfg", "tomesd_cfg"}
    with pytest.raises(ToMeError, match="keep one"):
        model.cfg = dict(tome_cfg=dict(ratio=0.5))
    model = build(cache_cfg="quality")
    assert type(model) is own and model.cache_handle.config == PRESETS["quality"]
    assert (model.tome_handle and model.tome_handle.ratio) == default


@pytest.mark.parametrize("own", [Plain, PassesOn])
def test_tomesd_cfg_of_a_class_of_ones_own(own, sd_folder):
    model = tiny.tiny_model("StableDiffusion", sd_folder, type=own, tomesd_cfg=dict(ratio=0.25))
    assert model.tome_handle.config == ToMeConfig(ratio=0.25)


def test_patching_twice():
    before = dict(vars(mmagic.models.StableDiffusion))
    patch(mmagic.models.StableDiffusion)
    assert dict(vars(mmagic.models.StableDiffusion)) == before


def test_max_downsample_1_on_sdxl_says_which_levels_there_are(sd_folder):
    with pytest.raises(ToMeError, match="max_downsample"):
        tiny.tiny_model("StableDiffusionXL", sd_folder, tome_cfg=dict(max_downsample=1))
