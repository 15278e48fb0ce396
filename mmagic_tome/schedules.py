# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""How much is merged where and when: ratio over level, depth, site and noise level."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ToMeError, check_choice, check_keys

# Kind -> the keys that mean something to it, besides 'kind' and 'between'.
_NOISE_KINDS = {
    "constant": (),
    "linear": ("start", "end"),
    "cosine": ("start", "end"),
    "piecewise": ("points",),
}
_SITE_KINDS = ("attn", "attn_kv", "crossattn", "mlp", "block", "stack")


@dataclass(frozen=True)
class Place:
    """Where and when a ratio is asked for.

    Attributes:
        site (str): kind of site: 'attn', 'crossattn', 'mlp', 'block', 'stack'.
        downsample (int): how many times coarser the grid is than the network's input.
        depth (int): number of the block among those that are merged, in running order.
        depths (int): how many there are.
        noise (float | None): timestep as a share of the training steps, 1 = pure noise;
            None where the network was called without a timestep.
    """

    site: str
    downsample: int
    depth: int = 0
    depths: int = 1
    noise: float | None = None


class RatioSchedule:
    """A ratio for every :class:`Place`, from what a user writes as ``ratio``.

    Args:
        spec: one of

            - a number: the same everywhere;
            - a dict, all keys optional but one of the first four:
              ``base`` (number), ``level`` (dict downsample -> number, downsample 1, 2, 4 ... as
              in :meth:`~mmagic_tome.ToMeHandle.stats`), ``depth`` (list of
              numbers spread evenly from the first merged block to the last, linear in
              between), ``site`` (dict kind -> number; 'attn' stands for 'attn_kv', too):
              the most specific wins, site over depth over level over base; what nothing names
              is 0; ``noise`` (dict): a factor on top, see below;
            - a callable ``f(place: Place) -> number``.

            ``noise`` has the keys ``kind`` ('constant' (default), 'linear', 'cosine' or
            'piecewise'), ``start`` and ``end`` (factor at noise 1 and at noise 0, defaults 1
            and 0; linear and cosine), ``points`` (list of (noise, factor), linear in between;
            piecewise) and ``between`` ((low, high): outside the factor is 0). So "off after"
            half of the noise is ``between=(0.5, 1)``, "only between" ``between=(0.3, 0.8)``.
            Or it has the key ``level`` alone (dict downsample -> such a dict): a factor for each
            level, 1 for those that are not named.
        ceiling (float): largest possible ratio.

    Raises:
        ToMeError: anything else, a number outside [0, ceiling], an unknown key, level or site, a
            key of ``noise`` that its kind does not use.

    Example:
        >>> ratio = RatioSchedule(dict(level={1: 0.6, 2: 0.3}, noise=dict(between=(0.3, 1))), 0.75)
        >>> ratio(Place("attn", downsample=2, noise=0.8))
        0.3
    """

    def __init__(self, spec: Any, ceiling: float) -> None:
        self.spec = spec
        self.ceiling = ceiling
        if isinstance(spec, Mapping):
            check_keys("ratio", spec, ("base", "level", "depth", "site", "noise"))
            numbers = [*_values(spec.get("level")), *_values(spec.get("site"))]
            numbers += list(_sequence("ratio['depth']", spec.get("depth", ())))
            numbers += [spec["base"]] if "base" in spec else []
            if not numbers:
                raise ToMeError(
                    f"ratio={dict(spec)!r} names no ratio; write for example dict(base=0.5)"
                    " or dict(level={1: 0.5})"
                )
            for number in numbers:
                _check("ratio", number, ceiling)
            _check_level("ratio['level']", spec.get("level"))
            check_keys("ratio['site']", spec.get("site") or (), _SITE_KINDS)
            _check_noise(spec.get("noise"))
        elif not callable(spec):
            _check("ratio", spec, ceiling)

    @property
    def constant(self) -> bool:
        """Whether it is one number everywhere and always."""
        return not (isinstance(self.spec, Mapping) or callable(self.spec))

    @property
    def needs_noise(self) -> bool:
        """Whether the noise level must be known."""
        if isinstance(self.spec, Mapping):
            return self.spec.get("noise") is not None
        return callable(self.spec)

    @property
    def zero(self) -> bool:
        """Whether it is the number 0: nothing is ever merged."""
        return self.constant and self.spec == 0

    def misses(self, places: Iterable[Place]) -> bool:
        """Whether a dict names ratios above 0, but none for any of these places, whatever the
        noise: then it merges nothing, which nobody meant."""
        spec = self.spec
        if not isinstance(spec, Mapping):
            return False
        named = [spec.get("base", 0), *_values(spec.get("level")), *_values(spec.get("site"))]
        if not any([*named, *spec.get("depth", ())]):
            return False
        return not any(self._without_noise(place) for place in places)

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
            _check(
                f"ratio of {getattr(spec, '__name__', 'the callable')} at {place}",
                value,
                self.ceiling,
            )
            return value
        value = self._without_noise(place)
        noise = spec.get("noise")
        if noise is not None and "level" in noise:
            noise = _lookup(noise["level"], place.downsample, None)
        return min(value * noise_factor(noise, place.noise), self.ceiling)

    def _without_noise(self, place: Place) -> float:
        """What a dict says of a place, before the factor of the noise level."""
        spec = self.spec
        value = spec.get("base", 0.0)
        value = _lookup(spec.get("level"), place.downsample, value)
        if spec.get("depth"):
            value = _spread(spec["depth"], place.depth, place.depths)
        # Self-attention is one site to a user, whether its queries merge too or not.
        if place.site == "attn_kv":
            value = _lookup(spec.get("site"), "attn", value)
        return _lookup(spec.get("site"), place.site, value)


def noise_factor(spec: Mapping[str, Any] | None, noise: float | None) -> float:
    """Factor in [0, 1] at a noise level; 1 where there is no spec or the level is unknown."""
    if spec is None or noise is None:
        return 1.0
    low, high = spec.get("between", (0.0, 1.0))
    # Some schedulers begin a little above the last training step.
    if not low <= min(noise, 1.0) <= high:
        return 0.0
    kind = spec.get("kind", "piecewise" if "points" in spec else "constant")
    if kind == "constant":
        return 1.0
    if kind == "piecewise":
        return _interpolate(sorted(tuple(point) for point in spec["points"]), noise)
    start, end = spec.get("start", 1.0), spec.get("end", 0.0)
    share = min(max(noise, 0.0), 1.0)
    if kind == "cosine":
        # Rounded: half of the noise is half of the ratio, to the token.
        share = round(0.5 - 0.5 * math.cos(math.pi * share), 12)
    return end + (start - end) * share


def _interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    return points[-1][1]


def _spread(values: Sequence[float], depth: int, depths: int) -> float:
    if len(values) == 1 or depths == 1:
        return values[0]
    at = depth * (len(values) - 1) / (depths - 1)
    return _interpolate(list(enumerate(values)), at)


def _lookup(table: Mapping[Any, Any] | None, key: Any, default: Any) -> Any:
    if not table:
        return default
    # A config that went through JSON has the levels as strings.
    return table.get(key, table.get(str(key), default))


def _values(table: Any) -> list[Any]:
    if table is None:
        return []
    if not isinstance(table, Mapping):
        raise ToMeError(f"ratio: {table!r} must be a dict such as {{1: 0.5}} or dict(attn=0.5)")
    return list(table.values())


def _check_level(name: str, table: Mapping[Any, Any] | None) -> None:
    """Levels are powers of two, also as strings, as which they come back from JSON."""
    for key in table or ():
        level = int(key) if isinstance(key, str) and key.isdecimal() else key
        whole = isinstance(level, int) and not isinstance(level, bool) and level > 0
        if not whole or level & (level - 1):
            raise ToMeError(
                f"{name} has no level {key!r}: levels are how many times coarser a grid is than "
                "the network's input; write 1, 2, 4 or 8"
            )


def _sequence(key: str, value: Any) -> Sequence[Any]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ToMeError(f"{key}={value!r} must be a list of numbers such as [0.6, 0.3]")
    return value


def _check(key: str, value: Any, ceiling: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= ceiling + 1e-9:
        nearest = min(max(value, 0), ceiling) if is_number and value == value else 0.5
        raise ToMeError(
            f"{key}={value!r} is not valid: it must be a number in [0, {ceiling:g}]; "
            f"write {nearest:g}"
        )


def _check_noise(spec: Any, name: str = "ratio['noise']") -> None:
    if spec is None:
        return
    if not isinstance(spec, Mapping):
        raise ToMeError(f"{name}={spec!r} must be a dict such as dict(kind='linear')")
    if "level" in spec:
        check_keys(f"{name} with 'level'", spec, ("level",))
        levels = spec["level"]
        if not isinstance(levels, Mapping) or not levels:
            raise ToMeError(
                f"{name}['level']={levels!r} must be a dict such as {{1: dict(between=(0.5, 1))}}"
            )
        _check_level(f"{name}['level']", levels)
        for level, one in levels.items():
            its = f"{name}['level'][{level!r}]"
            if not isinstance(one, Mapping) or "level" in one:
                raise ToMeError(f"{its}: {one!r} must be a dict such as dict(between=(0.5, 1))")
            _check_noise(one, its)
        return
    check_keys(name, spec, ("kind", "start", "end", "points", "between"))
    kind = spec.get("kind", "piecewise" if "points" in spec else "constant")
    check_choice(f"{name}: ", "kind", kind, _NOISE_KINDS, "linear")
    for key in ("start", "end", "points"):
        if key in spec and key not in _NOISE_KINDS[kind]:
            meant = "piecewise" if key == "points" else "linear"
            raise ToMeError(
                f"{name}: kind={kind!r} does not use {key!r}; write kind={meant!r} or leave it out"
            )
    for key in ("start", "end"):
        if key in spec:
            _check(f"{name}: {key}", spec[key], 1.0)
    pairs = spec.get("points", ())
    if kind == "piecewise" and not pairs:
        raise ToMeError(f"{name}: kind='piecewise' needs points=[(noise, factor), ...]")
    between = [spec["between"]] if "between" in spec else []
    for pair in [*_sequence(f"{name}: points", pairs), *between]:
        if len(_sequence(f"{name}: points and between", pair)) != 2:
            raise ToMeError(f"{name}: {pair!r} must be a pair of numbers")
        for number in pair:
            _check(f"{name}: a number in points or between", number, 1.0)
    for low, high in between:
        if low > high:
            raise ToMeError(
                f"{name}: between={(low, high)!r} is empty; write "
                f"between={(high, low)!r}: noise 1 is the start of a run, 0 its end"
            )
