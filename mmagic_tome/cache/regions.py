# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What is kept of a region that may be skipped, and when options say that it is skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..timeline import in_range
from .config import StepCacheConfig
from .extrapolate import OutputHistory


class RegionState:
    """What one guidance branch of one run keeps of a region."""

    def __init__(self, config: StepCacheConfig) -> None:
        self.config = config
        self.history = OutputHistory(config.order, config.error_feedback)  # of its last module
        self.placeholders: dict[int, Any] = {}  # number of another module -> of its output
        self.in_a_row = 0  # steps that were skipped since it was computed

    def ready(self, time: float) -> bool:
        """Whether the region can be extrapolated at a timestep."""
        times = self.history.times
        return len(times) > self.config.order and times[-1] != time

    def may_skip(self, time: float, remaining: float | None, last: bool) -> bool:
        """Whether to skip the region at the next step; noted.

        Args:
            time: timestep of the step.
            remaining: share of the run that remains; None if unknown.
            last: whether it is the run's last step.
        """
        config = self.config
        skip = (
            remaining is not None
            and in_range(remaining, config.timestep_range)
            and not last
            and self.ready(time)
            and self.in_a_row < config.interval - 1
        )
        self.in_a_row = self.in_a_row + 1 if skip else 0
        return skip


def next_skips(
    states: Mapping[str, RegionState], time: float, remaining: float | None, last: bool
) -> set[str]:
    """The regions to skip at the next step; arguments as of :meth:`RegionState.may_skip`."""
    skips: set[str] = set()
    for region, state in states.items():
        if state.may_skip(time, remaining, last):
            skips.add(region)
            if region == "network":
                break  # the inner region is part of it
    return skips


@dataclass
class RegionStats:
    """At how many calls a region was computed, and at how many it was skipped; with a tolerance
    calls in which a smaller or a larger region is skipped count for neither."""

    computed: int = 0
    skipped: int = 0
