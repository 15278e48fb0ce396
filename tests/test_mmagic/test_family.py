# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The keys ``tome_cfg`` and ``cache_cfg`` of MMagic's nine Stable Diffusion classes."""

import copy
import pickle

import pytest

pytest.importorskip("mmagic")

import mmagic.models
import tiny
from mmagic.registry import MODELS

from mmagic_tome import ToMeConfig, ToMeError, apply_tome
from mmagic_tome.cache import PRESETS

# Of both spellings, with and without classes of their own in between.
NAMES = ("sd", "sdxl", "StableDiffusion", "ControlStableDiffusionImg2Img", "ViCo", "AnimateDiff")


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_still_mmagics_own_class(name):
    cls = MODELS.get(name)
    assert cls.__module__.startswith("mmagic.models.editors.")
    assert pickle.loads(pickle.dumps(cls)) is cls


def test_vico_reads_the_cross_attention_of_all_tokens(tmp_path):
    # ViCo insists on CLIP's own number of words.
    model = tiny.tiny_model("ViCo", tiny.tiny_sd_folder(tmp_path, vocabulary=49408))
    for target in ("crossattn", "block"):
        with pytest.raises(ToMeError, match="ViCo reads the cross-attention"):
            apply_tome(model, targets=[target])
    apply_tome(model, targets=["attn", "mlp"])


@pytest.mark.parametrize("kind", ["StableDiffusion", "native", "StableDiffusionXL"])
def test_tomesd_cfg_is_served_by_this_package(kind, sd_folder):
    """Its keys and defaults, without ``max_downsample``, which merges nothing in SDXL; it has no
    proportional attention."""
    model = tiny.tiny_model(kind, sd_folder, tomesd_cfg=dict(ratio=0.5))
    assert model.tome_handle.config == ToMeConfig(ratio=0.5, prop_attn=False)
    assert not any("ToMeBlock" in type(module).__name__ for module in model.modules())
    model.tomesd_cfg = dict(ratio=0.25)
    model.set_tomesd()
    assert model.tome_handle.ratio == 0.25


def test_tome_cfg_and_tomesd_cfg_must_agree(sd_folder):
    def build(**keys):
        return tiny.tiny_model("StableDiffusion", sd_folder, **keys)

    same = dict(ratio=0.25, prop_attn=False)
    agreeing = build(tome_cfg=same, tomesd_cfg=dict(ratio=0.25, sx=2))
    assert agreeing.tome_handle.ratio == 0.25
    with pytest.raises(ToMeError, match=r"tome_cfg: {'ratio': 0.25.*; tomesd_cfg: {'ratio': 0.5"):
        build(tome_cfg=same, tomesd_cfg=dict(ratio=0.5))
    with pytest.raises(ToMeError, match="are all False, which merges nothing"):
        build(tomesd_cfg=dict(merge_attn=False))


def test_assigning_cfg(sd_folder):
    model = tiny.tiny_model("StableDiffusion", sd_folder)
    assert not hasattr(model, "cfg")
    for without in (None, {}, dict(tome_cfg=None, cache_cfg=None)):
        model.cfg = without
        assert model.cfg is without
        assert model.tome_handle is None and model.cache_handle is None
    model.cfg = dict(tome_cfg=dict(ratio=0.25))
    assert model.tome_handle.ratio == 0.25
    model.cfg = dict(tome_cfg=dict(ratio=0.5))  # a later config replaces an earlier one
    assert model.tome_handle.ratio == 0.5
    model.cfg = dict(cache_cfg="quality")  # and changes nothing else
    assert model.cache_handle.config == PRESETS["quality"] and model.tome_handle.ratio == 0.5


class ReplacesTheUnet(mmagic.models.StableDiffusionInpaint):
    """Names every argument, and is no longer what its base built."""

    def __init__(
        self, vae, text_encoder, tokenizer, unet, scheduler, test_scheduler, enable_xformers
    ):
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, test_scheduler)
        self.unet = copy.deepcopy(self.unet)


class HasADefault(mmagic.models.StableDiffusion):
    def __init__(self, *args, tome_cfg=None, **kwargs):
        super().__init__(*args, tome_cfg=tome_cfg or dict(ratio=0.125), **kwargs)


class SetsCfg(mmagic.models.StableDiffusion):
    def __init__(self, *args, **kwargs):
        self.cfg = dict(tome_cfg=dict(ratio=0.25))  # before there is a UNet
        super().__init__(*args, **kwargs)


OWN = (ReplacesTheUnet, HasADefault, SetsCfg)


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
    assert model.cache_handle.config == PRESETS["quality"]
    with pytest.raises(ToMeError, match=r"step caching is configured twice.*keep one"):
        model.cfg = dict(cache_cfg="fast")
    assert (model.tome_handle and model.tome_handle.ratio) == default
