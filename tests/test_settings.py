# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Token merging and step caching as one setting."""

import json

import pytest
import torch
from tiny import run, tiny_unet

from mmagic_tome import StepCacheConfig, ToMeConfig, ToMeError, get_handle
from mmagic_tome.cache import PRESETS
from mmagic_tome.settings import Setting

INNER = {"region": "inner", "interval": 3}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, Setting()),
        (ToMeConfig(prop_attn=True), Setting(ToMeConfig(prop_attn=True))),
        ({"ratio": 0.5, "cache": None}, Setting(ToMeConfig())),
        ({"cache": "quality"}, Setting(cache=PRESETS["quality"])),
        ({"sx": 4, "cache": INNER}, Setting(ToMeConfig(sx=4), (StepCacheConfig(**INNER),))),
    ],
)
def test_coerce_and_back(spec, expected):
    setting = Setting.coerce(spec)
    assert setting == expected and Setting.coerce(setting) is setting
    assert Setting.coerce(json.loads(json.dumps(setting.to_dict()))) == setting
    assert setting.baseline == (spec is None)
    assert setting.replace(cache="fast") == Setting(setting.tome, PRESETS["fast"])
    changed = setting.replace(ratio=0.125)
    assert changed.tome == ToMeConfig.coerce(setting.tome, ratio=0.125)
    assert changed.cache == setting.cache


def test_description():
    assert Setting().description == "baseline"
    setting = Setting.coerce({"prop_attn": True, "cache": "fast"})
    assert setting.description == "ratio=0.5, prop_attn=True, cache='fast'"
    assert ToMeConfig(ratio=min, method="todo").description == "ratio=min, method='todo'"
    inner = {"tolerance": 0.02, "region": "inner"}
    for cache in (inner, {"tolerance": 0.5}, {"interval": 3}):
        setting = Setting.coerce({"cache": cache})
        with setting.apply(tiny_unet()) as handles:
            assert handles.cache.description == setting.description
    assert Setting.coerce({"cache": inner}).description == "tolerance 0.02, inner region alone"


def test_invalid_settings_change_nothing():
    unet = tiny_unet()
    outer = {"cache": {"region": "inner", "num_outer_blocks": 9}, "ratio": 0.5}
    for spec, complaint in (
        ("balanced", "a setting must be a dict"),
        ({"ration": 0.5}, "did you mean 'ratio'"),
        ({"cache": "faast"}, "'fast'"),
        (outer, "inside the 9 outermost"),
    ):
        with pytest.raises(ToMeError, match=complaint), Setting.coerce(spec).apply(unet):
            pass
        assert get_handle(unet) is None


def test_apply_leaves_the_model_as_it_was():
    unet = tiny_unet()
    baseline = run(unet)
    with Setting.coerce({"ratio": 0.5, "cache": "balanced"}).apply(unet) as handles:
        assert handles.tome.config == ToMeConfig() and handles.cache.config == PRESETS["balanced"]
        assert not torch.equal(run(unet), baseline)
        with handles.disabled():
            assert torch.equal(run(unet), baseline)
        handles.reset_run()
        handles.reset_stats()
        assert {row["calls"] for row in handles.tome.stats()} == {0}
    assert get_handle(unet) is None
    with Setting().apply(unet) as handles:
        assert not handles and list(handles) == []
        assert torch.equal(run(unet), baseline)
