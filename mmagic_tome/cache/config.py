# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What a user can ask of step caching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Union

from ..errors import ToMeError
from ..validate import (
    Options,
    check_choice,
    check_integer,
    check_number,
    check_range,
    is_number,
    nearest,
    plain,
)

REGIONS = ("network", "inner")
_WHERE = "step cache: "


@dataclass(frozen=True, init=False)
class StepCacheConfig(Options):
    """Skip one region of the network at some steps and extrapolate its output.

    With a tolerance, every run decides by itself what to skip and where (:mod:`.tolerance`);
    without one, the other options say it.

    Args:
        tolerance (float): expected error of a run's final latent, relative to the baseline's: in
            [0, 1), such as 0.01; 0 skips nothing. Per image; in a batch the image that errs most
            decides. Excludes all other options but ``region``: with ``'inner'`` the network is
            never skipped as a whole. Default None.
        region (str): ``'network'`` (default): the whole call. ``'inner'``: what is inside the
            outermost levels of a UNet, or between the outer blocks of a transformer, while the
            outer part is computed: less is saved, and the error is smaller.
        interval (int): compute the region at least at every this many steps; for ``'inner'``, of
            the steps at which the network is computed. At least 2, the default.
        timestep_range (tuple): (low, high) with 0 <= low < high <= 1: skip only where the share of
            the schedule that remains is in [low, high); 1 is the start of a run, 0 its end. A
            schedule's last step is never skipped. Default (0.0, 0.95).
        order (int): 0: the last output again; 1 (default): on the line through the last two, along
            the timestep; 2: on the polynomial of degree 2 through the last three.
        error_feedback (float): fraction in [0, 1] of the extrapolation error that is added back at
            the next computed step, but not at the last of a run. The error is measured against the
            line between the two computed neighbours. Default 0.
        num_outer_blocks (int): what ``'inner'`` leaves outside: levels of a UNet, or quarters of a
            transformer's blocks at each end. Default 1.

    Raises:
        ToMeError: wrong type or value.
    """

    region: str = "network"
    interval: int = 2
    timestep_range: tuple[float, float] = (0.0, 0.95)
    order: int = 1
    error_feedback: float = 0.0
    num_outer_blocks: int = 1
    tolerance: float | None = None

    _what, _example = "a step cache", "dict(interval=3)"
    # Names that users know from elsewhere -> what to write.
    _elsewhere: ClassVar[Mapping[str, str]] = {
        "ratio": "that is token merging; write tome_cfg=dict(ratio=0.5), or call apply_tome",
        "steps": "write interval",
        "cache_interval": "write interval",
        "between": "write timestep_range",
        "repay": "write error_feedback",
    }

    def _check(self) -> None:
        check_choice(_WHERE, "region", self.region, REGIONS)
        window = check_range(_WHERE, "timestep_range", self.timestep_range, (0.1, 0.65))
        fraction = check_number(_WHERE, "error_feedback", self.error_feedback, 0, 1, default=0.5)
        checked = {
            "interval": check_integer(_WHERE, "interval", self.interval, 2),
            "timestep_range": window,
            "order": check_integer(_WHERE, "order", self.order, 0, 2, default=1),
            "error_feedback": float(fraction),
            "num_outer_blocks": check_integer(_WHERE, "num_outer_blocks", self.num_outer_blocks, 1),
        }
        for name, value in checked.items():
            self._set(name, value)
        if self.tolerance is not None:
            self._check_tolerance()

    def _check_tolerance(self) -> None:
        if not is_number(self.tolerance) or not 0 <= self.tolerance < 1:
            raise ToMeError(
                f"{_WHERE}tolerance={self.tolerance!r} must be a number at least 0 and below 1; "
                "write tolerance=0.01"
            )
        self._set("tolerance", float(self.tolerance))
        given = [
            one.name
            for one in fields(self)
            if one.name not in ("tolerance", "region") and getattr(self, one.name) != one.default
        ]
        if given:
            raise ToMeError(
                f"{_WHERE}a tolerance decides by itself what to skip and where; leave out "
                f"{', '.join(given)}, or leave out tolerance and the names of tolerances "
                f"({', '.join(PRESETS)})"
            )

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON has them; ``StepCacheConfig(**options)`` is the inverse."""
        return plain(super().to_dict())

    @property
    def description(self) -> str:
        """The tolerance; or the region with its interval and timestep range."""
        if self.tolerance is not None:
            inner = ", inner region alone" if self.region == "inner" else ""
            return f"tolerance {self.tolerance:g}{inner}"
        low, high = self.timestep_range
        return f"{self.region} every {self.interval} steps in [{low:g}, {high:g})"


#: Named settings, all of them tolerances: they mean the same on every model, scheduler and guidance
#: scale. What each of them skips is up to the run.
PRESETS: dict[str, tuple[StepCacheConfig, ...]] = {
    "quality": (StepCacheConfig(tolerance=0.01),),
    "balanced": (StepCacheConfig(tolerance=0.02),),
    "fast": (StepCacheConfig(tolerance=0.05),),
}

CacheSpec = Union[str, StepCacheConfig, Mapping, list, tuple, None]


def coerce_cache(config: CacheSpec = None, **options: Any) -> tuple[StepCacheConfig, ...]:
    """The step caches that a user means, the larger region first.

    Args:
        config: a name out of :data:`PRESETS`, a :class:`StepCacheConfig`, a dict of its options, or
            a list of these, at most one per region. Default: 'balanced', unless options are given.
        **options: of one :class:`StepCacheConfig`; with a ``config`` of one step cache they win
            over it.

    Raises:
        ToMeError: anything else.
    """
    if config is None:
        return (StepCacheConfig(**options),) if options else PRESETS["balanced"]
    if isinstance(config, str):
        if config not in PRESETS:
            close = nearest(config, PRESETS) or "balanced"
            raise ToMeError(
                f"step cache: {config!r} is no named setting; write {close!r} (there are "
                f"{', '.join(PRESETS)}), or a dict such as {{'tolerance': 0.01}}"
            )
        configs = PRESETS[config]
    else:
        if is_number(config):
            raise ToMeError(f"cache_cfg={config!r} is no step cache; write tolerance={config!r}")
        given = config if isinstance(config, (list, tuple)) else [config]
        if not given or not all(isinstance(one, (StepCacheConfig, Mapping)) for one in given):
            raise ToMeError(
                f"cache_cfg={config!r} is no step cache: write a name ({', '.join(PRESETS)}), a "
                "dict such as dict(region='inner', interval=2), or a list of dicts"
            )
        configs = tuple(
            StepCacheConfig(**one) if isinstance(one, Mapping) else one for one in given
        )
    if options:
        if len(configs) > 1:
            raise ToMeError(
                f"step cache: {config!r} has {len(configs)} regions, so {', '.join(options)} is "
                "ambiguous; write a list such as [dict(region='network', interval=3), "
                "dict(region='inner')]"
            )
        configs = (configs[0].replace(**options),)
    if len(configs) > 1 and any(one.tolerance is not None for one in configs):
        raise ToMeError(
            "step cache: a tolerance covers all regions; write one dict, cache_cfg=dict("
            "tolerance=0.01)"
        )
    regions = [one.region for one in configs]
    if len(set(regions)) < len(regions):
        raise ToMeError(f"cache_cfg has the region {regions[0]!r} twice; keep one")
    return tuple(sorted(configs, key=lambda one: REGIONS.index(one.region)))


def to_plain(configs: tuple[StepCacheConfig, ...]) -> list[dict[str, Any]]:
    """Step caches as JSON has them; :func:`coerce_cache` is the inverse."""
    return [config.to_dict() for config in configs]
