# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Schedulers of models, and how much of a run's schedule remains at a timestep.

1 is the start of the schedule (pure noise), 0 its last step. It is counted in the scheduler's
steps, so a window covers the same share of a run with every scheduler, flow shift and
parametrisation of the timestep; image-to-image starts lower. Without a scheduler it is read off the
timestep.
"""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

# They extrapolate with a cubic through the last four outputs (Adams-Bashforth, weights 55, -59, 37,
# -9 over 24): what alternates from step to step comes out (55 + 59 + 37 + 9) / 24 = 6.7 times as
# large. Errors of the demo model arrived up to 15 times as large, without error feedback.
_FOUR_OUTPUTS = dict.fromkeys(("PNDMScheduler", "IPNDMScheduler", "LMSDiscreteScheduler"), 15.0)
# Others that amplify, by less: exponential integrators of order 2, and whatever is of order 3.
_AMPLIFYING = {"DEISMultistepScheduler": 3.0}
_THIRD_ORDER = 3.0
# They use an output twice, the second time to correct the step before: its errors too.
_CORRECTING = {"UniPCMultistepScheduler": 1.5}
# Smallest sigma that EDM and Stable Video Diffusion train with (arXiv 2206.00364, table 1, rounded
# to that of the published scheduler configs), and the exponent of their schedule.
_SIGMA_MIN, _RHO = 0.002, 7
# Timesteps in half precision differ from the scheduler's by this much.
_RELATIVE = 0.005


def scheduler_of(model: object) -> Any:
    """The scheduler of a pipeline, or the one that a MMagic model generates with; or None."""
    return getattr(model, "test_scheduler", None) or getattr(model, "scheduler", None)


def scheduler_name(scheduler: Any) -> str:
    """The class name of a scheduler, without MMagic's wrapper."""
    return getattr(scheduler, "_scheduler_name", type(scheduler).__name__)


def warn_of_oscillation(model: object, configs: Sequence[Any]) -> None:
    """Warn if a model's scheduler amplifies the oscillation that error feedback of one of the step
    caches introduces (``docs/howto/scheduler.md``)."""
    name = scheduler_name(scheduler_of(model))
    if name in _FOUR_OUTPUTS and any(config.error_feedback for config in configs):
        warnings.warn(
            f"{name} amplifies step-to-step oscillation, which error feedback introduces; use "
            "another scheduler, such as DPMSolverMultistepScheduler, or set error_feedback=0",
            stacklevel=3,
        )


class Timeline:
    """Places timesteps on the schedule of a pipeline.

    Args:
        model: what the user patched; its scheduler is looked up at every run, since users replace
            it. Held weakly; once it is gone the scheduler that it had last is used.
        scale (float | None): timestep of pure noise, see ``ModelAdapter.timestep_scale``.
    """

    def __init__(self, model: object, scale: float | None) -> None:
        self.scale = scale
        self._scheduler = scheduler_of(model)
        try:
            self._model: Callable[[], Any] = weakref.ref(model)
        except TypeError:  # None, or an object of a user's own without weak references
            self._model = lambda: None
        self._timesteps: tuple[Any, list[float]] | None = None
        self._amplified = (1.0, False)  # of a scheduler that is known no more

    def __reduce__(self) -> tuple:
        # A pickle belongs to another pipeline, or to none.
        return Timeline, (None, self.scale), {"_amplified": self.amplification}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._amplified = state["_amplified"]

    def __deepcopy__(self, memo: dict) -> Timeline:
        # As part of a pipeline it goes on with the copy of the scheduler.
        twin = Timeline(None, self.scale)
        twin._scheduler = copy.deepcopy(self.scheduler(), memo)
        twin._amplified = self._amplified
        return twin

    @property
    def amplification(self) -> tuple[float, bool]:
        """How many times as large the scheduler makes errors of outputs, 1 if it is not known; and
        whether mostly those that alternate from step to step, as error feedback makes them."""
        scheduler = self.scheduler()
        if scheduler is None:
            return self._amplified
        name = scheduler_name(scheduler)
        order = getattr(getattr(scheduler, "config", None), "solver_order", None) or 1
        found = (_FOUR_OUTPUTS | _AMPLIFYING).get(name, _THIRD_ORDER if order > 2 else None)
        return (_CORRECTING.get(name, 1.0), False) if found is None else (found, True)

    def scheduler(self) -> Any:
        """The scheduler that the model has now, or had last; None if it never had one."""
        model = self._model()
        if model is not None:
            self._scheduler = scheduler_of(model)
        return self._scheduler

    def __call__(
        self, time: float | None, first: float, warn: Callable[[str, str], None]
    ) -> tuple[float | None, bool | None]:
        """How much remains at a timestep.

        Args:
            time: the timestep.
            first: the first timestep of its run; ``time`` itself where a run begins.
            warn: (topic, message) -> warns once.

        Returns:
            tuple: the share that remains, None if unknown; and whether it is the last step, None if
            there is no scheduler to tell.
        """
        if time is None:
            return None, None
        index = self._index(time)
        if index is not None:
            steps = len(self._timesteps[1])
            return (steps - 1 - index) / steps, index == steps - 1
        return self._guessed(time, first, warn), None

    def _index(self, time: float) -> int | None:
        """Number of a timestep on the scheduler's list; None if it is not there."""
        timesteps = self.timesteps()
        if not timesteps:
            return None
        # Some pipelines divide by the number of training steps before the call: 1 is a first step
        # there, and near a last one elsewhere.
        values = (1000 * time, time) if self.scale == 1 else (time, 1000 * time)
        for value in values:
            # The later one of two evaluations at a timestep (Heun), so that the last is the last.
            later_first = range(len(timesteps) - 1, -1, -1)
            index = min(later_first, key=lambda i: abs(timesteps[i] - value))
            slack = max(_RELATIVE * abs(value), 1e-4)
            if abs(timesteps[index] - value) <= slack:
                return index
        return None

    def timesteps(self) -> Sequence[float]:
        """The scheduler's timesteps; empty without a scheduler."""
        found = getattr(self.scheduler(), "timesteps", None)
        # A tensor, or an array in MMagic's own schedulers.
        if getattr(found, "ndim", None) != 1:
            return ()
        # Schedulers make a new one for every run.
        if self._timesteps is None or self._timesteps[0] is not found:
            self._timesteps = (found, [float(value) for value in found.tolist()])
        return self._timesteps[1]

    def _guessed(self, time: float, first: float, warn: Callable) -> float | None:
        """What remains by the timestep alone."""
        scale = self.scale
        if scale is None:
            # ln(sigma) / 4: Karras' schedule from the run's first sigma, arXiv 2206.00364, eq. 5.
            low = _SIGMA_MIN ** (1 / _RHO)
            high, now = (math.exp(4 * value / _RHO) for value in (first, time))
            return min(max((now - low) / (high - low), 0.0), 1.0) if high > low else None
        if -1e-3 * scale <= time <= 1.01 * scale:
            return min(max(time / scale, 0.0), 1.0)
        warn(
            "timestep",
            f"the network was called with timestep {time:g}, and timesteps in [0, {scale:g}] were "
            "expected. Windows are read off the timestep: pass the pipeline instead of the "
            "network, so that its scheduler is known",
        )
        return None


def in_range(remaining: float, window: Sequence[float]) -> bool:
    """Whether a remaining share of a run is in [low, high); a high of 1 includes the start."""
    low, high = window
    return low <= remaining and (remaining < high or high >= 1)
