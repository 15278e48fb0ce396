# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Which contenders a command line and a config ask for."""

import pytest

pytest.importorskip("mmengine")

from mmengine.config import Config

from mmagic_tome import ToMeConfig, ToMeError
from mmagic_tome.cache import PRESETS
from mmagic_tome.evaluation.cli import build_parser
from mmagic_tome.evaluation.plan import make_plan
from mmagic_tome.settings import Setting


def contenders(*argv, tome_cfg=None, cache_cfg=None, **evaluation):
    evaluation.setdefault("prompts", ["a cat"])
    entries = dict(evaluation=evaluation, model=dict(type="StableDiffusion"))
    if tome_cfg is not None:
        entries["tome_cfg"] = tome_cfg
    if cache_cfg is not None:
        entries["cache_cfg"] = cache_cfg
    args = build_parser().parse_args(["config.py", *argv])
    return {one.name: one for one in make_plan(args, Config(entries), "config.py").contenders}


STEPS = ["40 steps", "32 steps", "25 steps"]


def test_methods_at_ratios():
    found = contenders("--ratios", "0.25", "0.5", "--methods", "tome", "tofu")
    merged = ["tome 0.25", "tome 0.5", "tofu 0.25", "tofu 0.5"]
    assert list(found) == ["dense", *merged, *STEPS]
    assert (found["tofu 0.25"].setting.tome.method, found["tofu 0.25"].ratio) == ("tofu", 0.25)
    # Without ratios those of the config, whose other options are kept.
    found = contenders(
        "--methods", "tofu", tome_cfg=dict(ratio=0.3, prop_attn=True), cache_cfg="fast"
    )
    assert list(found) == ["dense", "tofu 0.3", *STEPS]
    assert found["tofu 0.3"].setting.tome.prop_attn
    assert found["tofu 0.3"].setting.cache == PRESETS["fast"]
    for cache_cfg in (None, "balanced"):
        found = contenders(methods=["tofu"], cache_cfg=cache_cfg)
        assert list(found) == ["dense", "tofu 0.5", *STEPS]


def test_step_caching():
    found = contenders("--cache", "balanced", "fast")
    assert list(found) == ["dense", "cache balanced", "cache fast", *STEPS]
    assert found["cache fast"].setting == Setting(cache=PRESETS["fast"])
    assert (found["cache fast"].kind, found["cache fast"].ratio) == ("tome", 0)
    assert "cache fast" in contenders(cache=["fast"])
    for entry in (
        dict(tome_cfg=dict(cache="fast", ratio=0.25)),
        dict(tome_cfg=dict(ratio=0.25), cache_cfg="fast"),
    ):
        (mine,) = [contenders(contenders=[dict(name="mine", **entry)])["mine"]]
        assert mine.setting == Setting(ToMeConfig(ratio=0.25), PRESETS["fast"])


def test_the_command_line_stands_in_place_of_the_configs_contenders():
    of_config = dict(
        contenders=[dict(name="half", tome_cfg=dict(ratio=0.5))], ratios=[0.75], tomesd=[0.5]
    )
    assert list(contenders(**of_config)) == ["dense", "half", "ratio 0.75", "tomesd 0.5", *STEPS]
    assert list(contenders("--tomesd", "0.25", **of_config)) == ["dense", "tomesd 0.25", *STEPS]
    assert list(contenders("--tome", "a={'ratio': 0.2}", **of_config)) == ["dense", "a", *STEPS]


def test_fewer_steps_are_always_among_them():
    """Cutting steps is what one would do instead of merging."""
    for argv in ([], ["--ratios", "0.5"], ["--tomesd", "0.5"], ["--methods", "tofu"]):
        kinds = [one.kind for one in contenders(*argv).values()]
        assert kinds.count("steps") == 3 and kinds[0] == "dense"


def test_the_configs_own_merging():
    assert list(contenders(tome_cfg=dict(ratio=0.3))) == ["dense", "ratio 0.3", *STEPS]
    found = contenders(tome_cfg=dict(ratio=dict(downsample={1: 0.5})))
    assert list(found) == ["dense", "the config's", *STEPS]
    found = contenders(cache_cfg="balanced")
    assert list(found) == ["dense", "the config's", *STEPS]
    assert found["the config's"].setting == Setting(cache=PRESETS["balanced"])


def test_only_some_of_them():
    of_config = dict(cache=["fast", "balanced"], tomesd=[0.5])
    found = contenders("--only", "25 steps", "cache *", **of_config)
    assert list(found) == ["dense", "cache fast", "cache balanced", "25 steps"]
    assert list(contenders(only=["tomesd 0.?"], **of_config)) == ["dense", "tomesd 0.5"]
    # Those of the command line win, as with every option.
    assert list(contenders("--only", "cache fast", only=["tomesd *"], **of_config)) == [
        "dense",
        "cache fast",
    ]


@pytest.mark.parametrize(
    ("argv", "evaluation", "said"),
    [
        (["--methods", "tomee"], {}, "unknown method 'tomee'.*did you mean 'tome'"),
        ([], {"methods": [{"type": "tofu"}]}, "is no name; one with options is written as"),
        ([], {"methods": "tofu"}, "expected a list"),
        (["--only", "ratio 0.7"], {}, "no contender is called 'ratio 0.7': did you mean 'ratio 0"),
        (["--only", "Ratio *"], {}, "no contender is called"),
        ([], {"only": [0.5]}, "evaluation.only of the config: 0.5 is no name of a contender"),
        (["--cache", "faast"], {}, "invalid choice: 'faast'"),
        ([], {"cache": ["faast"]}, "contender 'cache faast': .*'faast' is no named setting"),
        (
            ["--methods", "tofu"],
            {"tome_cfg": dict(ratio=dict(downsample={1: 0.5}))},
            "write --ratios",
        ),
    ],
)
def test_what_cannot_be(argv, evaluation, said):
    with pytest.raises(ToMeError, match=said):
        contenders(*argv, **evaluation)
