# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pytest

pytest.importorskip("mmagic")

import tiny
import torch
from mmagic.registry import MODELS
from mmengine import ConfigDict
from mmengine.registry import init_default_scope

from mmagic_tome import StepCacheConfig, ToMeConfig, ToMeError, build_tome, get_handle
from mmagic_tome.cache import PRESETS

INNER = {"type": "StableDiffusion", "vae": "v"}


@pytest.fixture
def built(monkeypatch):
    """Records what is built, and builds a bare model with a UNet instead."""
    calls = []

    def build(cfg):
        calls.append(dict(cfg))
        model = torch.nn.Module()
        model.unet = tiny.tiny_unet()
        return model

    monkeypatch.setattr(MODELS, "build", build)
    return calls


@pytest.mark.parametrize(
    ("technique", "given", "config"),
    [
        ("tome", ConfigDict(ratio=0.25), ToMeConfig(ratio=0.25)),
        ("tome", None, None),
        ("cache", "balanced", PRESETS["balanced"]),
        ("cache", [dict(order=0)], (StepCacheConfig(order=0),)),
        ("cache", None, None),
    ],
)
def test_kinds_of_values(technique, given, config, built):
    model = build_tome(ConfigDict(INNER), **{f"{technique}_cfg": given})
    assert built == [INNER]
    handle = get_handle(model, technique)
    assert (handle and handle.config) == config
    assert get_handle(model, "cache" if technique == "tome" else "tome") is None


def test_keys_that_others_put_outermost_go_inside(built):
    build_tome(INNER, data_preprocessor="d", init_cfg="i")
    assert built == [{**INNER, "data_preprocessor": "d", "init_cfg": "i"}]
    build_tome({**INNER, "data_preprocessor": "own"}, data_preprocessor="d")
    assert built[1]["data_preprocessor"] == "own"


def test_keys_of_the_inner_model_must_agree(sd_folder):
    init_default_scope("mmagic")
    inner = tiny.tiny_config(folder=sd_folder, tomesd_cfg=dict(ratio=0.25), cache_cfg="balanced")
    plain = [config.to_dict() for config in PRESETS["balanced"]]
    same = dict(ratio=0.25, sx=2, prop_attn=False)  # as tomesd_cfg means it
    model = build_tome(inner, tome_cfg=same, cache_cfg=plain)
    assert model.tome_handle.ratio == 0.25 and model.cache_handle.config == PRESETS["balanced"]
    both = r"'ratio': 0.25, .*}; tome_cfg of type='ToMe': {'ratio': 0.5, .*}"
    for options, says in (
        (dict(tome_cfg=dict(ratio=0.5)), both),
        (dict(cache_cfg="fast"), "step caching is configured twice.*keep one"),
    ):
        with pytest.raises(ToMeError, match=says):
            build_tome(inner, **options)


def test_a_model_object():
    unet = tiny.tiny_unet()
    assert build_tome(unet, tome_cfg=dict(ratio=0.25), cache_cfg="quality") is unet
    assert get_handle(unet).ratio == 0.25
    assert get_handle(unet, "cache").config == PRESETS["quality"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(model=INNER, ratio=0.5), "'ratio'.*tome_cfg=dict"),
        (dict(model=INNER, tome_cfg=dict(ratio="half")), "tome_cfg: .*'half'"),
        (dict(model=INNER, cache_cfg="balancd"), "cache_cfg: .*write 'balanced'"),
        (dict(model="StableDiffusion"), "model=dict.*'StableDiffusion'"),
        (dict(model=dict(unet="u")), "model=dict"),
    ],
)
def test_mistakes_show_before_anything_is_built(arguments, says, built):
    with pytest.raises(ToMeError, match=says):
        build_tome(**arguments)
    assert built == []


def test_registered_in_mmagic_where_a_model_has_nothing_to_merge():
    assert MODELS.get("ToMe") is MODELS.get("mmagic.ToMe") is build_tome
    for options in (dict(tome_cfg=dict(ratio=0.5)), dict(cache_cfg="balanced")):
        with pytest.raises(ToMeError, match="SRCNN"):
            build_tome(dict(type="SRCNNNet"), **options)
