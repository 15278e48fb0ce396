# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What the times of interleaved rounds say, and how sure that is.

A ratio is taken within each round, so a machine that slows down for a while does not show in it.
The interval around its median is the one between two of the sorted ratios that holds the true
median with at least 95 % probability, whatever the ratios' distribution (the sign test's interval:
Conover, Practical Nonparametric Statistics, section 3.2). Below six rounds even the smallest and
the largest ratio do not reach 95 %; their probability is stated then.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from statistics import median, quantiles
from typing import Any

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A median and where it lies.

    Attributes:
        median, low, high (float): the estimate and the ends of its interval.
        coverage (float): probability that the true median is inside.
        quartiles (tuple): of the values themselves.
    """

    median: float
    low: float
    high: float
    coverage: float
    quartiles: tuple[float, float]

    def excludes(self, value: float) -> bool:
        """Whether ``value`` is outside: an effect that is larger than its spread."""
        return not self.low <= value <= self.high

    def to_dict(self) -> dict[str, Any]:
        return dict(
            median=self.median,
            interval=[self.low, self.high],
            coverage=self.coverage,
            quartiles=list(self.quartiles),
        )


def interval(values: list[float]) -> Interval:
    """The median of two or more values with its interval."""
    ordered = sorted(values)
    count = len(ordered)
    drop = 0  # how many values lie outside on each side
    while 2 * (drop + 1) < count and coverage(count, drop + 1) >= LEVEL:
        drop += 1
    low, _, high = quantiles(ordered, n=4, method="inclusive")
    return Interval(
        median(ordered), ordered[drop], ordered[-1 - drop], coverage(count, drop), (low, high)
    )


def coverage(count: int, drop: int) -> float:
    """Probability that the median is within ``count`` sorted values less ``drop`` on each side."""
    return 1 - 2 * sum(comb(count, k) for k in range(drop + 1)) / 2**count


def ratios(base: list[float], seconds: list[float]) -> list[float]:
    """How many times faster than ``base``, round by round."""
    return [b / s for b, s in zip(base, seconds)]


def efficiency(base: list[float], seconds: list[float], ideal: list[float]) -> Interval | None:
    """eta = (t_dense - t) / (t_dense - t_ideal), round by round; None if the ideal gains nothing.

    1 = the machinery costs nothing, 0 = no faster than dense.
    """
    if not interval(ratios(base, ideal)).low > 1:
        return None
    values = [(b - s) / (b - i) for b, s, i in zip(base, seconds, ideal) if b != i]
    return interval(values)


def summarise(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table, dense first.

    Args:
        results: see :func:`.rounds.run_case`.

    Returns:
        list: per contender ``contender``, ``seconds``, ``seconds_min``, ``seconds_max``,
        ``speedup`` (an :class:`Interval`), ``clear`` (whether it excludes 1; None for dense),
        ``eta`` (:class:`Interval` or None), ``peak_bytes``, ``peak_in``, ``error``.
    """
    base = results["dense"]["seconds"]
    rows = []
    for name, result in results.items():
        seconds = result["seconds"]
        speedup = interval(ratios(base, seconds))
        ideal = results.get(result.get("ideal"))
        rows.append(
            dict(
                contender=name,
                seconds=median(seconds),
                seconds_min=min(seconds),
                seconds_max=max(seconds),
                speedup=speedup,
                clear=None if name == "dense" else speedup.excludes(1),
                eta=ideal and efficiency(base, seconds, ideal["seconds"]),
                peak_bytes=result.get("peak_bytes"),
                peak_in=result.get("peak_in"),
                error=result.get("relative_rmse_to_dense"),
            )
        )
    return rows


def duels(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of ours against the others that merge and the first of ours: who is faster, clearly?

    Returns:
        list: dicts of ``ours``, ``other``, ``ratio`` (an :class:`Interval`: times faster than the
        other) and ``clear``.
    """
    ours = [name for name, result in results.items() if result["kind"] == "ours"]
    others = [name for name, result in results.items() if result["kind"] in ("tomesd", "mmagic")]
    pairs = [(a, b) for a in ours for b in others]
    pairs += [(other, ours[0]) for other in ours[1:]]
    rows = []
    for a, b in pairs:
        ratio = interval(ratios(results[b]["seconds"], results[a]["seconds"]))
        rows.append(dict(ours=a, other=b, ratio=ratio, clear=ratio.excludes(1)))
    return rows
