# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Schedulers of models: where they are, their names, and which of them amplify oscillation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

# They extrapolate with a cubic through the last four outputs (Adams-Bashforth, weights 55, -59, 37,
# -9 over 24): what alternates from step to step comes out (55 + 59 + 37 + 9) / 24 = 6.7 times as
# large.
_FOUR_OUTPUTS = ("PNDMScheduler", "IPNDMScheduler")


def scheduler_of(model: object) -> Any:
    """The scheduler of a pipeline, or the one that a MMagic model generates with; or None."""
    return getattr(model, "test_scheduler", None) or getattr(model, "scheduler", None)


def scheduler_name(scheduler: Any) -> str:
    """The class name of a scheduler, without MMagic's wrapper."""
    return getattr(scheduler, "_scheduler_name", type(scheduler).__name__)


def warn_of_oscillation(model: object, configs: Sequence[Any]) -> None:
    """Warn if a model's scheduler amplifies the oscillation that error feedback introduces.

    ``docs/research/step_caching.md`` has the figures.

    Args:
        model: whatever ``apply_cache`` takes; nothing is said of a network alone.
        configs: the step caches.
    """
    name = scheduler_name(scheduler_of(model))
    if name in _FOUR_OUTPUTS and any(config.error_feedback for config in configs):
        warnings.warn(
            f"{name} amplifies step-to-step oscillation, which error feedback introduces; use "
            "another scheduler, such as DPMSolverMultistepScheduler, or set error_feedback=0",
            stacklevel=3,
        )
