# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pytest

pytest.importorskip("mmagic")

import tiny
from mmengine import ConfigDict

from mmagic_tome import ToMeConfig, ToMeError, build_tome, get_handle


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


def test_keys_that_others_put_outermost_go_inside(built):
    build_tome(INNER, data_preprocessor="d", init_cfg="i")
    assert built == [{**INNER, "data_preprocessor": "d", "init_cfg": "i"}]
    build_tome({**INNER, "data_preprocessor": "own"}, data_preprocessor="d")
    assert built[1]["data_preprocessor"] == "own"


def test_a_model_object():
    unet = tiny.tiny_unet()
    assert build_tome(unet, tome_cfg=dict(ratio=0.25)) is unet
    assert get_handle(unet).ratio == 0.25


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(model=INNER, ratio=0.5), "'ratio'.*tome_cfg=dict"),
        (dict(model=INNER, tome_cfg=dict(ratio="half")), "tome_cfg: .*'half'"),
        (dict(model=INNER, tome_cfg=dict(nonsense=1)), "nonsense"),
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


def test_registered_in_mmagic():
    import mmengine.registry
    from mmagic.registry import MODELS

    assert MODELS.get("ToMe") is build_tome
    assert mmengine.registry.MODELS.get("mmagic.ToMe") is build_tome
