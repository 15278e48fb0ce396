# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Candidates, their options and the moves between them."""

from dataclasses import replace

from mmagic_tome.cache import PRESETS
from mmagic_tome.schedules import Place, RatioSchedule
from mmagic_tome.settings import Setting
from mmagic_tome.tuning.space import Candidate, Merge, Part, Space, Window, candidate_of

SPACE = Space(("network", "inner"), {"attn": {1: (0.25, 0.5), 2: (0.5,)}, "block": {1: (0.25,)}})


def reachable(count):
    """All candidates within some moves of the dense one."""
    held, edge = {SPACE.dense}, {SPACE.dense}
    for _ in range(count):
        edge = {one for c in edge for _, chain in SPACE.faster(c) for one in chain} - held
        held |= edge
    return held


def test_every_candidate_is_a_valid_setting_of_its_own():
    candidates = reachable(2)
    options = [str(one.options()) for one in candidates]
    assert len(candidates) > 150 and len(set(options)) == len(options)
    for one in candidates:
        setting = one.setting()
        assert setting.baseline == one.dense
        assert Setting.coerce(setting.to_dict()) == setting


def test_moves_have_names_and_can_be_taken_back():
    for candidate in reachable(2):
        moves = list(SPACE.faster(candidate))
        assert len({name for name, _ in moves}) == len(moves)
        assert all(candidate not in chain for _, chain in moves)
        count = 0
        while not candidate.dense:
            back = list(SPACE.slower(candidate))
            assert candidate not in back
            candidate, count = back[-1], count + 1
        assert count <= 4


def test_what_takes_as_long():
    candidate = Candidate(Window(2, 0.1, 0.7, 0.5), Window(2, 0.1, 0.7))
    alike = SPACE.alike(candidate)
    found = [(one.network.error_feedback, one.inner.error_feedback) for one in alike]
    assert found == [(0.0, 0.0), (0.5, 0.5)]
    assert not list(Space(("inner",), order=0).alike(Candidate(inner=Window(2, 0, 1), order=0)))


def test_options_of_a_merge():
    merge = Merge("attn", (Part(1, 0.5, 0.5, 1.0), Part(2, 0.25, 0.5, 1.0)))
    setting = Candidate(Window(2, 0.1, 0.7), merge=merge).setting()
    config = setting.tome
    assert config.kinds == ("attn",) and config.max_downsample == 2
    assert config.to_dict()["ratio"] == {
        "downsample": {1: 0.5, 2: 0.25},
        "timestep": {"timestep_range": [0.5, 1.0]},
    }
    (cache,) = setting.cache
    assert cache.region == "network" and cache.timestep_range == (0.1, 0.7)
    assert Candidate(inner=Window(2, 0, 1), order=0).caches[0].order == 0

    # Each level in a window of its own.
    merge = merge.with_part(Part(2, 0.25, 0.2, 0.6)).with_part(Part(4, 0.75))
    assert Candidate(merge=merge).text() == (
        "merge attn /1: 0.5 in 0.5-1, /2: 0.25 in 0.2-0.6, /4: 0.75 in 0-1"
    )
    ratio = RatioSchedule(Candidate(merge=merge).setting().tome.ratio, 0.75)
    for remaining, ratios in ((0.1, [0, 0, 0.75]), (0.4, [0, 0.25, 0.75]), (0.8, [0.5, 0, 0.75])):
        assert [ratio(Place("attn", level, timestep=remaining)) for level in (1, 2, 4)] == ratios


def test_attention_is_proportional_at_the_targets_where_it_can_be():
    space = Space((), {"attn": {1: (0.5,)}, "block": {1: (0.5,)}}, prop_attn=("attn",))
    starts = {one for _, chain in space.faster(space.dense) for one in chain}
    starts |= {one for one in space.fastest() if one.merge is not None}
    assert {(one.merge.target, one.setting().tome.prop_attn) for one in starts} == {
        ("attn", True),
        ("block", False),
    }
    assert all(("prop_attn" in one.text()) == one.merge.prop_attn for one in starts)


def test_merging_at_another_site():
    space = Space((), {"attn": {1: (0.25, 0.5), 2: (0.5,)}, "attn_kv": {1: (0.5,)}}, 1, ("attn",))
    merge = Merge("attn", (Part(1, 0.25, 0.3), Part(2, 0.5)), True)
    (other,) = space.elsewhere(Candidate(merge=merge))
    # The nearest ratio of the levels that can be merged there.
    assert other.merge == Merge("attn_kv", (Part(1, 0.5, 0.3),), False)
    (back,) = space.elsewhere(other)
    assert back.merge == Merge("attn", (Part(1, 0.5, 0.3),), True)
    assert not list(space.elsewhere(space.dense))
    only_coarse = Candidate(merge=Merge("attn", (Part(2, 0.5, 0.3),), True))
    assert not list(space.elsewhere(only_coarse))


def test_levels_move_on_their_own():
    space = Space((), {"attn": {1: (0.25, 0.5), 2: (0.5,)}})
    now = Candidate(merge=Merge("attn", (Part(1, 0.25, 0.5, 1.0),)))
    moves = {name: chain[0].merge for name, chain in space.faster(now)}
    assert moves == {
        "merge attn at 1: low": Merge("attn", (Part(1, 0.25, 0.4, 1.0),)),
        "merge attn at 1: more": Merge("attn", (Part(1, 0.5, 0.5, 1.0),)),
        "merge attn at 2: late": Merge("attn", (Part(1, 0.25, 0.5, 1.0), Part(2, 0.5, 0.0, 0.5))),
        "merge attn at 2: early": Merge("attn", (Part(1, 0.25, 0.5, 1.0), Part(2, 0.5, 0.5, 1.0))),
    }
    both = replace(now, merge=moves["merge attn at 2: late"])
    moves = dict(space.faster(both))
    # Together as far as each can go; the edges that only one of them has left are no move of all.
    low, high = (0.4, 0.3, 0.2, 0.1, 0.0), (0.6, 0.7, 0.8, 0.9, 1.0)
    assert "merge: high" not in moves and "merge: low" not in moves
    early = replace(now, merge=now.merge.with_part(Part(2, 0.5, 0.3, 0.5)))
    moves = {name: [one.merge.parts for one in chain] for name, chain in space.faster(early)}
    assert moves["merge: low"] == [
        (Part(1, 0.25, edge, 1.0), Part(2, 0.5, max(round(edge - 0.2, 2), 0.0), 0.5))
        for edge in low
    ]
    assert "merge: high" not in moves
    assert [two.high for _, two in moves["merge attn at 2: high"]] == list(high)
    found = {one.merge for one in space.slower(both)}
    assert found == {
        Merge("attn", (Part(1, 0.25, 0.6, 1.0), Part(2, 0.5, 0.0, 0.5))),
        Merge("attn", (Part(1, 0.25, 0.5, 0.9), Part(2, 0.5, 0.0, 0.5))),
        Merge("attn", (Part(1, 0.25, 0.5, 1.0), Part(2, 0.5, 0.1, 0.5))),
        Merge("attn", (Part(1, 0.25, 0.5, 1.0), Part(2, 0.5, 0.0, 0.4))),
        Merge("attn", (Part(1, 0.25, 0.5, 1.0),)),
        Merge("attn", (Part(2, 0.5, 0.0, 0.5),)),
    }


def test_presets_are_candidates():
    """All of them, so that what comes out is no worse than a preset that is as fast."""
    for name in PRESETS:
        candidate = candidate_of({"cache": name})
        assert candidate.setting() == Setting.coerce({"cache": name})
    cache = dict(region="inner", interval=3, error_feedback=0.25)
    assert candidate_of({"cache": cache}) == Candidate(inner=Window(3, 0.0, 0.95, 0.25))
    assert candidate_of({"ratio": 0.5}) is None
    assert candidate_of({"cache": {**cache, "num_outer_blocks": 2}}) is None
    assert candidate_of({"cache": [cache, dict(order=0)]}) is None
    assert candidate_of({"cache": "fast", "method": "tofu"}) is None
