# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Signal and noise of a latent, and the quantities that a network may predict from it.

A latent as the network receives it is ``x = alpha * x0 + sigma * noise`` with
``alpha**2 + sigma**2 = 1``, whatever scale the scheduler keeps its own latents in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from mmagic_tome.errors import ToMeError


class Level(NamedTuple):
    """How much signal and noise a latent holds."""

    alpha: float
    sigma: float


def level_at(scheduler: Any, timestep: float) -> Level:
    """The level at a timestep, from the scheduler's ``alphas_cumprod``.

    Raises:
        ToMeError: The scheduler has none, such as those of flow matching.
    """
    products = getattr(scheduler, "alphas_cumprod", None)
    if products is None:
        raise ToMeError(
            f"{type(scheduler).__name__} has no alphas_cumprod; this method is written for "
            "variance-preserving diffusion, use another one"
        )
    product = float(products[round(timestep)])
    return Level(product**0.5, (1 - product) ** 0.5)


def denoised_of(output: Tensor, x: Tensor, level: Level, kind: str) -> Tensor:
    """The clean latent that an output predicts.

    Args:
        output: of the network.
        x: its input.
        level: of ``x``.
        kind: the scheduler's ``prediction_type``.
    """
    if kind == "epsilon":
        return (x - level.sigma * output) / level.alpha
    if kind == "v_prediction":
        return level.alpha * x - level.sigma * output
    if kind == "sample":
        return output
    raise ToMeError(f"prediction_type {kind!r} is not known; write epsilon, v_prediction or sample")


def output_of(denoised: Tensor, x: Tensor, level: Level, kind: str) -> Tensor:
    """The output that predicts a clean latent: the inverse of :func:`denoised_of`."""
    if kind == "epsilon":
        return (x - level.alpha * denoised) / level.sigma
    if kind == "v_prediction":
        return (level.alpha * x - denoised) / level.sigma
    if kind == "sample":
        return denoised
    raise ToMeError(f"prediction_type {kind!r} is not known; write epsilon, v_prediction or sample")


def noise_of(output: Tensor, x: Tensor, level: Level, kind: str) -> Tensor:
    """The noise that an output predicts."""
    if kind == "epsilon":
        return output
    if kind == "v_prediction":
        return level.alpha * output + level.sigma * x
    return (x - level.alpha * denoised_of(output, x, level, kind)) / level.sigma
