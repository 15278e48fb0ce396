# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""How far merged latents are from the dense ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ToMeError
from .base import PairedMetric


class LatentError(PairedMetric):
    """Relative error of the final latents, see :func:`relative_latent_error`; 0 is identical.

    What the network did, before the VAE decodes it. Computed on the CPU in float64.
    """

    name = "latent_error"
    label = "latent error"
    higher_is_better = False
    of = "latents"

    def __call__(self, reference: Tensor, candidate: Tensor) -> Tensor:
        return relative_latent_error(reference, candidate)


def relative_latent_error(reference: Tensor, candidate: Tensor) -> Tensor:
    """``||candidate - reference|| / ||reference||`` of each picture's latent; 0 is identical.

    Args:
        reference: (B, ...) latents of the dense model, of any floating type.
        candidate: the same shape, of the same prompts and seeds.

    Returns:
        Tensor: (B,) float64 on the CPU.

    Raises:
        ToMeError: different shapes, no pictures, latents that are zero or not finite.
    """
    if reference.shape != candidate.shape or reference.ndim < 2 or 0 in reference.shape:
        raise ToMeError(
            f"latents of shapes {tuple(reference.shape)} and {tuple(candidate.shape)}: expected "
            "two of one shape (B, ...)"
        )
    r, c = (x.detach().cpu().double().flatten(1) for x in (reference, candidate))
    for name, x in (("reference", r), ("candidate", c)):
        bad = (~x.isfinite()).any(1).nonzero().flatten().tolist()
        if bad:
            raise ToMeError(f"the {name} latents of pictures {bad} of {len(x)} are not finite")
    norm = torch.linalg.vector_norm(r, dim=1)
    if (norm == 0).any():
        raise ToMeError("a reference latent is all zeros: no error relative to it can be given")
    return torch.linalg.vector_norm(c - r, dim=1) / norm
