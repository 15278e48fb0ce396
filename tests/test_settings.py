# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Token merging and step caching as one setting."""

import json

import pytest
import torch
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import StepCacheConfig, ToMeConfig, ToMeError, get_handle
from mmagic_tome.cache import PRESETS
from mmagic_tome.settings import Setting


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, Setting()),
        ({}, Setting()),
        ({"ratio": 0.25}, Setting(tome=ToMeConfig(ratio=0.25))),
        (ToMeConfig(prop_attn=True), Setting(tome=ToMeConfig(prop_attn=True))),
        ({"cache": "quality"}, Setting(cache=PRESETS["quality"])),
        ({"ratio": 0.5, "cache": None}, Setting(tome=ToMeConfig())),
        (
            {"sx": 4, "cache": {"region": "inner", "interval": 3}},
            Setting(ToMeConfig(sx=4), (StepCacheConfig(region="inner", interval=3),)),
        ),
        (
            {"ratio": {"downsample": {1: 0.5}}, "cache": [{"region": "network"}]},
            Setting(ToMeConfig(ratio={"downsample": {1: 0.5}}), (StepCacheConfig(),)),
        ),
    ],
)
def test_coerce_and_back(spec, expected):
    setting = Setting.coerce(spec)
    assert setting == expected
    assert Setting.coerce(setting) is setting
    assert Setting.coerce(setting.to_dict()) == setting
    json.dumps(setting.to_dict())


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("balanced", "a setting must be a dict"),
        ({"ration": 0.5}, "did you mean 'ratio'"),
        ({"cache": "faast"}, "'fast'"),
        ({"cache": {"intervall": 2}}, "did you mean 'interval'"),
    ],
)
def test_invalid(spec, complaint):
    with pytest.raises(ToMeError, match=complaint):
        Setting.coerce(spec)


def test_replace():
    setting = Setting.coerce({"ratio": 0.25, "cache": "fast"})
    assert setting.replace(sx=4) == Setting(ToMeConfig(ratio=0.25, sx=4), PRESETS["fast"])
    assert setting.replace(cache=None) == Setting(ToMeConfig(ratio=0.25))
    assert Setting().replace(cache="fast") == Setting(cache=PRESETS["fast"])


def test_description():
    assert Setting().description == "baseline"
    setting = Setting.coerce({"prop_attn": True, "cache": "fast"})
    assert setting.description == "ratio=0.5, prop_attn=True, cache='fast'"


def test_apply_leaves_the_model_as_it_was():
    unet, inputs = tiny_unet(), tiny_inputs()
    with torch.no_grad():
        baseline = unet(**inputs).sample
        with Setting.coerce({"ratio": 0.5, "cache": "balanced"}).apply(unet) as handles:
            assert handles.tome.config == ToMeConfig()
            assert handles.cache.config == PRESETS["balanced"]
            assert not torch.equal(unet(**inputs).sample, baseline)
            with handles.disabled():
                assert torch.equal(unet(**inputs).sample, baseline)
            handles.reset_run()
            handles.reset_stats()
            assert {row["calls"] for row in handles.tome.stats()} == {0}
        assert get_handle(unet) is None
        with Setting().apply(unet) as handles:
            assert list(handles) == []
            assert torch.equal(unet(**inputs).sample, baseline)


def test_a_failed_apply_changes_nothing():
    unet = tiny_unet()
    setting = Setting.coerce({"cache": {"region": "inner", "num_outer_blocks": 9}, "ratio": 0.5})
    with pytest.raises(ToMeError), setting.apply(unet):
        pass
    assert get_handle(unet) is None
