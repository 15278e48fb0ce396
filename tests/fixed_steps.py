# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Step caches that skip the same steps of every run, so that tests can count them."""

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
