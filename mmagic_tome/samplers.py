# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What is known of samplers: their names, and which of them do not go with what is foretold."""

from __future__ import annotations

import warnings
from typing import Any

from .reuse import Reuse

# They go on a cubic through the last four outputs (Adams-Bashforth, weights 55, -59, 37, -9 over
# 24): what alternates from step to step comes out (55 + 59 + 37 + 9) / 24 = 6.7 times as large.
_FOUR_OUTPUTS = ("PNDMScheduler", "IPNDMScheduler")


def scheduler_name(scheduler: Any) -> str:
    """Return the class name of a sampler, without MMagic's wrapper."""
    return getattr(scheduler, "_scheduler_name", type(scheduler).__name__)


def warn_of_paying_back(model: object, reuse: Reuse | None) -> None:
    """Warn where a model's sampler enlarges what ``repay`` makes alternate.

    ``docs/research/foretold_steps.md`` has the figures. Nothing is said of a network alone, whose
    sampler is not known.

    Args:
        model: whatever ``apply_tome`` takes.
        reuse: what is left out; None for nothing.
    """
    repaid = [name for name, scope in (reuse.scopes if reuse else {}).items() if scope.repay]
    sampler = getattr(model, "test_scheduler", None) or getattr(model, "scheduler", None)
    if not repaid or sampler is None or scheduler_name(sampler) not in _FOUR_OUTPUTS:
        return
    parts = ", ".join(f"{name}=dict(repay=0)" for name in repaid)
    warnings.warn(
        f"{scheduler_name(sampler)} enlarges what alternates from step to step, as foretold "
        "outputs that are paid back do: take another sampler, such as "
        f"DPMSolverMultistepScheduler, or write reuse=dict({parts}) beside the preset",
        stacklevel=3,
    )
