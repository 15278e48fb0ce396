# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What is known of schedulers: their names, and which of them amplify oscillation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from .cache import StepCacheConfig

# They extrapolate with a cubic through the last four outputs (Adams-Bashforth, weights 55, -59, 37,
# -9 over 24): what alternates from step to step comes out (55 + 59 + 37 + 9) / 24 = 6.7 times as
# large.
_FOUR_OUTPUTS = ("PNDMScheduler", "IPNDMScheduler")


def scheduler_name(scheduler: Any) -> str:
    """Return the class name of a scheduler, without MMagic's wrapper."""
    return getattr(scheduler, "_scheduler_name", type(scheduler).__name__)


def warn_of_oscillation(model: object, configs: Sequence[StepCacheConfig]) -> None:
    """Warn if a model's scheduler amplifies the oscillation that error feedback introduces.

    ``docs/research/step_caching.md`` has the figures. Nothing is said of a network alone, whose
    scheduler is not known.

    Args:
        model: whatever ``apply_cache`` takes.
        configs: the step caches.
    """
    scheduler = getattr(model, "test_scheduler", None) or getattr(model, "scheduler", None)
    feeds_back = any(config.error_feedback for config in configs)
    if not feeds_back or scheduler is None or scheduler_name(scheduler) not in _FOUR_OUTPUTS:
        return
    warnings.warn(
        f"{scheduler_name(scheduler)} amplifies step-to-step oscillation, which error feedback "
        "introduces; use another scheduler, such as DPMSolverMultistepScheduler, or set "
        "error_feedback=0",
        stacklevel=3,
    )
