# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import json

import numpy as np
import pytest

from mmagic_tome import ToMeConfig, ToMeError
from mmagic_tome.methods import build_method
from mmagic_tome.schedules import Place


def test_defaults():
    config = ToMeConfig()
    assert config.to_dict() == {
        "ratio": 0.5,
        "targets": ["attn"],
        "method": "tome",
        "max_downsample": "auto",
        "sx": 2,
        "sy": 2,
        "use_rand": True,
        "seed": 0,
        "exact_matching": False,
        "prop_attn": False,
        "plan_interval": 1,
        "share_plans": False,
        "residual": False,
        "controlnet": False,
        "across_frames": False,
    }
    assert config.kinds == ("attn",) and config.ceiling == 0.75


def test_json_round_trip():
    config = ToMeConfig(ratio=0.6, sx=3, max_downsample=4, targets=["attn", "mlp"], seed=2**40)
    assert ToMeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_json_round_trip_of_levels_and_foreign_numbers():
    timestep = dict(timestep_range=(np.float64(0.25), 1))
    ratio = dict(downsample={1: np.float32(0.5), 2: 0.25}, timestep=timestep)
    config = ToMeConfig(ratio=ratio, plan_interval=np.int64(2), seed=np.int32(2))
    assert type(config.plan_interval) is int and type(config.seed) is int
    again = ToMeConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.to_dict() == config.to_dict()
    assert again.ratio["downsample"] == {1: 0.5, 2: 0.25}
    assert again.ratio_schedule(Place("attn", 2, timestep=0.5)) == 0.25


def test_a_function_has_a_name_in_records():
    def falling(place):
        return 0.5 if place.timestep > 0.5 else 0.25

    config = ToMeConfig(ratio=falling)
    assert config.to_dict()["ratio"] is falling
    assert json.loads(json.dumps(config.to_record()))["ratio"] == "falling"
    assert ToMeConfig(ratio=0.3).to_record() == ToMeConfig(ratio=0.3).to_dict()


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
    with pytest.raises(ToMeError, match="no option 'rate': did you mean 'ratio'"):
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
        (1, "controlnet=1 must be True, False or a dict"),
        (dict(ratio=0.9), "controlnet: ratio=0.9 is above"),
        (dict(ration=0.5), "controlnet: .*no option 'ration': did you mean 'ratio'"),
        (dict(controlnet=True), "has no 'controlnet'"),
    ],
)
def test_bad_options_of_the_controlnet(value, says):
    with pytest.raises(ToMeError, match=says):
        ToMeConfig(controlnet=value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(across_frames=1), "across_frames=1 must be True or False"),
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
        ratio=dict(base=0.5, timestep=dict(timestep_range=(0.3, 1))),
        targets=("mlp", "attn"),
        plan_interval=(8, 0, 3, 3),
        method=dict(type="tome"),
        controlnet=dict(ratio=0.25),
    )
    plain = config.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert ToMeConfig.from_dict(plain) == config
    assert ToMeConfig.from_dict(plain).to_dict() == plain


# --- targets, plans and residuals -----------------------------------------------------------------


def test_targets_are_in_the_order_in_which_a_block_runs_them():
    assert ToMeConfig(targets=["mlp", "crossattn", "attn"]).targets == ("attn", "crossattn", "mlp")
    assert ToMeConfig(targets="block").targets == ToMeConfig(targets=("block",)).targets
    # A method that keeps queries merges keys and values.
    assert ToMeConfig(method="todo", targets=["attn", "mlp"]).kinds == ("attn_kv", "mlp")


def test_a_method_for_each_target():
    config = ToMeConfig(method=dict(attn="todo", mlp="prune"), targets=["attn", "mlp"])
    assert [type(config.methods[config.method_at(kind)]).__name__ for kind in config.kinds] == [
        type(method).__name__ for method in (build_method("todo"), build_method("prune"))
    ]
    with pytest.raises(ToMeError, match=r"write targets=\['attn', 'mlp'\]"):
        config.replace(targets=["attn"])
    with pytest.raises(ToMeError, match="did you mean 'mlp'"):
        ToMeConfig(method=dict(attn="tome", mpl="tome"))


def test_hashable():
    ratio = dict(downsample={1: 0.5}, timestep=dict(points=[[1, 1], [0, 0]]))
    one, other = ToMeConfig(ratio=ratio), ToMeConfig(ratio=json.loads(json.dumps(ratio)))
    assert {one: 1}[other] == 1
    with pytest.raises(TypeError, match="immutable"):
        one.ratio["base"] = 0.1


@pytest.mark.parametrize("steps", [(8, 0, 3, 3), [0, 3, 8]])
def test_listed_steps_survive_json(steps):
    config = ToMeConfig(plan_interval=steps)
    assert ToMeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.plan_interval == (0, 3, 8) and config.tracks_steps


def test_when_a_plan_is_due():
    """Also where its block did not run at the steps at which it was due."""
    due = ToMeConfig(plan_interval=4).plan_is_due
    assert [due(5, step) for step in (6, 7, 8, 9, 13)] == [0, 0, 1, 1, 1]
    assert due(-1, 1) and not due(0, 3)
    listed = ToMeConfig(plan_interval=[0, 3]).plan_is_due
    assert listed(1, 4) and not listed(3, 4) and listed(-1, 4) and not listed(3, 99)
    assert all(ToMeConfig().plan_is_due(step - 1, step) for step in range(3))


@pytest.mark.parametrize(
    ("options", "tracks"),
    [
        ({}, False),
        (dict(share_plans=True), False),
        (dict(targets=["block"], use_rand=False), False),
        (dict(plan_interval=2), True),
        (dict(ratio=dict(base=0.5, timestep=dict(kind="linear"))), True),
        (dict(ratio=dict(downsample={1: 0.5})), False),
        (dict(method="importance"), True),
    ],
)
def test_only_what_depends_on_the_step_tracks_steps(options, tracks):
    assert ToMeConfig(**options).tracks_steps == tracks


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(plan_interval=[]), "plan_interval=[0, 8, 11, 13, 20]"),
        (dict(plan_interval=[0, -1]), "list of step numbers"),
        (dict(plan_interval=[0, 2.5]), "list of step numbers"),
        (dict(plan_interval="05"), "an integer"),
        (dict(plan_interval=0), "write plan_interval=1"),
        (dict(plan_interval=True), "plan_interval=True"),
        (dict(plan_intervall=2), "did you mean 'plan_interval'"),
        (dict(share_plans="level"), "write share_plans=True"),
        (dict(residual=True), "write plan_interval=2"),
        (dict(plan_interval=2, residual="exact"), "write residual=True"),
        (dict(targets=[]), "targets=['attn']"),
        (dict(targets="atn"), "write targets=['attn']"),
        (dict(targets=["mpl"]), "write targets=['mlp']"),
        (dict(targets=3), "targets=['attn']"),
        (dict(targets=["block", "mlp"]), "targets=['block']"),
        (dict(targets=["attn", "attn_kv"]), "write one"),
        (dict(ratio=dict(base=0.5, timestep=dict(kind="cosin"))), "write kind='cosine'"),
        (dict(method="tomme"), "did you mean 'tome'"),
        (dict(method=dict(name="tome")), "under 'type'"),
        (dict(method=dict(type="tome", window=3)), "window"),
        # Of before, or of elsewhere.
        (dict(merge_mlp=True), "targets=['attn', 'mlp']"),
        (dict(sites=["attn"]), "write targets"),
        (dict(refresh=2), "write plan_interval"),
        (dict(proportional=True), "write prop_attn"),
        (dict(preset="balanced"), "cache_cfg='balanced'"),
        (dict(reuse=2), "apply_cache"),
        (dict(r=8), "write ratio=0.5"),
    ],
)
def test_bad_options_are_named(options, said):
    for make in (ToMeConfig, ToMeConfig.from_dict, ToMeConfig.coerce):
        with pytest.raises(ToMeError) as error:
            make(**options) if make is ToMeConfig else make(options)
        assert said in str(error.value)


def test_positional_options_are_refused():
    with pytest.raises(ToMeError, match=r"write for example ToMeConfig\(ratio=0.5\)"):
        ToMeConfig(0.5)
