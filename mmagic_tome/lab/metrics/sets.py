# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Metrics of sets: FID, KID, EfficientNet's distance.

``weights`` is torch-fidelity's file of Inception-v3. Default: that in torch hub's cache.
``fewest`` is the smallest number of images that a metric takes; lower it for tests and curves.
All but KID depend on the number of images: compare only values of equally many.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .base import SetMetric
from .pairs import efficientnet


@lru_cache(maxsize=1)
def inception(weights: str | None) -> Callable[[Tensor], Tensor]:
    """torch-fidelity's Inception-v3, that of the FID paper."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights, verbose=False)
    return lambda image: network.to(image.device)(image)[0]


def fid(weights: str | None = None, fewest: int = 2048) -> SetMetric:
    """Fréchet inception distance (Heusel et al., 2017); 0 is best.

    With fewer images than the 2048 features, covariances are singular.
    """

    def function(x: Tensor, y: Tensor) -> dict[str, float]:
        return {"fid": frechet_distance(x, y)}

    return SetMetric("fid", "FID", function, fewest=fewest, extract=inception(weights))


def kid(weights: str | None = None, fewest: int = 50) -> SetMetric:
    """Kernel inception distance (Binkowski et al., 2018; torch-fidelity); 0 is best.

    Unbiased, so that it may be slightly below 0: the mean over 100 random subsets of 1000 images,
    or of as many as the smaller set has; two sets of one such size are compared as a whole.
    """
    from torch_fidelity import metric_kid

    def function(x: Tensor, y: Tensor) -> dict[str, float]:
        size = min(len(x), len(y), 1000)
        found = metric_kid.kid_features_to_metric(
            x,
            y,
            kid_subsets=100 if len(x) > size or len(y) > size else 1,
            kid_subset_size=size,
            kid_kernel="poly",
            rng_seed=2020,
            verbose=False,
        )
        return {"kid": found[metric_kid.KEY_METRIC_KID_MEAN]}

    return SetMetric("kid", "KID", function, fewest=fewest, extract=inception(weights))


def frechet_efficientnet_lite0(fewest: int = 50) -> SetMetric:
    """Fréchet distance of EfficientNet-lite0's 1280 pooled features; no download. Not FID."""
    name, label = "frechet_efficientnet_lite0", "Frechet distance, EfficientNet-lite0"
    network = efficientnet()

    def extract(image: Tensor) -> Tensor:
        size = (224, 224)  # what it was trained with
        image = interpolate((image - 127.5) / 128, size, mode="bicubic", antialias=True)
        return network.to(image.device).extract_features(image).mean((2, 3))

    def function(x: Tensor, y: Tensor) -> dict[str, float]:
        return {name: frechet_distance(x, y)}

    return SetMetric(name, label, function, fewest=fewest, extract=extract)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """``|mean difference|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` of (N, D) and (M, D) samples.

    With C1 = A^T A and C2 = B^T B, the trace of the root is the sum of the singular values of
    A B^T, exact even where covariances are singular, as no general matrix root is. The triangles
    of QR decompositions have the same, and at most D rows.
    """
    means, roots, trace = [], [], 0.0
    for samples in (x.double(), y.double()):
        means.append(samples.mean(0))
        centred = (samples - means[-1]) / (len(samples) - 1) ** 0.5
        trace += float(centred.square().sum())
        roots.append(torch.linalg.qr(centred, mode="r").R)
    trace -= 2 * float(torch.linalg.svdvals(roots[0] @ roots[1].T).sum())
    return max(0.0, float((means[0] - means[1]).square().sum()) + trace)
