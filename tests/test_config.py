# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import json

import numpy as np
import pytest
from mmagic_tome.reuse import Scope

from mmagic_tome import ToMeConfig, ToMeError
from mmagic_tome.schedules import Place


def test_defaults():
    config = ToMeConfig()
    assert config.to_dict() == {
        "ratio": 0.5,
        "max_downsample": "auto",
        "sx": 2,
        "sy": 2,
        "use_rand": True,
        "merge_attn": True,
        "merge_crossattn": False,
        "merge_mlp": False,
        "seed": 0,
        "exact_matching": False,
        "method": "tome",
        "sites": None,
        "refresh": None,
        "residual": None,
        "reuse": None,
        "controlnet": False,
        "across_frames": False,
        "proportional": False,
    }
    assert config.kinds == ("attn",) and config.ceiling == 0.75


def test_json_round_trip():
    config = ToMeConfig(ratio=0.6, sx=3, max_downsample=4, targets=["attn", "mlp"], seed=2**40)
    assert ToMeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_json_round_trip_of_levels_and_foreign_numbers():
    ratio = dict(level={1: np.float32(0.5), 2: 0.25}, noise=dict(between=(np.float64(0.25), 1)))
    config = ToMeConfig(
        ratio=ratio,
        refresh=dict(steps=np.int64(2), warmup=np.int32(2)),
        residual=dict(kind="exact", gain=np.float32(0.5)),
    )
    again = ToMeConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.to_dict() == config.to_dict()
    assert again.ratio["level"] == {1: 0.5, 2: 0.25}
    assert again.ratio_schedule(Place("attn", 2, noise=0.5)) == 0.25


def test_a_function_has_a_name_in_records():
    def falling(place):
        return 0.5 if place.noise > 0.5 else 0.25

    config = ToMeConfig(ratio=falling)
    assert config.to_dict()["ratio"] is falling
    assert json.loads(json.dumps(config.to_record()))["ratio"] == "falling"
    assert ToMeConfig(ratio=0.3).to_record() == ToMeConfig(ratio=0.3).to_dict()


def test_every_key_of_mmagic_is_accepted():
    config = ToMeConfig.coerce(
        dict(
            ratio=0.5,
            max_downsample=1,
            sx=2,
            sy=2,
            use_rand=False,
            merge_attn=True,
            merge_crossattn=True,
            targets=["attn", "mlp"],
        )
    )
    assert config.kinds == ("attn", "crossattn", "mlp") and not config.use_rand


def test_coerce():
    assert ToMeConfig.coerce() == ToMeConfig()
    assert ToMeConfig.coerce({"ratio": 0.4}, ratio=0.3).ratio == 0.3
    config = ToMeConfig(seed=4)
    assert ToMeConfig.coerce(config) is config
    assert ToMeConfig.coerce(config, ratio=0).to_dict() == {**config.to_dict(), "ratio": 0}
    mmengine = pytest.importorskip("mmengine")
    assert ToMeConfig.coerce(mmengine.ConfigDict(ratio=0.25)).ratio == 0.25


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(ratio=0.95), ["ratio=0.95", "0.75", "write ratio=0.75", "sx=5"]),
        (dict(ratio=-0.1), ["ratio=-0.1", "[0, 0.75]", "write ratio=0"]),
        (dict(ratio="half"), ["ratio='half'", "a number", "write ratio=0.5"]),
        (dict(ratio=True), ["ratio=True", "a number"]),
        (dict(ratio=float("nan")), ["ratio=nan", "a number"]),
        (dict(ratio=1.5), ["ratio=1.5", "ratio=0.75"]),
        (dict(sx=0), ["sx=0", "[1, 16]", "write sx=1"]),
        (dict(sy=2.5), ["sy=2.5", "an integer"]),
        (dict(sx=1, sy=1), ["sx=1", "sy=1", "sx=2"]),
        (dict(sx=1, sy=2, ratio=0.6), ["ratio=0.6", "0.5"]),
        (dict(max_downsample=3), ["max_downsample=3", "one of [1, 2, 4", "write max_downsample=2"]),
        (dict(max_downsample=1000), ["write max_downsample=128"]),
        (dict(max_downsample=float("inf")), ["max_downsample=inf", "write max_downsample='auto'"]),
        (dict(ratio=10**400), ["a number"]),
        (dict(sx=10**400), ["an integer"]),
        (dict(max_downsample="fine"), ["max_downsample='fine'", "'auto'"]),
        (dict(use_rand=1), ["use_rand=1", "True or False", "write use_rand=True"]),
        (dict(merge_attn=False), ["merges nothing", "merge_attn=True"]),
        (dict(seed=-1), ["seed=-1", "write seed=0"]),
        (dict(seed="x"), ["seed='x'"]),
        (dict(ration=0.5), ["'ration'", "did you mean 'ratio'"]),
        (dict(foo=0.5), ["'foo'", "Known: ratio"]),
    ],
)
def test_errors_say_key_value_range_and_what_to_write(options, says):
    with pytest.raises(ToMeError) as error:
        ToMeConfig.from_dict(options)
    for text in says:
        assert text.lower() in str(error.value).lower()


@pytest.mark.parametrize("value", [0.5, "ratio=0.5", [("ratio", 0.5)]])
def test_not_a_mapping(value):
    with pytest.raises(ToMeError, match="must be a dict"):
        ToMeConfig.coerce(value)


def test_numbers_of_other_libraries_become_plain():
    numpy = pytest.importorskip("numpy")
    config = ToMeConfig(ratio=numpy.float32(0.5), sx=numpy.int64(3), max_downsample=numpy.int32(2))
    assert config == ToMeConfig(ratio=0.5, sx=3, max_downsample=2)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


def test_immutable_and_replace():
    config = ToMeConfig()
    with pytest.raises(AttributeError):
        config.ratio = 0.1
    assert config.replace(ratio=0.1).ratio == 0.1 and config.ratio == 0.5
    with pytest.raises(ToMeError, match="ceiling"):
        config.replace(ratio=0.8)
    with pytest.raises(ToMeError, match="unknown"):
        config.replace(rate=0.8)


# --- ControlNets and clips ------------------------------------------------------------------------


def test_options_of_the_controlnet():
    assert ToMeConfig().controlnet_config is None
    assert ToMeConfig(ratio=0.25, controlnet=True).controlnet_config == ToMeConfig(ratio=0.25)
    config = ToMeConfig(ratio=0.25, seed=3, controlnet=dict(ratio=0.5, targets=["mlp"]))
    assert config.controlnet_config == ToMeConfig(ratio=0.5, seed=3, targets=["mlp"])
    assert ToMeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.replace(ratio=0).controlnet_config.ratio == 0.5


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (1, "controlnet must be True, False or a dict"),
        (dict(ratio=0.9), "controlnet: ratio=0.9 is above"),
        (dict(ration=0.5), "controlnet: unknown.*'ratio'"),
        (dict(controlnet=True), "has no 'controlnet' in it"),
    ],
)
def test_bad_options_of_the_controlnet(value, says):
    with pytest.raises(ToMeError, match=says):
        ToMeConfig(controlnet=value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(across_frames=1), "across_frames must be True or False"),
        (dict(across_frames=True, targets=["stack"]), r"'stack'; write targets=\['block'\]"),
        (dict(across_frames=True, targets=["attn_kv"]), r"'attn_kv'; write targets=\['attn'\]"),
        (dict(across_frames=True, method="todo"), "another method than 'todo'"),
    ],
)
def test_what_cannot_be_merged_across_frames(options, says):
    with pytest.raises(ToMeError, match=says):
        ToMeConfig(**options)


def test_a_dict_of_options_is_what_json_makes_of_it():
    config = ToMeConfig(
        ratio=dict(base=0.5, noise=dict(between=(0.3, 1))),
        reuse=dict(network=Scope(2, (0.1, 0.8)), deep=dict(steps=2, between=(0.0, 0.5))),
    )
    plain = config.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert ToMeConfig.from_dict(plain).to_dict() == plain
    assert ToMeConfig.from_dict(plain).reuse_plan == config.reuse_plan
