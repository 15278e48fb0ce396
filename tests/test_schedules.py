# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_unet

from mmagic_tome import ToMeConfig, ToMeError, apply_tome
from mmagic_tome.schedules import Place, RatioSchedule, timestep_factor


def at(spec, **place):
    return RatioSchedule(spec, 0.75)(Place(**{"target": "attn", "downsample": 1, **place}))


def test_a_number_is_the_same_everywhere():
    schedule = RatioSchedule(0.3, 0.75)
    assert schedule.constant and not schedule.needs_timestep and not schedule.zero
    assert {at(0.3, downsample=d, timestep=n) for d in (1, 2) for n in (0.0, None)} == {0.3}
    assert RatioSchedule(0, 0.75).zero


def test_the_most_specific_wins():
    spec = dict(base=0.1, downsample={2: 0.2}, target={"mlp": 0.4})
    assert at(spec) == 0.1
    assert at(spec, downsample=2) == 0.2
    assert at(spec, downsample=2, target="mlp") == 0.4
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


def test_ratios_for_places_that_are_not_merged():
    places = [Place("attn", 1, depth, 3) for depth in range(3)]

    def misses(spec):
        return RatioSchedule(spec, 0.75).misses(places)

    for spec in (dict(downsample={2: 0.5}), dict(target={"mlp": 0.5})):
        assert misses(spec)
    assert misses(dict(base=0.5, target={"attn": 0}))
    assert not misses(dict(downsample={1: 0.5, 2: 0.5}))
    assert not misses(dict(depth=[0, 0, 0.1]))
    assert not misses(dict(downsample={2: 0.5}, target={"attn": 0.1}))
    # Nothing is named, and nothing merged.
    for spec in (0, 0.5, dict(base=0), dict(downsample={1: 0, 2: 0}), lambda place: 0):
        assert not misses(spec)


def test_a_schedule_that_merges_nothing_is_refused_by_name():
    unet = tiny_unet(levels=2)
    far = dict(ratio=dict(downsample={4: 0.5}), max_downsample=2, targets=["attn", "mlp"])
    for options, said in (
        (dict(ratio=dict(downsample={2: 0.5})), "downsample 1, targets attn"),
        (dict(ratio=dict(target={"mlp": 0.5})), "downsample 1, targets attn"),
        (far, "1, 2, targets attn, m"),
    ):
        with pytest.raises(ToMeError, match="names no ratio for what is merged") as error:
            apply_tome(unet, **options)
        assert said in str(error.value)
    apply_tome(unet, ratio=dict(downsample={2: 0.5}), max_downsample=2)


def test_depth_is_spread_evenly():
    for values, expected in (([0.6, 0], [0.6, 0.4, 0.2, 0]), ([0.1, 0.7, 0.3], [0.1, 0.7, 0.3])):
        count = len(expected)
        found = [at(dict(depth=values), depth=i, num_blocks=count) for i in range(count)]
        assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (dict(), [1, 1, 1, 1]),
        # Half-open; a high of 1 includes the start.
        (dict(timestep_range=(0.25, 0.5)), [0, 1, 0, 0]),
        (dict(timestep_range=(0.5, 1)), [0, 0, 1, 1]),
        (dict(kind="linear"), [0, 0.25, 0.5, 1]),
        (dict(kind="linear", start=0.5, end=1), [1, 0.875, 0.75, 0.5]),
        (dict(kind="cosine"), [0, 0.146447, 0.5, 1]),
        (dict(points=[(1, 0.2), (0.5, 1), (0, 0)]), [0, 0.5, 1, 0.2]),
        (dict(kind="linear", timestep_range=(0.25, 0.75)), [0, 0.25, 0.5, 0]),
    ],
)
def test_factor_of_the_timestep(spec, expected):
    levels = [0, 0.25, 0.5, 1]
    assert [timestep_factor(spec, n) for n in levels] == pytest.approx(expected, abs=1e-6)
    values = [at(dict(base=0.5, timestep=spec), timestep=n) for n in levels]
    assert values == pytest.approx([0.5 * e for e in expected], abs=1e-6)
    # A share a little above one is one; an unknown share leaves the ratio.
    assert timestep_factor(spec, 1.0001) == expected[-1]
    assert at(dict(base=0.5, timestep=spec), timestep=None) == 0.5


def test_a_factor_for_each_level():
    timestep = dict(downsample={1: dict(timestep_range=(0.5, 1)), "2": dict(kind="linear")})
    spec = dict(base=0.5, timestep=timestep)
    for level, expected in ((1, [0, 0.5]), (2, [0.1, 0.4]), (4, [0.5, 0.5])):
        found = [at(spec, downsample=level, timestep=n) for n in (0.2, 0.8)]
        assert found == pytest.approx(expected)
    assert RatioSchedule(spec, 0.75).needs_timestep


def test_a_callable_sees_the_place():
    def ratio(place):
        return 0.5 if place.target == "attn" and place.timestep > 0.5 else 0.25

    assert at(ratio, timestep=0.9) == 0.5 and at(ratio, timestep=0.1) == 0.25
    with pytest.raises(ToMeError, match=r"1\.5"):
        at(lambda place: 1.5)


@given(
    st.lists(st.floats(0, 0.75), min_size=1, max_size=6),
    st.integers(1, 12),
    st.floats(0, 1),
    st.sampled_from(["constant", "linear", "cosine"]),
)
def test_always_within_the_ceiling(values, num_blocks, remaining, kind):
    spec = dict(depth=values, timestep=dict(kind=kind))
    for depth in range(num_blocks):
        value = at(spec, depth=depth, num_blocks=num_blocks, timestep=remaining)
        assert 0 <= value <= 0.75 + 1e-9


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (dict(), "names no ratio"),
        (dict(timestep=dict(kind="linear")), "names no ratio"),
        (dict(base=0.9), "0.9"),
        (dict(base="x"), "'x'"),
        (dict(levels={1: 0.5}), "no option 'levels'"),
        (dict(downsample=[0.5]), "must be a dict"),
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
                (dict(kind="quadratic"), "quadratic"),
                (dict(downsample={1: {}}, kind="linear"), "no option 'kind'"),
                (dict(downsample={3: {}}), "no level 3"),
                (dict(downsample={}), "must be a dict"),
                (dict(downsample={1: 0.5}), "0.5 must be a dict"),
                (dict(downsample={1: dict(downsample={1: {}})}), "must be a dict"),
                (dict(downsample={1: dict(kind="quadratic")}), "quadratic"),
                (dict(kind="piecewise"), "points"),
                (dict(points=[(1, 2, 3)]), "pair"),
                (dict(points=[(1, 2)]), "2"),
                (dict(timestep_range=0.5), "must be (low, high)"),
                (dict(timestep_range=(0.8, 0.2)), "write timestep_range=(0.2, 0.8)"),
                (dict(kind="linear", start=3), "start"),
                (dict(star=1), "did you mean 'start'"),
                # Said, but without effect.
                (dict(start=0.5), "kind='constant' does not use 'start'"),
                (dict(kind="linear", points=[(0, 1)]), "write kind='piecewise'"),
                (dict(points=[(0, 1)], end=1), "write kind='linear'"),
            )
        ),
    ],
)
def test_bad_specs_are_named(spec, said):
    with pytest.raises(ToMeError, match="ratio") as error:
        ToMeConfig(ratio=spec)
    assert said in str(error.value)
