# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Error control: which region may be skipped at the next step so that a run keeps its tolerance.

The error is predicted before a step is skipped, per image, from what the run has computed so far:

1. *Error of the output.* A skipped output follows the line through the last two, or, where outputs
   alternate or level off, a fraction ``g`` of its slope: the one with which the last change of the
   output follows from the change before, ``r2 = g r1``, by least squares (Aitken's idea). It errs
   at ``t`` by about ``|(t - t2) (t - t1) / (t2 - t0)|`` times ``|r2 - g r1|``, the rates of change
   being those of the last three outputs; with ``g = 1`` this is the embedded estimate of multistep
   solvers (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section III.1).
2. *Error of the latent.* A sampler's next latent is a linear combination of latents and outputs;
   the weights of the outputs, guidance scale included, follow from the run (:mod:`..fits`).
3. *Error of the run.* What follows one line errs to one side: errors since the last computed step
   are summed. Others add up like independent ones: the square root of the sum of their squares.

How well these predict the final error, and the constants below: ``docs/benchmarks/tolerance.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from ..fits import Fit
from ..runs import Run
from .config import StepCacheConfig

#: Regions that may be skipped, the cheapest run first -> share of an error that error feedback
#: leaves (``docs/explanation/error_control.md``).
LEFT_BY_FEEDBACK = {"network": 0.7, "inner": 0.6, "innermost": 0.9}


def relative_errors(
    inner_errors: tuple[float, float] = (0.3, 0.1), factor: float = 1.0, alternating: bool = False
) -> Mapping[str, float]:
    """Region -> error that is left of skipping it, relative to an extrapolated output of the
    network without error feedback.

    Args:
        inner_errors: see :class:`~mmagic_tome.models.ModelAdapter`.
        factor, alternating: see :attr:`Timeline.amplification
            <mmagic_tome.timeline.Timeline.amplification>`; there is no feedback to what alternates.
    """
    return {
        region: factor * error * (1.0 if alternating else left)
        for (region, left), error in zip(LEFT_BY_FEEDBACK.items(), (1.0, *inner_errors))
    }


#: How each of them is extrapolated.
REGIONS = {
    "network": StepCacheConfig(error_feedback=0.5),
    "inner": StepCacheConfig(region="inner", error_feedback=0.7),
    "innermost": StepCacheConfig(region="inner", num_outer_blocks=2, error_feedback=0.7),
}
# Share of the remaining budget, as a square, that one step may spend: few steps are left to spend
# it at the end of a run, and earlier steps must leave something for later ones.
_SHARE = 0.2
# The sampler's next weight is at most this many times the last one.
_GROWTH = 1.25
# Outputs that turn by less than this share from step to step are extrapolated along the line: its
# errors have both signs and cancel, which those of a damped slope do not.
_STEADY = 0.7
# Slopes are at most this far from 0.
_STEEPEST = 1.2
_TINY = 1e-30


@dataclass
class Budget:
    """What one run may err, and what it has spent: per image, relative to the latent's norm."""

    tolerance: float
    relative: Mapping[str, float] = field(default_factory=relative_errors)
    spent: np.ndarray | None = None  # (B,) sum of squares of the predicted errors
    skipped: list[str | None] = field(default_factory=list)  # region per step; None: computed
    since: np.ndarray | None = None  # (B,) sum of the predicted errors since a computed step
    time: float = 0.0  # timestep of the last step
    ahead: float | None = None  # timestep of a step that was decided before the network was called
    slope: Tensor | None = None  # (B,) of the present step's extrapolation; None: the line
    weights: np.ndarray | None = None  # of the sampler, at the step before
    remaining: float | None = None  # share of the schedule that remained, at the step before
    began: list[float] = field(default_factory=list)  # seconds of a clock, when each step began

    def go_on(self, before: Budget) -> None:
        """Take over what was spent by a run that this one seems to continue: the input of its next
        step did not follow from it, since noise was added or latents were edited."""
        self.spent, self.skipped, self.began = before.spent, [*before.skipped], [*before.began]

    def _steps_left(self, remaining: float) -> int:
        """Steps from this one to the end of the run, from the share of the schedule that remains;
        0 at the first step, where the stride is not known yet."""
        before, self.remaining = self.remaining, remaining
        if before is None or before <= remaining:
            return 0
        return round(remaining / (before - remaining)) + 1

    def decide(self, run: Run, time: float, known: Mapping[str, Sequence[float]]) -> str | None:
        """The region to skip at the run's present step, noted; None to compute it.

        Args:
            run: the run, at the first call of its step.
            time: timestep of the step.
            known: regions out of :data:`REGIONS` that can be skipped here -> timesteps of
                their last two computed outputs.
        """
        steps_left = 0 if run.remaining is None or run.last else self._steps_left(run.remaining)
        curvature = self._curvature(run.fitted, run.times)
        chosen = None
        if curvature is not None and steps_left > 1 and self.tolerance > 0:
            spent = np.zeros_like(curvature) if self.spent is None else self.spent
            if spent.shape != curvature.shape:  # a batch that changed on the way
                spent = np.full_like(curvature, spent.max())
            left = (self.tolerance**2 - spent).clip(0)
            share = max(2 / steps_left, _SHARE)
            for region, relative in self.relative.items():
                if region not in known or not self._may_skip(region, steps_left):
                    continue
                t1, t2 = known[region]
                errors = curvature * abs((time - t2) * (time - t1)) * relative
                more, most = errors**2, left * share
                if self.slope is None and self.since is not None:
                    more = (errors + self.since) ** 2 - self.since**2
                if region == "network" == self.skipped[-1]:
                    most = left / steps_left  # a second skip in a row buys less: an even share
                # The image that errs most decides for its batch.
                if bool((more <= most).all()):
                    chosen, self.spent = region, spent + more
                    self.since = errors if self.since is None else errors + self.since
                    break
        if chosen is None:
            self.since = None
        self.skipped.append(chosen)
        # The inner products above have waited for the device: what was asked of it is done.
        self.began.append(perf_counter())
        return chosen

    def _may_skip(self, region: str, steps_left: int) -> bool:
        """Whether enough was computed before a region. An inner region: at the last step at which
        the network was. The network: at the last step, or where outputs are steady at one of the
        last two; not right before the end, where outputs change faster than they did before."""
        if region == "network":
            in_a_row = 2 if self.slope is None and steps_left > 2 else 1
            return self.skipped[-in_a_row:] != ["network"] * in_a_row
        return [one for one in self.skipped if one != "network"][-1:] in ([], [None])

    def _curvature(self, fit: Fit | None, times: Sequence[float]) -> np.ndarray | None:
        """(B,) second divided differences of the outputs, times the sampler's weights and relative
        to the latent; None if they are not known. Sets :attr:`slope`."""
        self.slope = None
        if fit is None or fit.weights is None:
            return None
        before, self.weights = self.weights, fit.weights
        if fit.rates is None or len(times) < 3:
            return None
        growth = 1.0
        if before is not None and before.shape == fit.weights.shape:
            growth = np.linalg.norm(fit.weights) / max(np.linalg.norm(before), _TINY)
        weights = fit.weights * min(max(growth, 1.0), _GROWTH)
        # Inner products of the sampler's combination of the outputs' last two rates of change.
        rates = (fit.rates[:, -2:, :, -2:] @ weights).swapaxes(2, 3) @ weights
        earlier, both, later = rates[:, 0, 0], rates[:, 0, 1], rates[:, 1, 1]
        slope = (both / earlier.clip(_TINY)).clip(-_STEEPEST, _STEEPEST)
        slope = np.where(slope < _STEADY, slope, 1.0)
        if bool((slope != 1).any()):
            self.slope = torch.from_numpy(slope)
        scale = abs(times[-1] - times[-3]) * fit.norms.clip(_TINY)
        change = np.sqrt((later - 2 * slope * both + slope**2 * earlier).clip(0))
        return change / scale

    @property
    def predicted(self) -> list[float]:
        """Predicted error of the final latent so far, relative, per image; [] before any skip."""
        return [] if self.spent is None else np.sqrt(self.spent).tolist()

    @property
    def speedup(self) -> float | None:
        """How many times as fast the steps were, all but the last, as if each had taken as long as
        the median computed one, with all that a pipeline does between them; None after few steps.
        """
        seconds = [after - before for before, after in zip(self.began, self.began[1:])]
        computed = [one for one, region in zip(seconds, self.skipped) if region is None]
        if len(computed) < 2 or not sum(seconds):
            return None
        return median(computed) * len(seconds) / sum(seconds)
