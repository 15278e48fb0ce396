# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The interval holds what it promises, by simulation and by the table in the book."""

import numpy as np
import pytest

from mmagic_tome import ToMeError
from mmagic_tome.lab.measure import FEWEST_ROUNDS, Interval, interval, ratios


def test_interval_is_that_of_the_sign_test():
    # Conover's table: of 9 values the 2nd and the 8th, 96.1 %.
    found = interval([9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0])
    assert (found.low, found.median, found.high) == (2, 5, 8)
    assert found.coverage == pytest.approx(0.9609, abs=1e-4)
    few = interval([1.0, 2.0, 4.0])
    assert (few.low, few.high, few.coverage) == (1, 4, 0.75)
    assert interval([3.0]) == Interval(3, 3, 3, 0, 1)


@pytest.mark.parametrize("count", range(1, 41))
def test_interval_is_the_one_of_scipys_quantile_test(count):
    from scipy.stats import quantile_test

    values = list(np.random.default_rng(count).normal(size=count))
    theirs = quantile_test(values, q=0, p=0.5).confidence_interval(0.95)
    ours = interval(values)
    if count < 6:
        assert np.isnan(theirs.low) and np.isnan(theirs.high) and ours.coverage < 0.95
    else:
        assert (ours.low, ours.high) == (theirs.low, theirs.high) and ours.coverage >= 0.95


@pytest.mark.parametrize("rounds", range(FEWEST_ROUNDS, 16))
def test_no_effect_is_called_certain_as_seldom_as_the_coverage_says(rounds):
    draws = 2000
    # Skewed, as times are: both methods have the same distribution in every round.
    base, other = np.random.default_rng(rounds).lognormal(sigma=0.3, size=(2, draws, rounds))
    found = [interval(ratios(*pair)) for pair in zip(base.tolist(), other.tolist())]
    wrong = sum(one.excludes(1) for one in found) / draws
    allowed = 1 - found[0].coverage
    assert wrong == pytest.approx(allowed, abs=4 * (allowed * (1 - allowed) / draws) ** 0.5)
    assert allowed <= (0.05 if rounds > 5 else 0.0626)


def test_with_few_rounds_even_a_large_effect_is_not_certain():
    found = interval([5.0] * (FEWEST_ROUNDS - 1))
    assert not found.excludes(1) and found.text() == "~5.00x (5.00-5.00)"
    assert interval([5.0] * FEWEST_ROUNDS).excludes(1)


def test_ratios_are_taken_within_rounds():
    # The machine slows down for a while; the ratio does not change.
    base, ours = [10.0, 20.0, 40.0, 10.0, 10.0, 20.0], [6.0, 12.0, 24.0, 6.0, 6.0, 12.0]
    assert interval(ratios(base, ours)).text() == "1.67x (1.67-1.67)"
    with pytest.raises(ToMeError, match="there are 6 and 5"):
        ratios(base, ours[1:])
    with pytest.raises(ToMeError, match="run at least one round"):
        interval([])


def test_text_marks_what_is_not_certain():
    assert str(interval([1.42, 1.61, 1.45, 1.43, 1.6, 1.44])) == "1.44x (1.42-1.61)"
    assert interval([0.97, 1.12, 1.05, 1.01, 1.04, 1.1]).text() == "~1.04x (0.97-1.12)"
    assert interval(ratios([2.0] * 6, [2.0] * 6)).text() == "1.00x"
    assert interval([0.9, 0.8, 0.95, 0.9, 0.97, 0.9]).text("", null=0) == "0.90 (0.80-0.97)"
