# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pickle

import pytest

from mmagic_tome import StepCacheConfig, ToMeError
from mmagic_tome.cache import PRESETS, coerce_cache


def test_copies_are_checked_and_pickles_work():
    config = StepCacheConfig(region="inner", timestep_range=[0.1, 0.5])
    assert pickle.loads(pickle.dumps(config)) == config == config.replace()
    changed = dict(region="inner", interval=3, timestep_range=(0.1, 0.5))
    assert config.replace(interval=3) == StepCacheConfig(**changed)
    with pytest.raises(ToMeError, match=r"write for example StepCacheConfig\(interval=3\)"):
        StepCacheConfig("inner")
    with pytest.raises(ToMeError, match="did you mean 'interval'"):
        config.replace(intervall=3)
    with pytest.raises(ToMeError, match="interval=1"):
        config.replace(interval=1)


def test_options_and_dicts():
    mmengine = pytest.importorskip("mmengine")
    assert coerce_cache() == PRESETS["balanced"]
    assert coerce_cache(interval=3) == (StepCacheConfig(interval=3),)
    one = StepCacheConfig(region="inner", interval=3)
    options = dict(region="inner", interval=3)
    for given in (one, one.to_dict(), options, [one], (one,), mmengine.ConfigDict(options)):
        assert coerce_cache(given) == coerce_cache([one]) == (one,)
    assert coerce_cache(one, interval=4, order=0) == (one.replace(interval=4, order=0),)
    inner = (StepCacheConfig(region="inner", tolerance=0.01),)
    assert coerce_cache("quality", region="inner") == inner
    # The larger region comes first.
    assert [one.region for one in coerce_cache([one, {}])] == ["network", "inner"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(interval=1), "write interval=2"),
        (dict(region="iner"), "write region='inner'"),
        (dict(intervall=2), "did you mean 'interval'"),
        (dict(cache_interval=2), "write interval"),
        (dict(order=3), "write order=2"),
        (dict(error_feedback=2), "write error_feedback=1"),
        (dict(error_feedback="all"), "write error_feedback=0.5"),
        (dict(timestep_range=(0.8, 0.2)), "write timestep_range=(0.2, 0.8)"),
        (dict(timestep_range=(0, 1000)), "1 is the start of a run"),
        (dict(num_outer_blocks=0), "write num_outer_blocks=1"),
        (dict(tolerance=-0.1), "tolerance=-0.1 must be a number at least 0"),
        (dict(tolerance="1%"), "write tolerance=0.01"),
        (dict(tolerance=1), "below 1; write tolerance=0.01"),
        (dict(tolerance=0.01, interval=3), "leave out interval"),
    ],
)
def test_bad_options_are_named(options, said):
    for make in (StepCacheConfig, coerce_cache, lambda **options: coerce_cache(options)):
        with pytest.raises(ToMeError) as error:
            make(**options)
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ("balance", {}, "no named setting; write 'balanced'"),
        (0.02, {}, "cache_cfg=0.02 is no step cache; write tolerance=0.02"),
        ([], {}, r"cache_cfg=\[\]"),
        ([2], {}, r"cache_cfg=\[2\] is no step cache"),
        ([dict(region="inner"), dict(region="inner", interval=3)], {}, "'inner' twice"),
        ("balanced", dict(interval=3), "a tolerance decides by itself .* leave out interval"),
        ([dict(region="inner"), {}], dict(interval=3), "has 2 regions"),
        ([dict(tolerance=0.01), dict(region="inner")], {}, "a tolerance covers all regions"),
    ],
)
def test_what_is_no_step_cache(config, options, said):
    with pytest.raises(ToMeError, match=said):
        coerce_cache(config, **options)
