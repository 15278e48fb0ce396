# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""How much of a run's schedule remains at a timestep: the one meaning of every window.

1 is the start of the schedule (pure noise), 0 its last step. It is counted in the scheduler's
steps, so a window covers the same share of a run with every scheduler, flow shift and
parametrisation of the timestep; image-to-image starts lower. Without a scheduler it is read off the
timestep.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from .schedulers import scheduler_of

# Bounds of sigma that EDM and Stable Video Diffusion train with (arXiv 2206.00364, table 1, rounded
# to those of the published scheduler configs), and their exponent.
_SIGMA_MIN, _RHO = 0.002, 7
# Timesteps in half precision differ from the scheduler's by this much.
_RELATIVE = 0.005


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

    def __reduce__(self) -> tuple:
        # A pickle belongs to another pipeline, or to none.
        return Timeline, (None, self.scale)

    def __deepcopy__(self, memo: dict) -> Timeline:
        # As part of a pipeline it goes on with the copy of the scheduler.
        twin = Timeline(None, self.scale)
        twin._scheduler = copy.deepcopy(self.scheduler(), memo)
        return twin

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
        looks_like_edm = scale is None or (scale == 1000 and abs(first) < 3 and first % 1)
        if not looks_like_edm:
            if not -1e-3 * scale <= time <= 1.01 * scale:
                warn(
                    "timestep",
                    f"the network was called with timestep {time:g}, and timesteps in [0, "
                    f"{scale:g}] were expected. Windows are read off the timestep: pass the "
                    "pipeline instead of the network, so that its scheduler is known",
                )
                return None
            return min(max(time / scale, 0.0), 1.0)
        if scale is not None:
            warn(
                "timestep",
                f"the network was called with timestep {first:g}, and timesteps in [0, {scale:g}] "
                "were expected. It is taken for ln(sigma) / 4, as EDM samplers pass it: pass the "
                "pipeline instead of the network, so that its scheduler is known",
            )
        # Karras schedule from the run's first sigma, arXiv 2206.00364, equation 5.
        low = _SIGMA_MIN ** (1 / _RHO)
        high, now = (math.exp(4 * value / _RHO) for value in (first, time))
        return min(max((now - low) / (high - low), 0.0), 1.0) if high > low else None


def in_range(remaining: float, window: Sequence[float]) -> bool:
    """Whether a remaining share of a run is in [low, high); a high of 1 includes the start."""
    low, high = window
    return low <= remaining and (remaining < high or high >= 1)
