# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""How certain a median is: the only definition of uncertainty in the lab.

The interval lies between two of the sorted values and contains the true median with a known
probability, whatever the distribution of the values (the interval of the sign test: Conover,
Practical Nonparametric Statistics, section 3.2). Below six values even the smallest and the largest
do not reach 95 %; the interval states the probability that they do reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from scipy.stats import binom

from ...errors import ToMeError

LEVEL = 0.95
#: Nothing is certain with fewer rounds. Without any effect all of five ratios are on one side of 1
#: in 6 % of all cases; all of three in 25 %.
FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Interval:
    """A median and its interval.

    Attributes:
        median, low, high: The median and the ends of the interval.
        coverage: Probability that the true median is inside, ends included.
        count: Number of values; with fewer than :data:`FEWEST_ROUNDS` nothing is certain.
    """

    median: float
    low: float
    high: float
    coverage: float
    count: int = FEWEST_ROUNDS

    def excludes(self, value: float) -> bool:
        """Return whether the true median is certainly different from ``value``."""
        return self.count >= FEWEST_ROUNDS and not self.low <= value <= self.high

    def text(self, unit: str = "x", null: float = 1.0) -> str:
        """Return such as ``'1.45x (1.42-1.61)'``; ``'~1.05x (0.97-1.12)'`` if ``null`` is possible.

        Args:
            unit: Put behind the median.
            null: The value that means no effect: 1 for a ratio.
        """
        if self.low == self.high == null:  # the baseline by itself
            return f"{self.median:.2f}{unit}"
        mark = "" if self.excludes(null) else "~"
        return f"{mark}{self.median:.2f}{unit} ({self.low:.2f}-{self.high:.2f})"

    def __str__(self) -> str:
        return self.text()


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Return the median of some values with its interval.

    Args:
        values: One per round.
        level: Probability that the interval has at least, if there are values enough.

    Raises:
        ToMeError: No values.
    """
    if not values:
        raise ToMeError("no rounds were measured, so there is no median; run at least one round")
    ordered = sorted(values)
    count = len(ordered)
    # On each side this many values are outside. ``ppf`` is the smallest number whose probability
    # reaches (1 - level) / 2, so one less stays below.
    drop = int(binom.ppf((1 - level) / 2, count, 0.5))
    if binom.cdf(drop, count, 0.5) > (1 - level) / 2:
        drop -= 1
    drop = max(drop, 0)
    coverage = max(0.0, 1 - 2 * float(binom.cdf(drop, count, 0.5)))
    return Interval(median(ordered), ordered[drop], ordered[-1 - drop], coverage, count)


def ratios(base: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """Return how many times as fast as ``base`` each round was; both in order of the rounds.

    Raises:
        ToMeError: Not the same number of rounds.
    """
    if len(base) != len(seconds):
        raise ToMeError(
            f"rounds are compared in pairs, but there are {len(base)} and {len(seconds)} of them"
        )
    return [a / b for a, b in zip(base, seconds)]
