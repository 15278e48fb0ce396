# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Error control: which region may be skipped at the next step so that a run keeps its tolerance.

The error is predicted before a step is skipped, per image, from what the run has computed so far:

1. *Error of the output.* The line through the outputs at ``t1`` and ``t2`` errs at ``t`` by about
   ``|(t - t2) (t - t1)|`` times the second divided difference of the last three outputs, the
   embedded estimate of multistep solvers (Hairer, Norsett and Wanner, Solving Ordinary Differential
   Equations I, section III.1).
2. *Error of the latent.* A sampler's next latent is a linear combination of latents and outputs;
   the weights of the outputs, guidance scale included, follow from the run (:mod:`..fits`).
3. *Error of the run.* Errors of the steps add up like independent ones: the square root of the sum
   of their squares.

How well these predict the final error, and the constants below: ``docs/research/tolerance.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..fits import Fit
from ..runs import Run
from .config import StepCacheConfig

#: Regions that may be skipped, the cheapest run first -> error that is left of skipping each,
#: relative to an extrapolated output of the network without error feedback. Measured on the demo
#: model: without feedback the inner regions err 0.3 and 0.08 times as much as the network;
#: feedback leaves about half of an error.
RELATIVE_ERROR = {"network": 0.6, "inner": 0.16, "innermost": 0.06}
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


@dataclass
class Budget:
    """What one run may err, and what it has spent: per image, relative to the latent's norm."""

    tolerance: float
    spent: Tensor | None = None  # (B,) sum of squares of the predicted errors
    skipped: list[str | None] = field(default_factory=list)  # region per step; None: computed
    weights: Tensor | None = None  # of the sampler, at the step before
    remaining: float | None = None  # share of the schedule that remained, at the step before

    def _steps_left(self, remaining: float) -> int:
        """Steps from this one to the end of the run, from the share of the schedule that remains;
        0 at the first step, where the stride is not known yet."""
        before, self.remaining = self.remaining, remaining
        if before is None or before <= remaining:
            return 0
        return round(remaining / (before - remaining)) + 1

    def decide(self, run: Run, time: float, regions: Sequence[str]) -> str | None:
        """The region to skip at the run's present step, noted; None to compute it.

        Args:
            run: the run, at the first call of its step.
            time: timestep of the step.
            regions: out of :data:`RELATIVE_ERROR`, those that can be skipped here.
        """
        steps_left = 0 if run.remaining is None or run.last else self._steps_left(run.remaining)
        errors = self._errors(run.fitted, run.times, time)
        chosen = None
        if errors is not None and steps_left > 1 and self.tolerance > 0:
            spent = torch.zeros_like(errors) if self.spent is None else self.spent
            left = (self.tolerance**2 - spent).clamp_min(0)
            allowed = (left * max(2 / steps_left, _SHARE)).sqrt()
            for region, relative in RELATIVE_ERROR.items():
                # The image that errs most decides for its batch.
                fits = bool((errors * relative <= allowed).all())
                if fits and region in regions and self._alternates(region):
                    chosen = region
                    self.spent = spent + (errors * relative) ** 2
                    break
        self.skipped.append(chosen)
        return chosen

    def _alternates(self, region: str) -> bool:
        """Whether enough was computed since the last skip: the inner region after a skipped step
        would be extrapolated from outputs that lie far back."""
        last = self.skipped[-1] if self.skipped else None
        return last != "network" if region == "network" else last is None

    def _errors(self, fit: Fit | None, times: Sequence[float], time: float) -> Tensor | None:
        """(B,) errors of the latent if the network is skipped; None if they are not known."""
        if fit is None or fit.weights is None:
            return None
        before, self.weights = self.weights, fit.weights
        if fit.rates is None or len(times) < 3 or time == times[-1]:
            return None
        growth = 1.0
        if before is not None and before.shape == fit.weights.shape:
            growth = float(fit.weights.norm() / before.norm().clamp_min(1e-30))
        weights = fit.weights * min(max(growth, 1.0), _GROWTH)
        t0, t1, t2 = times[-3:]
        # Inner products of the sampler's combination of the outputs' last two rates of change.
        rates = torch.einsum("bkplq,p,q->bkl", fit.rates, weights, weights)[:, -2:, -2:]
        second = (rates[:, 0, 0] - 2 * rates[:, 0, 1] + rates[:, 1, 1]).clamp_min(0).sqrt()
        error = second / abs(t2 - t0) * abs((time - t2) * (time - t1))
        return error / fit.norms.clamp_min(1e-30)

    @property
    def predicted(self) -> list[float]:
        """Predicted error of the final latent so far, relative, per image; [] before any skip."""
        return [] if self.spent is None else self.spent.sqrt().tolist()
