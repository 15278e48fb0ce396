# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Distances between two sets of features: the maths, without networks or pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ToMeError


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Fréchet distance of two Gaussians, ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``.

    The trace of the root comes from the eigenvalues of the symmetric ``S C2 S`` with
    ``S = C1^(1/2)``, which are those of ``C1 C2``. A general matrix root, the usual way, is
    unstable where a covariance is singular (fewer samples than features) and then returns
    complex numbers; here everything stays real and symmetric, and rounding below 0 is 0.

    Args:
        mean1, mean2: (D,).
        cov1, cov2: (D, D), symmetric, positive semi-definite.

    Returns:
        float: at least 0. Computed in float64.

    Raises:
        ToMeError: values that are not finite.

    Source: Heusel et al., "GANs trained by a two time-scale update rule", 2017 (FID).
    """
    mean1, cov1, mean2, cov2 = (x.double() for x in (mean1, cov1, mean2, cov2))
    if not all(x.isfinite().all() for x in (mean1, cov1, mean2, cov2)):
        raise ToMeError("Frechet distance: a mean or covariance has values that are not finite")
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = root @ cov2 @ root
    values = torch.linalg.eigvalsh((product + product.T) / 2)
    trace = cov1.trace() + cov2.trace() - 2 * values.clamp_min(0).sqrt().sum()
    return max(0.0, float((mean1 - mean2).square().sum() + trace))


def frechet_distance_of_sets(features: Tensor, reference: Tensor) -> float:
    """:func:`frechet_distance` of the Gaussians of (N, D) and (M, D) samples, N and M > 1.

    Small sets do not need their covariances: with C1 = A^T A and C2 = B^T B, the trace of the
    root is the sum of the singular values of A B^T, of size (N, M). That is faster then, and
    exact where the covariances are singular.
    """
    means, roots = [], []
    for x in (features.double(), reference.double()):
        means.append(x.mean(0))
        roots.append((x - means[-1]) / (len(x) - 1) ** 0.5)
    a, b = roots
    if len(a) * len(b) > a.shape[1] ** 2:
        return frechet_distance(means[0], a.T @ a, means[1], b.T @ b)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ToMeError("Frechet distance: a feature is not finite")
    trace = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return max(0.0, float((means[0] - means[1]).square().sum() + trace))


def gaussian_mmd(x: Tensor, y: Tensor, sigma: float, rows: int = 1024) -> float:
    """Squared maximum mean discrepancy with the kernel ``exp(-|a - b|^2 / (2 sigma^2))``.

    The estimator with the diagonal (V-statistic), which CMMD uses: never negative.

    Args:
        x, y: (N, D) and (M, D).
        sigma: width of the kernel.
        rows: of the kernel matrix at a time; it is never held as a whole.

    Source: Jayasumana et al., "Rethinking FID", 2024.
    """

    def mean(a: Tensor, b: Tensor) -> Tensor:
        total = sum(
            torch.exp(-torch.cdist(part, b).square() / (2 * sigma**2)).sum()
            for part in a.split(rows)
        )
        return total / (len(a) * len(b))

    x, y = x.double(), y.double()
    return max(0.0, float(mean(x, x) + mean(y, y) - 2 * mean(x, y)))
