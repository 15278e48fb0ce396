# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Spectrum: Adaptive Spectral Feature Forecasting (arXiv 2603.01623).

All computed features are fitted, over the step number, by Chebyshev polynomials with ridge
regression; skipped ones are read off the fit (section 3). After a warm-up, one of every ``window``
steps is computed, and each computed step makes the window ``growth`` steps longer (appendix B.1).
Since publication the authors recommend to mix the fit with the line through the last two features.

``PAPER`` are the authors' settings for Stable Diffusion XL, on the features in front of the last
normalisation; ``USERS`` those of stable-diffusion.cpp and of the nodes for ComfyUI, on the clean
latent. The latter extend the line by half a spacing at every skipped step, keep the last six
outputs and place steps on a scale of 50 whatever the number of steps. The authors' code has this
scale too; it is the number of steps of all their runs, so ``PAPER`` takes the run's own number (our
reading).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmagic_tome.lab.methods import Method

from .skipping import SPACES, Call, History, Peer, as_method, check

PAPER: dict[str, Any] = {
    "degree": 4, "ridge": 0.1, "mix": 0.5, "window": 2, "growth": 0.75, "warmup": 5,
    "space": "features",
}  # fmt: skip
USERS: dict[str, Any] = {
    "degree": 3, "ridge": 1.0, "mix": 0.4, "window": 2, "growth": 0.5, "warmup": 4, "stop": 0.9,
    "space": "denoised", "keep": 6, "scale": 50, "slope": 0.5,
}  # fmt: skip


def chebyshev(times: Tensor, degree: int) -> Tensor:
    """Chebyshev polynomials of the first kind: (n,) times in -1 ... 1 -> (n, degree + 1)."""
    columns = [torch.ones_like(times), times]
    for _ in range(degree - 1):
        columns.append(2 * times * columns[-1] - columns[-2])
    return torch.stack(columns[: degree + 1], dim=1)


def ridge_weights(times: Sequence[float], at: float, degree: int, ridge: float) -> Tensor:
    """Weights (n,) of values at ``times`` in the ridge fit's value at ``at``, in float64.

    The fit minimises the squared residuals plus ``ridge`` times the squared coefficients. All
    times are in -1 ... 1.
    """
    known = chebyshev(torch.tensor(times, dtype=torch.float64), degree)
    wanted = chebyshev(torch.tensor([at], dtype=torch.float64), degree)
    normal = known.T @ known + ridge * torch.eye(degree + 1, dtype=torch.float64)
    return known @ torch.linalg.solve(normal, wanted[0])


def is_computed(in_a_row: int, window: float) -> bool:
    """Whether a step after the warm-up is computed, ``in_a_row`` skipped steps after the last
    computed one."""
    return (in_a_row + 1) % max(1, math.floor(window)) == 0


class Spectrum(Peer):
    """See the module.

    Args:
        degree: highest degree of the polynomials.
        ridge: weight of the squared coefficients.
        mix: share of the fit; the rest is the line.
        window: steps per computed step, at first.
        growth: of the window, per computed step after the warm-up.
        warmup: steps that are computed at first.
        stop: share of the run after which all steps are computed.
        space: what is fitted, one of ``SPACES``.
        keep: number of the last values that are fitted. Default: None, all.
        scale: number of steps that -1 ... 1 stands for. Default: None, those of the run.
        slope: how far the line is extended, in spacings per skip. Default: None, to the step.
    """

    def __init__(
        self,
        degree: int = 4,
        ridge: float = 0.1,
        mix: float = 0.5,
        window: float = 2,
        growth: float = 0.75,
        warmup: int = 5,
        stop: float = 1.0,
        space: str = "features",
        keep: int | None = None,
        scale: int | None = None,
        slope: float | None = None,
    ) -> None:
        check("degree", degree, 1)
        check("ridge", ridge, 0)
        check("mix", mix, 0, 1)
        check("window", window, 1)
        check("growth", growth, 0)
        check("warmup", warmup, 2)
        check("place of space", SPACES.index(space) if space in SPACES else -1, 0)
        self.degree, self.ridge, self.mix = degree, ridge, mix
        self.window, self.growth, self.warmup, self.stop = window, growth, warmup, stop
        self.space, self.keep, self.scale, self.slope = space, keep, scale, slope
        self.in_a_row = 0

    def skips(self, call: Call, history: History) -> bool:
        skip = False
        if call.step >= self.warmup:
            stopped = call.step >= int(self.stop * call.steps)
            skip = not stopped and not is_computed(self.in_a_row, self.window)
            if not skip:
                self.window += self.growth
        self.in_a_row = self.in_a_row + 1 if skip else 0
        return skip

    def estimate(self, call: Call, history: History) -> Tensor:
        first = 0 if self.keep is None else -self.keep
        steps, values = history.steps[first:], history.outputs[first:]
        scale = self.scale or call.steps
        times = [2 * step / scale - 1 for step in steps]
        weights = ridge_weights(times, 2 * call.step / scale - 1, self.degree, self.ridge)
        fit = sum(float(weight) * value for weight, value in zip(weights, values, strict=True))
        if len(values) < 2:
            return fit
        distance = self.slope
        if distance is None:
            distance = (call.step - steps[-1]) / (steps[-1] - steps[-2])
        straight = values[-1] + distance * (values[-1] - values[-2])
        return self.mix * fit + (1 - self.mix) * straight


def method(name: str = "Spectrum", **options: Any) -> Method:
    """Spectrum; options of :class:`Spectrum`, such as those of ``PAPER`` and ``USERS``."""
    return as_method(name, lambda: Spectrum(**options))
