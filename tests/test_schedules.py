# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pytest
from tiny import tiny_unet

from mmagic_tome import ToMeConfig, ToMeError, apply_tome
from mmagic_tome.schedules import Place, RatioSchedule


def at(spec, **place):
    return RatioSchedule(spec, 0.75)(Place(**{"target": "attn", "downsample": 1, **place}))


def test_the_most_specific_wins():
    spec = dict(base=0.1, downsample={2: 0.2}, target={"mlp": 0.4})
    assert at(spec) == 0.1
    assert at(spec, downsample=2) == 0.2
    spec["depth"] = [0.3]
    assert at(spec, downsample=2) == 0.3
    assert at(spec, downsample=2, target="mlp") == 0.4
    # What nothing names is not merged. JSON has levels as strings.
    assert at(dict(downsample={2: 0.5})) == at(dict(target={"mlp": 0.5})) == 0
    assert at(dict(downsample={"2": 0.5}), downsample=2) == 0.5
    # Self-attention is one target, whether queries merge or not.
    assert at(dict(target={"attn": 0.5}), target="attn_kv") == 0.5
    assert at(dict(target={"attn": 0.5, "attn_kv": 0.25}), target="attn_kv") == 0.25
    assert at(dict(base=0.1, target={"attn_kv": 0.5})) == 0.1


def test_a_schedule_that_merges_nothing_is_refused_by_name():
    unet = tiny_unet(levels=2)
    far = dict(ratio=dict(downsample={4: 0.5}), max_downsample=2, targets=["attn", "mlp"])
    for options, said in (
        (dict(ratio=dict(downsample={2: 0.5})), "downsample 1, targets attn"),
        (dict(ratio=dict(target={"mlp": 0.5})), "downsample 1, targets attn"),
        (dict(ratio=dict(base=0.5, target={"attn": 0})), "downsample 1, targets attn"),
        (far, "1, 2, targets attn, m"),
    ):
        with pytest.raises(ToMeError, match="names no ratio for what is merged") as error:
            apply_tome(unet, **options)
        assert said in str(error.value)
    apply_tome(unet, ratio=dict(downsample={2: 0.5}), max_downsample=2)
    # Where nothing is named, nothing was meant.
    for ratio in (dict(base=0), dict(downsample={1: 0, 2: 0}), lambda place: 0):
        apply_tome(unet, ratio=ratio)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (dict(), [1, 1, 1, 1]),
        # Half-open; a high of 1 includes the start.
        (dict(timestep_range=(0.25, 0.5)), [0, 1, 0, 0]),
        (dict(timestep_range=(0.5, 1)), [0, 0, 1, 1]),
        (dict(points=[(1, 0.2), (0.5, 1), (0, 0)]), [0, 0.5, 1, 0.2]),
        (dict(points=[(1, 1), (0, 0)], timestep_range=(0.25, 0.75)), [0, 0.25, 0.5, 0]),
    ],
)
def test_factor_of_the_timestep(spec, expected):
    spec = dict(base=0.5, timestep=spec)
    values = [at(spec, timestep=share) for share in (0, 0.25, 0.5, 1)]
    assert values == pytest.approx([0.5 * factor for factor in expected])
    # A share a little above one is one; an unknown share leaves the ratio.
    assert at(spec, timestep=1.0001) == pytest.approx(values[-1])
    assert at(spec, timestep=None) == 0.5


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (dict(timestep=dict(points=[(1, 1)])), "names no ratio"),
        (dict(base=0.95), "0.95"),
        (dict(base="x"), "'x'"),
        (dict(levels={1: 0.5}), "no option 'levels'"),
        (dict(base=0.5, downsample=[]), "must be a dict"),
        (dict(downsample={1: -1}), "-1"),
        (dict(downsample={3: 0.5}), "write 1, 2, 4 or 8"),
        (dict(downsample={"fine": 0.5}), "no level 'fine'"),
        (dict(downsample={0: 0.5}), "no level 0"),
        (dict(downsample={1.0: 0.5}), "no level 1.0"),
        (dict(target={"atn": 0.5}), "did you mean 'attn'"),
        (dict(depth=0.5), "must be a list"),
        *(
            (dict(base=0.5, timestep=timestep), said)
            for timestep, said in (
                ("linear", "must be a dict"),
                (dict(kind="linear"), "no option 'kind'"),
                (dict(points=[]), "list of pairs"),
                (dict(points=[(1, 2, 3)]), "list of pairs"),
                (dict(points=0.5), "list of pairs"),
                (dict(points=[(1, 2)]), "a number in points=2"),
                (dict(timestep_range=(0.8, 0.2)), "write timestep_range=(0.2, 0.8)"),
            )
        ),
    ],
)
def test_bad_specs_are_named(spec, said):
    with pytest.raises(ToMeError, match="ratio") as error:
        ToMeConfig(ratio=spec)
    assert said in str(error.value)


def test_a_callable_s_bad_number_is_named():
    with pytest.raises(ToMeError, match=r"1\.5"):
        at(lambda place: 1.5)
