# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""How much is merged where and when: ratio over resolution level, depth, target and timestep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from .errors import ToMeError
from .timeline import in_range
from .validate import check_choice, check_keys, check_number, check_range, frozen, is_integer

#: Where tokens can be merged, in the order in which a block runs them.
TARGETS = ("attn", "attn_kv", "crossattn", "mlp", "block", "stack")
SELF_ATTENTION = ("attn", "attn_kv")

# Kind of a factor by timestep -> the keys that mean something to it, besides 'timestep_range'.
_KINDS = {
    "constant": (),
    "linear": ("start", "end"),
    "cosine": ("start", "end"),
    "piecewise": ("points",),
}


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
              ``timestep`` (dict): a factor on top, see below;
            - a callable ``f(place: Place) -> number``.

            ``timestep`` has the keys ``kind`` ('constant' (default), 'linear', 'cosine' or
            'piecewise'), ``start`` and ``end`` (factor at the start and at the end of a run,
            defaults 1 and 0; linear and cosine), ``points`` (list of (remaining share, factor),
            linear in between; piecewise) and ``timestep_range`` ((low, high): the factor is 0
            unless the share of the run that remains is in [low, high); a high of 1 includes 1).
            Or it has the key ``downsample`` alone (dict from factor to such a dict); levels that
            are not named have the factor 1.
        ceiling (float): largest possible ratio.

    Raises:
        ToMeError: anything else, a number outside [0, ceiling], an unknown key, level or target,
            a key of ``timestep`` that its kind does not use.

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
            _check_ratio("ratio", spec, ceiling)

    def _check_spec(self, spec: Mapping[str, Any]) -> None:
        check_keys("ratio", spec, ("base", "downsample", "depth", "target", "timestep"))
        numbers = _numbers(spec)
        if not numbers:
            raise ToMeError(
                f"ratio={dict(spec)!r} names no ratio; write for example dict(base=0.5) or "
                "dict(downsample={1: 0.5})"
            )
        for number in numbers:
            _check_ratio("ratio", number, self.ceiling)
        _check_levels("ratio['downsample']", spec.get("downsample"))
        check_keys("ratio['target']", spec.get("target") or (), TARGETS)
        _check_timestep(spec.get("timestep"))

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
            value = spec(place)
            name = getattr(spec, "__name__", "the callable")
            return _check_ratio(f"ratio of {name} at {place}", value, self.ceiling)
        value = self._without_timestep(place)
        timestep = spec.get("timestep")
        if timestep is not None and "downsample" in timestep:
            timestep = timestep["downsample"].get(place.downsample)
        return min(value * timestep_factor(timestep, place.timestep), self.ceiling)

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


def timestep_factor(spec: Mapping[str, Any] | None, remaining: float | None) -> float:
    """Factor in [0, 1] at a remaining share; 1 where there is no spec or the share is unknown."""
    if spec is None or remaining is None:
        return 1.0
    if not in_range(remaining, spec.get("timestep_range", (0.0, 1.0))):
        return 0.0
    kind = _kind(spec)
    if kind == "constant":
        return 1.0
    if kind == "piecewise":
        return _interpolate(sorted(spec["points"]), remaining)
    start, end = spec.get("start", 1.0), spec.get("end", 0.0)
    share = min(max(remaining, 0.0), 1.0)
    if kind == "cosine":
        # Rounded: half of the run is half of the ratio, to the token.
        share = round(0.5 - 0.5 * math.cos(math.pi * share), 12)
    return end + (start - end) * share


def _kind(timestep: Mapping[str, Any]) -> Any:
    return timestep.get("kind", "piecewise" if "points" in timestep else "constant")


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
            _fail_dict("ratio", table, "{1: 0.5} or dict(attn=0.5)")
        numbers += (table or {}).values()
    return [*numbers, *_sequence("ratio['depth']", spec.get("depth", ()))]


def _check_levels(name: str, table: Mapping[Any, Any] | None) -> None:
    """Downsample factors are powers of two."""
    for level in table or ():
        if not is_integer(level) or level <= 0 or level & (level - 1):
            raise ToMeError(
                f"{name} has no level {level!r}: levels are how many times coarser a grid is than "
                "the network's input; write 1, 2, 4 or 8"
            )


def _sequence(key: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, tuple):
        raise ToMeError(f"{key}={value!r} must be a list of numbers such as [0.6, 0.3]")
    return value


def _check_ratio(key: str, value: Any, ceiling: float) -> float:
    # Rounding may leave a ratio a little above the ceiling.
    return check_number("", key, value, 0, ceiling + 1e-9, default=0.5)


def _fail_dict(name: str, value: Any, example: str) -> NoReturn:
    raise ToMeError(f"{name}: {value!r} must be a dict such as {example}")


def _check_timestep(spec: Any, name: str = "ratio['timestep']", level: bool = False) -> None:
    """Check a dict for ``timestep``, or that of one level."""
    if spec is None and not level:
        return
    example = "dict(timestep_range=(0.5, 1))"
    if not isinstance(spec, Mapping) or (level and "downsample" in spec):
        _fail_dict(name, spec, example)
    if "downsample" in spec:
        check_keys(f"{name} with 'downsample'", spec, ("downsample",))
        name, levels = f"{name}['downsample']", spec["downsample"]
        if not isinstance(levels, Mapping) or not levels:
            _fail_dict(name, levels, f"{{1: {example}}}")
        _check_levels(name, levels)
        for factor, one in levels.items():
            _check_timestep(one, f"{name}[{factor!r}]", level=True)
        return
    check_keys(name, spec, ("kind", "start", "end", "points", "timestep_range"))
    name, kind = f"{name}: ", _kind(spec)
    check_choice(name, "kind", kind, _KINDS, "linear")
    for key in ("start", "end", "points"):
        if key in spec and key not in _KINDS[kind]:
            meant = "piecewise" if key == "points" else "linear"
            raise ToMeError(
                f"{name}kind={kind!r} does not use {key!r}; write kind={meant!r} or leave it out"
            )
    for key in ("start", "end"):
        if key in spec:
            check_number(name, key, spec[key], 0, 1, default=1)
    pairs = spec.get("points", ())
    if kind == "piecewise" and not pairs:
        raise ToMeError(f"{name}kind='piecewise' needs points=[(remaining share, factor), ...]")
    for pair in _sequence(f"{name}points", pairs):
        if len(_sequence(f"{name}points", pair)) != 2:
            raise ToMeError(f"{name}{pair!r} must be a pair of numbers")
        for number in pair:
            check_number(name, "a number in points", number, 0, 1)
    if "timestep_range" in spec:
        check_range(name, "timestep_range", spec["timestep_range"], (0.5, 1))
