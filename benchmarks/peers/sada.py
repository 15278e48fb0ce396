# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""SADA: Stability-guided Adaptive Diffusion Acceleration (arXiv 2507.17135), without its tokens.

With ``y = dx/dt`` of the probability-flow equation, a step is skipped if the latent lies, against
its own extrapolation, on the side to which ``y`` does not bend: the mean of
``(x - extrapolated) * (y[0] - 2 y[1] + y[2])`` is at most 0, ``y[0]`` the newest (the stability
criterion). The extrapolation is a three-step formula in ``y``, with the weights 5/8, 6/8, -3/8. A
skipped step keeps the last noise prediction and takes the extrapolated latent to predict the clean
one (the authors' code keeps the output, also where it is a velocity, which is farther from the
baseline on the demo model). In the late part of a run all but every fourth step are skipped, and
the clean latent is extrapolated by Lagrange through the last four of these steps. Elsewhere the
paper prunes tokens where the criterion fails; here such a step is computed in full.

Windows are those of the authors' examples for 50 steps, as shares of the run. Time counts in
training steps, as in the continuous equation (our reading: the authors' code multiplies by the
step's share of the run instead). Only for diffusion that predicts noise or velocity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmagic_tome.lab.methods import Method

from .levels import denoised_of, level_at, noise_of, output_of
from .skipping import Call, History, Peer, as_method, check

_WEIGHTS = (5 / 8, 6 / 8, -3 / 8)


def extrapolated(x: Tensor, rates: Sequence[Tensor], stride: float) -> Tensor:
    """The next latent by the three-step formula.

    Args:
        x: the present latent.
        rates: dx/dt at the last three steps, the newest first.
        stride: by how much t falls.
    """
    weighted = zip(_WEIGHTS, rates, strict=True)
    return x - stride * sum(weight * rate for weight, rate in weighted)


def is_stable(x: Tensor, guess: Tensor, rates: Sequence[Tensor]) -> bool:
    """The stability criterion: whether the step that starts at ``x`` may be skipped.

    Args:
        x: the latent.
        guess: its extrapolation.
        rates: dx/dt at the three steps before it, the newest first.
    """
    newest, middle, oldest = rates
    return bool(((x - guess) * (newest - 2 * middle + oldest)).mean() <= 0)


def lagrange(steps: Sequence[int], values: Sequence[Tensor], at: int) -> Tensor:
    """The polynomial through ``values`` at ``steps``, at another step."""
    found = torch.zeros_like(values[0])
    for i, (step, value) in enumerate(zip(steps, values, strict=True)):
        weight = 1.0
        for j, other in enumerate(steps):
            if j != i:
                weight *= (at - other) / (step - other)
        found = found + weight * value
    return found


class Sada(Peer):
    """See the module.

    Args:
        max_skips: in a row, by the criterion; 0 skips nothing.
        start, end: shares of the run between which steps may be skipped.
        late: share of the run from which Lagrange extrapolates. Default: 0.48; None: never.
        spacing: steps between those that are computed in the late part. Default: None, 8 % of the
            run and at least 2, which is the authors' 4 of 50 steps (our reading for shorter runs:
            with 4 of 20 steps the extrapolation fails).
        terms: number of steps that Lagrange uses.
    """

    def __init__(
        self,
        max_skips: int = 4,
        start: float = 0.2,
        end: float = 0.94,
        late: float | None = 0.48,
        spacing: int | None = None,
        terms: int = 4,
    ) -> None:
        check("max_skips", max_skips, 0)
        check("start", start, 0, end)
        check("spacing", 1 if spacing is None else spacing, 1)
        check("terms", terms, 2)
        self.max_skips, self.start, self.end = max_skips, start, end
        self.late, self.spacing, self.terms = late, spacing, terms
        self.in_a_row = 0
        self.rates: list[Tensor] = []  # dx/dt of the last three steps, the newest first
        self.before: tuple[Tensor, float] | None = None  # latent and timestep of the last step
        self.guess: Tensor | None = None  # of the present latent
        self.nodes: list[tuple[int, Tensor]] = []  # step and clean latent, for Lagrange
        self.by_lagrange = False

    def stepped(self, call: Call, output: Tensor, latents: Tensor) -> None:
        scheduler, time = call.scheduler, call.timestep
        level, kind = level_at(scheduler, time), scheduler.config.prediction_type
        x = call.sample[: len(output)]  # both guidance halves start from the same latent
        beta = float(scheduler.betas[round(time)])
        noise = noise_of(output, x, level, kind)
        rate = 0.5 * beta * (noise / level.sigma - x)
        self.rates = [rate, *self.rates[:2]]
        self.before = x, time
        spacing = self._spacing(call)
        if call.step % spacing == 1 % spacing and level.alpha > 0.01:
            node = call.step, denoised_of(output, x, level, kind)
            self.nodes = [*self.nodes, node][-self.terms :]

    def skips(self, call: Call, history: History) -> bool:
        skip = self.max_skips > 0 and len(self.rates) == 3 and self._may_skip(call)
        self.in_a_row = self.in_a_row + 1 if skip else 0
        return skip

    def _spacing(self, call: Call) -> int:
        return self.spacing or max(2, round(0.08 * call.steps))

    def _may_skip(self, call: Call) -> bool:
        x, time = self.before
        self.guess = extrapolated(x, self.rates, time - call.timestep)
        before = call.step - 1  # the authors decide at the end of the step before
        if not int(self.start * call.steps) <= before < int(self.end * call.steps):
            return False
        self.by_lagrange = self.late is not None and before >= int(self.late * call.steps)
        if self.by_lagrange:
            spacing = self._spacing(call)
            skips = before % spacing != 0 and len(self.nodes) > 1
            return skips and self.in_a_row < spacing
        stable = is_stable(call.sample[: len(x)], self.guess, self.rates)
        return stable and self.in_a_row < self.max_skips

    def estimate(self, call: Call, history: History) -> Tensor:
        level, kind = level_at(call.scheduler, call.timestep), call.scheduler.config.prediction_type
        repeats = len(call.sample) // len(self.guess)
        if self.by_lagrange:
            steps, values = zip(*self.nodes, strict=True)
            denoised = torch.cat([lagrange(steps, values, call.step)] * repeats)
        else:
            then = level_at(call.scheduler, history.times[-1])
            noise = noise_of(history.outputs[-1], history.inputs[-1], then, kind)
            guess = torch.cat([self.guess] * repeats)
            denoised = (guess - level.sigma * noise) / level.alpha
        return output_of(denoised, call.sample, level, kind)


def method(max_skips: int = 4, name: str | None = None, **options: float | None) -> Method:
    """SADA; options of :class:`Sada`."""
    late = "" if options.get("late", 0.48) is not None else " criterion alone"
    name = name or f"SADA {max_skips}{late}"
    return as_method(name, lambda: Sada(max_skips, **options))
