# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Step caches that skip the same steps of every run, so that tests can count them."""

from mmagic_tome.cache import coerce_cache
from mmagic_tome.cache.regions import RegionState, next_skips

#: Name -> what ``apply_cache`` takes.
FIXED = {
    # The inner region at every second step.
    "inner": [dict(region="inner", timestep_range=(0.1, 0.8), error_feedback=0.5)],
    # The network at every second step; early in the run only its inner region.
    "both": [
        dict(region="network", timestep_range=(0.1, 0.65), error_feedback=0.5),
        dict(region="inner", timestep_range=(0.65, 0.95), error_feedback=0.5),
    ],
    # The network at every second step from the start, its inner region at every second of those.
    "most": [
        dict(region="network", timestep_range=(0.0, 0.95)),
        dict(region="inner", timestep_range=(0.0, 0.7), error_feedback=0.5),
    ],
}


def skips_of_run(configs, num_steps):
    """The regions that are skipped at each of so many steps of a run, without running it, of what
    ``apply_cache`` takes."""
    states = {config.region: RegionState(config) for config in coerce_cache(configs)}
    steps = []
    for left in reversed(range(num_steps)):
        steps.append(next_skips(states, left, left / num_steps, left == 0))
        for region, state in states.items():
            if not steps[-1] & {region, "network"}:
                state.history.times.append(left)
    return steps
