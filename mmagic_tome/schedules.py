# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""How much is merged where and when: ratio over resolution level, depth, target and timestep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ToMeError
from .timeline import in_range
from .validate import check_keys, check_number, check_range, frozen, is_integer

#: Where tokens can be merged, in the order in which a block runs them.
TARGETS = ("attn", "attn_kv", "crossattn", "mlp", "block", "stack")
SELF_ATTENTION = ("attn", "attn_kv")


@dataclass(frozen=True)
class Place:
    """Where and when a ratio is asked for."""

    target: str  #: kind of target, see ``ToMeConfig.targets``
    downsample: int  #: how many times coarser the grid is than the network's input
    depth: int = 0  #: number of the block among those that are merged, in running order
    num_blocks: int = 1  #: how many there are
    #: Share of the run's schedule that remains, 1 at its start, 0 at its end; None where unknown.
    timestep: float | None = None


class RatioSchedule:
    """A ratio for every :class:`Place`, from what a user writes as ``ratio``.

    Args:
        spec: one of

            - a number: the same everywhere;
            - a dict, all keys optional but one of the first four: ``base`` (number),
              ``downsample`` (dict from downsample factor to number), ``depth`` (list of numbers
              spread evenly from the first merged block to the last, linear in between),
              ``target`` (dict from target to number; 'attn' includes 'attn_kv'). The most
              specific wins, target over depth over downsample over base; what nothing names is 0.
              ``timestep`` (dict): a factor on top, with one or both of ``points`` (list of
              (remaining share of the run, factor in [0, 1]), linear in between) and
              ``timestep_range`` ((low, high): the factor is 0 unless the remaining share is in
              [low, high); a high of 1 includes 1);
            - a callable ``f(place: Place) -> number``.
        ceiling (float): largest possible ratio.

    Raises:
        ToMeError: anything else, a number outside [0, ceiling], an unknown key, level or target.

    Attributes:
        constant (bool): whether it is one number everywhere and always.
        zero (bool): whether that is 0, so nothing is ever merged.
        needs_timestep (bool): whether the remaining share of the run must be known.

    Example:
        >>> spec = dict(downsample={1: 0.6, 2: 0.3}, timestep=dict(timestep_range=(0.3, 1)))
        >>> RatioSchedule(spec, 0.75)(Place("attn", downsample=2, timestep=0.8))
        0.3
    """

    def __init__(self, spec: Any, ceiling: float) -> None:
        self.spec = spec = frozen(spec)
        self.ceiling = ceiling
        by_place = isinstance(spec, Mapping)
        self.constant = not (by_place or callable(spec))
        self.zero = self.constant and spec == 0
        self.needs_timestep = spec.get("timestep") is not None if by_place else callable(spec)
        if by_place:
            self._check_spec(spec)
        elif self.constant:
            self._check_ratio("ratio", spec)

    def _check_spec(self, spec: Mapping[str, Any]) -> None:
        check_keys("ratio", spec, ("base", "downsample", "depth", "target", "timestep"))
        numbers = _numbers(spec)
        if not numbers:
            raise ToMeError(
                f"ratio={dict(spec)!r} names no ratio; write for example dict(base=0.5) or "
                "dict(downsample={1: 0.5})"
            )
        for number in numbers:
            self._check_ratio("ratio", number)
        for level in spec.get("downsample") or ():
            if not is_integer(level) or level <= 0 or level & (level - 1):
                raise ToMeError(
                    f"ratio['downsample'] has no level {level!r}: levels are how many times "
                    "coarser a grid is than the network's input; write 1, 2, 4 or 8"
                )
        check_keys("ratio['target']", spec.get("target") or (), TARGETS)
        if spec.get("timestep") is not None:
            _check_timestep(spec["timestep"])

    def _check_ratio(self, key: str, value: Any) -> float:
        # Rounding may leave a ratio a little above the ceiling.
        return check_number("", key, value, 0, self.ceiling + 1e-9, default=0.5)

    def misses(self, places: Iterable[Place]) -> bool:
        """Whether a dict names ratios above 0, but none for any of these places at any timestep:
        then it merges nothing, which nobody meant."""
        named = isinstance(self.spec, Mapping) and any(_numbers(self.spec))
        return named and not any(self._without_timestep(place) for place in places)

    def __call__(self, place: Place) -> float:
        """The ratio at a place, in [0, ceiling].

        Raises:
            ToMeError: a callable returned something else.
        """
        spec = self.spec
        if self.constant:
            return spec
        if callable(spec):
            name = getattr(spec, "__name__", "the callable")
            return self._check_ratio(f"ratio of {name} at {place}", spec(place))
        value = self._without_timestep(place)
        timestep = spec.get("timestep")
        if timestep is None or place.timestep is None:
            return value
        if not in_range(place.timestep, timestep.get("timestep_range", (0.0, 1.0))):
            return 0.0
        points = sorted(timestep.get("points", ()))
        return value * _interpolate(points, place.timestep) if points else value

    def _without_timestep(self, place: Place) -> float:
        """What a dict says of a place, before the factor of the timestep."""
        spec = self.spec
        value = spec.get("base", 0.0)
        value = (spec.get("downsample") or {}).get(place.downsample, value)
        depths = spec.get("depth")
        if depths:
            at = place.depth * (len(depths) - 1) / max(place.num_blocks - 1, 1)
            value = _interpolate(list(enumerate(depths)), at)
        targets = spec.get("target") or {}
        # Self-attention is one target to a user, whether its queries merge too or not.
        if place.target == "attn_kv":
            value = targets.get("attn", value)
        return targets.get(place.target, value)


def _interpolate(points: Sequence[Sequence[float]], x: float) -> float:
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    return points[-1][1]


def _numbers(spec: Mapping[str, Any]) -> list[Any]:
    """All ratios that a dict names."""
    numbers = [spec["base"]] if "base" in spec else []
    for name in ("downsample", "target"):
        table = spec.get(name)
        if table is not None and not isinstance(table, Mapping):
            raise ToMeError(f"ratio: {table!r} must be a dict such as {{1: 0.5}} or dict(attn=0.5)")
        numbers += (table or {}).values()
    depths = spec.get("depth", ())
    if not isinstance(depths, tuple):
        raise ToMeError(f"ratio['depth']={depths!r} must be a list of numbers such as [0.6, 0.3]")
    return [*numbers, *depths]


def _check_timestep(spec: Any) -> None:
    name = "ratio['timestep']"
    if not isinstance(spec, Mapping):
        raise ToMeError(f"{name}: {spec!r} must be a dict such as dict(timestep_range=(0.5, 1))")
    check_keys(name, spec, ("points", "timestep_range"))
    points = spec.get("points", ((1, 1),))
    pairs = isinstance(points, tuple) and all(isinstance(one, tuple) for one in points)
    if not pairs or not points or any(len(one) != 2 for one in points):
        raise ToMeError(
            f"{name}: points={points!r} must be a list of pairs (remaining share, factor), such "
            "as [(1, 1), (0, 0)]"
        )
    for number in [number for pair in points for number in pair]:
        check_number(f"{name}: ", "a number in points", number, 0, 1)
    if "timestep_range" in spec:
        check_range(f"{name}: ", "timestep_range", spec["timestep_range"], (0.5, 1))
