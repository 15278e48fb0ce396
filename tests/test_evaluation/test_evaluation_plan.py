# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Which contenders a command line and a config ask for."""

import pytest

pytest.importorskip("mmengine")

from mmengine.config import Config

from mmagic_tome import ToMeConfig, ToMeError
from mmagic_tome.evaluation.cli import build_parser
from mmagic_tome.evaluation.plan import make_plan


def contenders(*argv, tome_cfg=None, **evaluation):
    evaluation.setdefault("prompts", ["a cat"])
    entries = dict(evaluation=evaluation, model=dict(type="StableDiffusion"))
    if tome_cfg is not None:
        entries["tome_cfg"] = tome_cfg
    args = build_parser().parse_args(["config.py", *argv])
    return {one.name: one for one in make_plan(args, Config(entries), "config.py").contenders}


STEPS = ["40 steps", "32 steps", "25 steps"]


def test_methods_at_ratios():
    found = contenders("--ratios", "0.25", "0.5", "--methods", "tome", "tofu")
    merged = ["tome 0.25", "tome 0.5", "tofu 0.25", "tofu 0.5"]
    assert list(found) == ["dense", *merged, *STEPS]
    assert (found["tofu 0.25"].tome_cfg.method, found["tofu 0.25"].ratio) == ("tofu", 0.25)
    # Without ratios those of the config, whose other options are kept.
    found = contenders("--methods", "tofu", tome_cfg=dict(ratio=0.3, merge_mlp=True))
    assert list(found) == ["dense", "tofu 0.3", *STEPS]
    assert found["tofu 0.3"].tome_cfg.merge_mlp
    assert list(contenders(methods=["tofu"])) == ["dense", "tofu 0.5", *STEPS]


def test_presets():
    found = contenders("--presets", "balanced", "fast")
    assert list(found) == ["dense", "preset balanced", "preset fast", *STEPS]
    assert found["preset fast"].tome_cfg == ToMeConfig.from_dict(dict(preset="fast"))
    assert "preset fast" in contenders(presets=["fast"])
    entry = dict(name="mine", tome_cfg=dict(preset="fast", ratio=0.25))
    assert contenders(contenders=[entry])["mine"].ratio == 0.25


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
    for nameless in (dict(preset="balanced"), dict(ratio=dict(level={1: 0.5}))):
        assert list(contenders(tome_cfg=nameless)) == ["dense", "the config's", *STEPS]


def test_only_some_of_them():
    of_config = dict(presets=["fast", "balanced"], tomesd=[0.5])
    found = contenders("--only", "25 steps", "preset *", **of_config)
    assert list(found) == ["dense", "preset fast", "preset balanced", "25 steps"]
    assert list(contenders(only=["tomesd 0.?"], **of_config)) == ["dense", "tomesd 0.5"]
    # Those of the command line win, as with every option.
    assert list(contenders("--only", "preset fast", only=["tomesd *"], **of_config)) == [
        "dense",
        "preset fast",
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
        (["--presets", "faast"], {}, "contender 'preset faast': preset='faast' must be one of"),
        (["--methods", "tofu"], {"tome_cfg": dict(ratio=dict(level={1: 0.5}))}, "write --ratios"),
    ],
)
def test_what_cannot_be(argv, evaluation, said):
    with pytest.raises(ToMeError, match=said):
        contenders(*argv, **evaluation)
