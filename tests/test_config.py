# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import json

import numpy as np
import pytest

from mmagic_tome import ToMeConfig, ToMeError
from mmagic_tome.schedules import Place

FOREIGN = dict(
    ratio=dict(downsample={1: np.float32(0.5), 2: 0.25}, timestep=dict(timestep_range=(0.25, 1))),
    sx=np.int64(3),
    max_downsample=np.int32(2),
    plan_interval=np.int64(2),
    seed=2**40,
)
LISTS = dict(
    ratio=dict(depth=(0.5, 0.25), timestep=dict(points=[[1, 1], [0, 0]])),
    targets=("mlp", "attn"),
    plan_interval=(8, 0, 3, 3),
    method=dict(type="todo"),
    controlnet=dict(ratio=0.25, targets=["attn"]),
)


@pytest.mark.parametrize("options", [{}, FOREIGN, LISTS], ids=["default", "numpy", "lists"])
def test_json_returns_an_equal_config(options):
    config = ToMeConfig(**options)
    plain = config.to_dict()
    again = ToMeConfig.coerce(json.loads(json.dumps(plain)))
    assert again == config and {config: 1}[again] == 1 and again.to_dict() == plain
    if options is FOREIGN:
        assert type(config.plan_interval) is type(config.sx) is int
        assert again.ratio_schedule(Place("attn", 2, timestep=0.5)) == 0.25
    if options is LISTS:
        # A method that keeps queries merges keys and values.
        assert config.plan_interval == (0, 3, 8) and config.kinds == ("attn_kv", "mlp")
        changed = dict(ratio=0.25, targets=["attn"], controlnet=False)
        assert config.controlnet_config == config.replace(**changed)
        assert config.replace(controlnet=True).controlnet_config == config.replace(controlnet=False)


def test_coerce_and_replace():
    assert ToMeConfig.coerce() == ToMeConfig()
    assert ToMeConfig.coerce({"ratio": 0.4}, ratio=0.3).ratio == 0.3
    config = ToMeConfig(seed=4)
    assert ToMeConfig.coerce(config) is config
    assert ToMeConfig.coerce(config, ratio=0).to_dict() == {**config.to_dict(), "ratio": 0}
    mmengine = pytest.importorskip("mmengine")
    assert ToMeConfig.coerce(mmengine.ConfigDict(ratio=0.25)).ratio == 0.25
    with pytest.raises(AttributeError):
        config.ratio = 0.1
    with pytest.raises(ToMeError, match=r"write for example ToMeConfig\(ratio=0.5\)"):
        ToMeConfig(0.5)
    for value in (0.5, "balanced", [("ratio", 0.5)]):
        with pytest.raises(ToMeError, match=r"must be a dict such as dict\(ratio=0.5\).*apply_cac"):
            ToMeConfig.coerce(value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(ratio=0.95), ["ratio=0.95", "sx=4, sy=4", "write ratio=0.9375, or wider cells"]),
        (dict(ratio=-0.1), ["[0, 0.9375]", "write ratio=0"]),
        (dict(ratio="half"), ["ratio='half'", "a number", "write ratio=0.5"]),
        (dict(ratio=True), ["a number"]),
        (dict(sx=1, sy=2, ratio=0.6), ["ratio=0.6", "0.5"]),
        (dict(sx=0), ["[1, 16]", "write sx=1"]),
        (dict(sx=1, sy=1), ["sx=1", "sy=1", "sx=2"]),
        (dict(max_downsample=3), ["one of [1, 2, 4", "write max_downsample=2"]),
        (dict(max_downsample="fine"), ["'auto'"]),
        (dict(use_rand=1), ["True or False", "write use_rand=True"]),
        (dict(seed=-1), ["write seed=0"]),
        (dict(plan_interval=[]), ["plan_interval=[0, 8, 11, 13, 20]"]),
        (dict(plan_interval=[0, 2.5]), ["list of step numbers"]),
        (dict(plan_interval=0), ["write plan_interval=1"]),
        (dict(share_plans=True), ["no longer used by others", "write plan_interval=2"]),
        (dict(residual=True), ["no longer offered", "leave it out"]),
        (dict(targets=[]), ["targets=['attn']"]),
        (dict(targets=3), ["targets=['attn']"]),
        (dict(targets=["mpl"]), ["write targets=['mlp']"]),
        (dict(targets=["block", "mlp"]), ["targets=['block']"]),
        (dict(targets=["attn", "attn_kv"]), ["write one"]),
        (dict(prop_attn=1), ["prop_attn=1 must be True, False or 'auto'; write prop_attn='auto'"]),
        (dict(prop_attn=True, targets="block"), ["targets are block; write targets=['attn'], or"]),
        (dict(across_frames=True, targets=["stack"]), ["'stack'; write targets=['block']"]),
        (dict(across_frames=True, method="todo"), ["'attn_kv'; write", "method than 'todo'"]),
        (dict(method="tomme"), ["did you mean 'tome'"]),
        (dict(method=dict(attn="tome")), ["under 'type'"]),
        (dict(method=dict(type="tome", window=3)), ["window"]),
        (dict(controlnet=1), ["controlnet=1 must be True, False or a dict"]),
        (dict(controlnet=dict(ratio=0.95)), ["controlnet: ratio=0.95 is above"]),
        (dict(controlnet=dict(controlnet=True)), ["has no 'controlnet'"]),
        (dict(ration=0.5), ["'ration'", "did you mean 'ratio'"]),
        (dict(foo=0.5), ["'foo'", "Known: ratio"]),
        # Of before, or of elsewhere.
        (dict(merge_mlp=True), ["targets=['attn', 'mlp']"]),
        (dict(preset="balanced"), ["cache_cfg='balanced'", "apply_cache"]),
        (dict(r=8), ["write ratio=0.5"]),
    ],
)
def test_errors_say_key_value_range_and_what_to_write(options, says):
    for make in (ToMeConfig, ToMeConfig().replace, lambda **given: ToMeConfig.coerce(given)):
        with pytest.raises(ToMeError) as error:
            make(**options)
        for text in says:
            assert text in str(error.value)
