# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The search, on models made of arithmetic: its answers are compared with all there are."""

import functools
import itertools
import math
import re
from dataclasses import replace

import pytest

from mmagic_tome import ToMeError
from mmagic_tome.cache.skip import skips_of_run
from mmagic_tome.tuning.predict import Costs, Predictor
from mmagic_tome.tuning.search import Goal, Search, front
from mmagic_tome.tuning.space import MAX_INTERVAL, Candidate, Merge, Part, Space, Window

COUNT = 20
COSTS = Costs(
    network_skipped=0.01,
    inner_skipped=0.4,
    rest=1.0,
    merges={("attn", 1, 0.5): -0.1, ("attn", 1, 0.75): -0.15},
    inner_levels=frozenset({2}),
)
PREDICTOR = Predictor(COSTS, COUNT)
SPACE = Space(("network", "inner"))


def error(candidate):
    """Skipping costs most at both ends of a run, and the network more than its inner region."""
    total = 0.0
    for step, skipped in enumerate(skips_of_run(candidate.caches, COUNT)):
        bend = 1 + 40 * ((COUNT - 1 - step) / COUNT - 0.5) ** 2
        total += bend * (3 if "network" in skipped else 1 if "inner" in skipped else 0)
    for part in (candidate.network, candidate.inner):
        total += 5 * (part.interval - 2) ** 2 if part is not None else 0
    return total + (10 if candidate.merge is not None else 0)


@functools.cache
def everything():
    """(error, speed-up) of all candidates without merging, with edges at every second notch."""
    edges = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    windows = [
        Window(steps, low, high)
        for steps in range(2, MAX_INTERVAL)
        for low, high in itertools.combinations(edges, 2)
    ]
    pairs = itertools.product([None, *windows], repeat=2)
    return [(error(c), PREDICTOR.speedup(c)) for c in itertools.starmap(Candidate, pairs)]


class Judge:
    def __init__(self, seconds=1.0):
        self.seconds, self.asked = seconds, []

    def __call__(self, candidate):
        self.asked.append(candidate)
        return error(candidate), self.seconds


def search(budget=80.0, space=SPACE, starts=(), judge=None):
    judge = judge or Judge()
    return Search(space, PREDICTOR.speedup, judge, budget, starts), judge


@pytest.mark.parametrize("speedup", [1.2, 1.5, 2.0])
def test_the_least_error_at_a_speedup(speedup):
    """Not above the best of 961 on a coarser grid, with 80 trials at most."""
    goal = Goal(speedup=speedup)
    one, judge = search()
    trial = one.run(goal)
    best = min(error for error, fast in everything() if fast >= speedup)
    assert trial.speedup >= speedup and trial.mse <= best
    assert len(judge.asked) <= 80 and len(set(judge.asked)) == len(judge.asked)


@pytest.mark.parametrize("psnr", [30, 33])
def test_the_least_time_at_a_psnr(psnr):
    one, _ = search()
    trial = one.run(Goal(psnr=psnr))
    best = max(fast for error, fast in everything() if error <= 255**2 / 10 ** (psnr / 10))
    assert trial.psnr >= psnr and trial.speedup >= 0.95 * best


def test_again_it_tries_the_same_in_the_same_order():
    orders = []
    for _ in range(2):
        one, judge = search()
        one.run(Goal(speedup=1.5))
        orders.append(judge.asked)
    assert orders[0] == orders[1]


def test_a_higher_goal_goes_on():
    one, judge = search(budget=500)
    first = one.run(Goal(speedup=1.3))
    before = len(judge.asked)
    second = one.run(Goal(speedup=1.6))
    assert second.speedup >= 1.6 > first.speedup and second.mse > first.mse
    assert len(set(judge.asked)) == len(judge.asked) > before


def test_where_the_budget_ends_it_leaps_to_the_goal():
    one, judge = search(budget=4)
    trial = one.run(Goal(speedup=2.0))
    assert trial.speedup >= 2 and len(judge.asked) == 5  # the leap is one more
    fewer = [t for t in one.trials.values() if t != trial]
    assert all(t.speedup < 2 for t in fewer)


def test_the_budget_is_counted_in_what_trials_say():
    one, judge = search(budget=10, judge=Judge(seconds=2.5))
    with pytest.raises(ToMeError, match=r"--psnr 90 cannot be reached: the best .* has"):
        one.run(Goal(psnr=90))
    assert len(judge.asked) <= 4


def test_what_cannot_be_reached_is_known_before_anything_is_tried():
    one, judge = search()
    with pytest.raises(ToMeError, match=r"--speedup 20 cannot be reached") as caught:
        one.run(Goal(speedup=20))
    said = float(re.search(r"gives ([\d.]+)x", str(caught.value))[1])
    assert 0 <= one.top - said < 0.01 and not judge.asked
    one, _ = search(space=Space(()))
    with pytest.raises(ToMeError, match="nothing here makes this model faster"):
        one.run(Goal(speedup=1.1))


def test_what_to_write_instead_can_be_written_and_reached():
    space = Space((), {"attn": {1: (0.5,)}})
    little = Predictor(replace(COSTS, merges={("attn", 1, 0.5): -0.05}), COUNT)

    def new():
        return Search(space, little.speedup, Judge(), 80.0)

    one = new()
    assert one.top == pytest.approx(1.05)
    with pytest.raises(ToMeError) as caught:
        one.run(Goal(speedup=1.2))
    lower = float(re.search(r"write --speedup ([\d.]+) or less", str(caught.value))[1])
    assert 1.01 <= lower <= one.top
    assert new().run(Goal(speedup=lower)).speedup >= lower


def test_a_psnr_that_only_what_saves_no_time_has():
    """A setting that leaves out nothing in so few steps has the dense pictures."""
    idle = Candidate(inner=Window(2, 0.0, 0.01))
    assert PREDICTOR.speedup(idle) == 1
    one = Search(SPACE, PREDICTOR.speedup, lambda _: (0.0, 1.0), 0.5, [idle])
    with pytest.raises(ToMeError, match=r"nothing that was tried .* raise --budget"):
        one.run(Goal(psnr=90))


def test_merging_goes_on_at_another_site_where_one_is_not_enough():
    """Attention is the better bargain, but all there is of it does not reach the goal."""
    tables = {"attn": {1: (0.25, 0.5)}, "block": {1: (0.25, 0.5)}}
    merges = {("attn", 1, 0.25): -0.05, ("attn", 1, 0.5): -0.1}
    merges |= {("block", 1, 0.25): -0.2, ("block", 1, 0.5): -0.4}
    predictor = Predictor(replace(COSTS, merges=merges), COUNT)
    asked = []

    def judged(candidate):
        asked.append(candidate)
        merge = candidate.merge
        (part,) = merge.parts
        ratio = part.ratio * (part.high - part.low)
        return ratio * (1 if merge.target == "attn" else 20), 1.0

    for budget in (3.0, 50.0):
        one = Search(Space((), tables), predictor.speedup, judged, budget)
        trial = one.run(Goal(speedup=1.3))
        assert trial.speedup >= 1.3 and trial.candidate.merge.target == "block"
    assert asked[-1] != one.space.fastest()[-1] and trial.mse < 10

    # And back, where less would do.
    near = Candidate(merge=Merge("block", (Part(1, 0.25),)))
    one = Search(Space((), tables), predictor.speedup, judged, 50.0, [near])
    assert one.run(Goal(speedup=1.08)).candidate.merge.target == "attn"


def test_a_higher_psnr_goes_on():
    one, judge = search(budget=500)
    first = one.run(Goal(psnr=30))
    second = one.run(Goal(psnr=33))
    assert first.psnr < 33 <= second.psnr and second.speedup < first.speedup
    assert len(set(judge.asked)) == len(judge.asked)
    # What goes on from there meets the new goal too.
    assert all(trial.psnr >= 33 for trial in one.path)
    fresh, _ = search(budget=500)
    assert second.speedup >= 0.95 * fresh.run(Goal(psnr=33)).speedup


def test_a_known_start_is_never_beaten_by_what_comes_out():
    """Also one that the greedy path would not pass; and none that the space leaves out."""
    start = Candidate(Window(2, 0.15, 0.85))
    other = Candidate(inner=Window(2, 0.0, 1.0), order=0)
    one, judge = search(starts=[start, other])
    trial = one.run(Goal(speedup=1.3))
    assert start in judge.asked and other not in judge.asked
    assert trial.mse <= error(start)


def test_merging_is_used_where_it_is_all_there_is():
    space = Space((), {"attn": {1: (0.5, 0.75)}})
    one, _ = search(space=space)
    trial = one.run(Goal(speedup=1.1))
    merge = trial.candidate.merge
    assert trial.speedup >= 1.1 and merge.target == "attn"
    assert [(part.downsample, part.ratio) for part in merge.parts] == [(1, 0.75)]
    # 20 calls of which 15 % less, and one call's time around them.
    corner = PREDICTOR.speedup(space.fastest()[1])
    assert corner == pytest.approx(21 / (1 + 20 * 0.85))


def test_the_front():
    one, _ = search()
    one.run(Goal(speedup=1.5))
    trials = list(one.trials.values())
    best = front(trials)
    assert [t.speedup for t in best] == sorted(t.speedup for t in best)
    for trial in trials:
        beaten = any(t.speedup >= trial.speedup and t.mse < trial.mse for t in trials)
        assert beaten or any(t.mse == trial.mse and t.speedup >= trial.speedup for t in best)


def test_the_same_pictures_have_no_end_of_psnr():
    assert Goal(psnr=99).met(next(iter([_trial(0.0)]))) and math.isinf(_trial(0.0).psnr)


def _trial(mse):
    from mmagic_tome.tuning.search import Trial

    return Trial(SPACE.dense, mse, 1.5)
