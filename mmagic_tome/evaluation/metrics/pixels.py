# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Paired metrics that need no network: PSNR, SSIM, MS-SSIM (torchmetrics)."""

from __future__ import annotations

import math

from torch import Tensor

from ...errors import ToMeError
from .base import PairedMetric, _values, library


class PSNR(PairedMetric):
    """Peak signal-to-noise ratio over the three channels, in dB of the peak 255.

    ``inf`` for identical pictures; :meth:`text` calls it "identical". The mean over pictures is
    that of the squared errors, turned into dB: a mean of dB would be infinite as soon as one
    pair is identical, and would count good pictures for more than bad ones.
    """

    name = "psnr"
    label = "PSNR"
    higher_is_better = True
    unit = "dB"

    def one(self, reference: Tensor, candidate: Tensor) -> float:
        functional = library("torchmetrics.functional.image", "torchmetrics", self.label)
        psnr = functional.peak_signal_noise_ratio
        # float64, because float32 loses digits of a sum of 10**6 squares.
        return float(psnr(candidate.double(), reference.double(), data_range=255.0))

    def mean(self, values: Tensor) -> float:
        squared = (10 ** (-_values(self, values) / 10)).mean()  # of the peak's square
        return -10 * math.log10(squared) if squared > 0 else math.inf

    def text(self, value: float) -> str:
        return "identical" if value == math.inf else f"{value:.2f} dB"


class SSIM(PairedMetric):
    """Structural similarity, Gaussian window of 11 pixels, sigma 1.5; 1 for identical pictures.

    Source: Wang et al., "Image quality assessment: from error visibility to structural
    similarity", 2004. Pictures need at least 11 pixels a side.
    """

    name = "ssim"
    label = "SSIM"
    higher_is_better = True
    smallest = 11

    def one(self, reference: Tensor, candidate: Tensor) -> float:
        _check_size(self, reference)
        functional = library("torchmetrics.functional.image", "torchmetrics", self.label)
        ssim = functional.structural_similarity_index_measure
        return float(ssim(_unit(candidate), _unit(reference), data_range=1.0))


class MSSSIM(PairedMetric):
    """Structural similarity over five scales, each half of the last; 1 for identical pictures.

    Source: Wang et al., "Multiscale structural similarity for image quality assessment", 2003.
    Negative similarities of a scale count as 0, as usual. Pictures need at least 176 pixels a
    side: at the fifth scale a side is divided by 16, and the window has 11 pixels.
    """

    name = "ms_ssim"
    label = "MS-SSIM"
    higher_is_better = True
    smallest = 176

    def one(self, reference: Tensor, candidate: Tensor) -> float:
        _check_size(self, reference)
        functional = library("torchmetrics.functional.image", "torchmetrics", self.label)
        ms_ssim = functional.multiscale_structural_similarity_index_measure
        value = ms_ssim(_unit(candidate), _unit(reference), data_range=1.0, normalize="relu")
        return float(value)


def _unit(images: Tensor) -> Tensor:
    """In [0, 1], single precision: right to 1e-5, where double takes twenty times as long on a CPU
    (three seconds for a picture of 512x512)."""
    return images.float() / 255


def _check_size(metric: PairedMetric, images: Tensor) -> None:
    height, width = images.shape[-2:]
    if min(height, width) < metric.smallest:
        raise ToMeError(
            f"{metric.label} needs pictures of at least {metric.smallest} pixels a side, got "
            f"{height}x{width} (height x width). Generate larger ones, or leave this metric out"
        )
