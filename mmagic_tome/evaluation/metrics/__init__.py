# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Metrics of pictures, of sets of pictures, and of what they cost.

Pure Python API, without mmengine::

    psnr = build_paired('psnr')
    per_picture = psnr(dense, merged)            # (B, 3, H, W) uint8 each -> (B,) float64
    print(psnr.text(psnr.mean(per_picture)))     # '31.20 dB', or 'identical'

==============  ====================================================================
base.py         the two interfaces, and the checks that all metrics make
pixels.py       PSNR, SSIM, MS-SSIM
perceptual.py   LPIPS, DISTS
latents.py      relative latent error
difference.py   the largest error, and the picture that shows where it is
inception.py    FID, KID, precision / recall, Inception Score
clip.py         CLIP score, CMMD
efficientnet.py distances on EfficientNet-lite0, whose weights come with a package
distances.py    the maths between two sets of features
cost.py         time, memory, operations, tokens, energy
weights.py      weights files: local, torch hub's, or a clear error
==============  ====================================================================

Libraries are imported when a metric is first used, not when this package is.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ...errors import ToMeError
from ...validate import did_you_mean
from .base import PairedMetric, SetMetric
from .clip import CMMD, CLIPScore
from .difference import MaxError, max_error_picture
from .distances import frechet_distance
from .efficientnet import EfficientNetDistance, EfficientNetFrechet
from .inception import FID, KID, InceptionScore, PrecisionRecall
from .latents import LatentError, relative_latent_error
from .perceptual import DISTS, LPIPS
from .pixels import MSSSIM, PSNR, SSIM

__all__ = [
    "CMMD",
    "DISTS",
    "FID",
    "KID",
    "LPIPS",
    "MSSSIM",
    "PAIRED",
    "PSNR",
    "SETS",
    "SSIM",
    "CLIPScore",
    "EfficientNetDistance",
    "EfficientNetFrechet",
    "InceptionScore",
    "LatentError",
    "MaxError",
    "PairedMetric",
    "PrecisionRecall",
    "SetMetric",
    "build_paired",
    "build_set",
    "frechet_distance",
    "max_error_picture",
    "relative_latent_error",
]

PAIRED: dict[str, type[PairedMetric]] = {
    cls.name: cls
    for cls in (PSNR, SSIM, MSSSIM, LPIPS, DISTS, LatentError, EfficientNetDistance, MaxError)
}

SETS: dict[str, type[SetMetric]] = {
    cls.name: cls
    for cls in (FID, KID, PrecisionRecall, InceptionScore, CMMD, CLIPScore, EfficientNetFrechet)
}


def build_paired(name: str, **options: Any) -> PairedMetric:
    """A metric of :data:`PAIRED` by name, with options of its class.

    Raises:
        ToMeError: an unknown name or option, or weights that are not there.
    """
    return _build(PAIRED, "paired metric", name, options)


def build_set(name: str, **options: Any) -> SetMetric:
    """A metric of :data:`SETS` by name, with options of its class.

    Raises:
        ToMeError: an unknown name or option, or weights that are not there.
    """
    return _build(SETS, "metric of a set", name, options)


def _build(known: Mapping[str, type], kind: str, name: str, options: dict[str, Any]) -> Any:
    if name not in known:
        hint = did_you_mean(name, known)
        raise ToMeError(f"unknown {kind} {name!r}: {hint}Known: {', '.join(known)}")
    takes = list(inspect.signature(known[name]).parameters)
    unknown = sorted(set(options) - set(takes))
    if unknown:
        raise ToMeError(f"{name} does not take {unknown}; its options are {takes}")
    return known[name](**options)
