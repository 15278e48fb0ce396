# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pytest

pytest.importorskip("mmagic")

import tiny
from mmengine import ConfigDict

from mmagic_tome import StepCacheConfig, ToMeConfig, ToMeError, build_tome, get_handle
from mmagic_tome.cache import PRESETS


@pytest.fixture
def built(monkeypatch):
    """Records what is built, and builds a bare model with a UNet instead."""
    import torch
    from mmagic.registry import MODELS

    calls = []

    def build(cfg):
        calls.append(dict(cfg))
        model = torch.nn.Module()
        model.unet = tiny.tiny_unet()
        return model

    monkeypatch.setattr(MODELS, "build", build)
    return calls


INNER = {"type": "StableDiffusion", "vae": "v"}


def test_builds_and_returns_the_inner_model(built):
    model = build_tome(INNER, tome_cfg=dict(ratio=0.25))
    assert built == [INNER]
    assert get_handle(model).ratio == 0.25


@pytest.mark.parametrize("make", [dict, ConfigDict, lambda **kw: ToMeConfig(**kw)])
def test_kinds_of_config(make, built):
    assert get_handle(build_tome(ConfigDict(INNER), tome_cfg=make(ratio=0.25))).ratio == 0.25


def test_no_config_no_merging(built):
    assert get_handle(build_tome(INNER)) is None
    assert get_handle(build_tome(INNER, tome_cfg=None)) is None


def test_an_empty_config_means_the_defaults(built):
    assert get_handle(build_tome(INNER, tome_cfg={})).config == ToMeConfig()


@pytest.mark.parametrize("key", ["tome_cfg", "tomesd_cfg"])
def test_keys_of_the_inner_model(key, built):
    inner = {**INNER, key: dict(ratio=0.25)}
    assert get_handle(build_tome(inner)).ratio == 0.25
    assert get_handle(build_tome(inner, tome_cfg=dict(ratio=0.25, sx=2))).ratio == 0.25
    assert built == [INNER, INNER]  # the model is not asked to understand the key
    with pytest.raises(ToMeError, match=f"'ratio': 0.5.*{key}.*'ratio': 0.25.*keep one"):
        build_tome(inner, tome_cfg=dict(ratio=0.5))
    assert len(built) == 2
    assert inner == {**INNER, key: dict(ratio=0.25)}  # a config is not ours to change


@pytest.mark.parametrize(
    ("spec", "configs"),
    [
        ("balanced", PRESETS["balanced"]),
        (dict(region="inner"), (StepCacheConfig(region="inner"),)),
        (ConfigDict(interval=3), (StepCacheConfig(interval=3),)),
        (StepCacheConfig(order=0), (StepCacheConfig(order=0),)),
        ([dict(region="inner"), dict(order=2)], None),
    ],
)
def test_step_caching(spec, configs, built):
    configs = configs or (StepCacheConfig(order=2), StepCacheConfig(region="inner"))
    model = build_tome(INNER, cache_cfg=spec)
    assert built == [INNER]
    assert get_handle(model, "cache").config == configs
    assert get_handle(model, "tome") is None
    assert type(model.unet).__name__ == "UNet2DConditionModel"
    model = build_tome({**INNER, "cache_cfg": spec}, tome_cfg=dict(ratio=0.25))
    assert built == [INNER, INNER]  # the model is not asked to understand the key
    assert get_handle(model, "cache").config == configs
    assert get_handle(model, "tome").ratio == 0.25


def test_step_caching_in_two_places(built):
    inner = {**INNER, "cache_cfg": "balanced"}
    assert get_handle(build_tome(inner, cache_cfg="balanced")) is not None
    plain = [config.to_dict() for config in PRESETS["balanced"]]
    assert get_handle(build_tome(inner, cache_cfg=plain), "cache") is not None
    says = r"step caching is configured twice .*cache_cfg: .*cache_cfg of the inner model.*keep one"
    with pytest.raises(ToMeError, match=says):
        build_tome(inner, cache_cfg="fast")
    with pytest.raises(ToMeError, match="token merging is configured twice"):
        build_tome({**inner, "tome_cfg": dict(ratio=0.25)}, tome_cfg=dict(ratio=0.5))
    assert len(built) == 2


def test_keys_that_others_put_outermost_go_inside(built):
    build_tome(INNER, data_preprocessor="d", init_cfg="i")
    assert built == [{**INNER, "data_preprocessor": "d", "init_cfg": "i"}]
    build_tome({**INNER, "data_preprocessor": "own"}, data_preprocessor="d")
    assert built[1]["data_preprocessor"] == "own"


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
        (dict(model=INNER, tome_cfg=dict(nonsense=1)), "nonsense"),
        (dict(model=INNER, tome_cfg=dict(preset="balanced")), "cache_cfg='balanced'"),
        (dict(model=INNER, cache_cfg="balancd"), "cache_cfg: .*write 'balanced'"),
        (dict(model=INNER, cache_cfg=dict(intervall=2)), "cache_cfg: .*'interval'"),
        (dict(model=INNER, cache_cfg=0.5), "cache_cfg: .*no step cache"),
        (dict(model=INNER, cache_cfg=[]), "cache_cfg: .*no step cache"),
        (dict(model=dict(INNER, cache_cfg="fastt")), "cache_cfg of the inner model: .*'fast'"),
        (dict(model="StableDiffusion"), "model=dict.*'StableDiffusion'"),
        (dict(model=dict(unet="u")), "model=dict"),
    ],
)
def test_mistakes_show_before_anything_is_built(arguments, says, built):
    with pytest.raises(ToMeError, match=says):
        build_tome(**arguments)
    assert built == []


def test_a_model_with_nothing_to_merge():
    with pytest.raises(ToMeError, match="SRCNN"):
        build_tome(dict(type="SRCNNNet"), tome_cfg=dict(ratio=0.5))
    with pytest.raises(ToMeError, match="SRCNN"):
        build_tome(dict(type="SRCNNNet"), cache_cfg="balanced")


def test_registered_in_mmagic():
    import mmengine.registry
    from mmagic.registry import MODELS

    assert MODELS.get("ToMe") is build_tome
    assert mmengine.registry.MODELS.get("mmagic.ToMe") is build_tome
