# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Metrics of pairs, from torchmetrics and our own."""

from __future__ import annotations

from torch import Tensor

from .base import PairedMetric


def psnr() -> PairedMetric:
    """Peak signal-to-noise ratio in dB of the peak 255; ``inf`` for identical images."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    def function(base: Tensor, other: Tensor) -> Tensor:
        # float64: float32 loses digits of a sum of a million squares.
        return peak_signal_noise_ratio(other.double(), base.double(), data_range=255.0)

    return PairedMetric("psnr", "PSNR", function, unit="dB", higher_is_better=True)


def ssim() -> PairedMetric:
    """Structural similarity, Gaussian window of 11 pixels (Wang et al., 2004); 1 is identical."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    def function(base: Tensor, other: Tensor) -> Tensor:
        return structural_similarity_index_measure(other / 255, base / 255, data_range=1.0)

    return PairedMetric("ssim", "SSIM", function, higher_is_better=True, smallest=11)


def ms_ssim() -> PairedMetric:
    """Structural similarity over five scales (Wang et al., 2003); 1 is identical."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms

    def function(base: Tensor, other: Tensor) -> Tensor:
        return ms(other / 255, base / 255, data_range=1.0, normalize="relu")

    # A side is divided by 16 at the fifth scale, and the window has 11 pixels.
    return PairedMetric("ms_ssim", "MS-SSIM", function, higher_is_better=True, smallest=176)


def lpips(net: str = "alex") -> PairedMetric:
    """Learned perceptual distance (Zhang et al., 2018), ``net`` 'alex' or 'vgg'; 0 is identical."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    network = LearnedPerceptualImagePatchSimilarity(net_type=net).net

    def function(base: Tensor, other: Tensor) -> Tensor:
        return network.to(base.device)(other / 127.5 - 1, base / 127.5 - 1)

    # AlexNet's strides leave nothing of less than 32 pixels.
    return PairedMetric("lpips", f"LPIPS ({net})", function, smallest=32)


def latent_error() -> PairedMetric:
    """``||other - base|| / ||base||`` of the final latents, before the VAE; 0 is identical."""

    def function(base: Tensor, other: Tensor) -> Tensor:
        return (other.double() - base.double()).norm() / base.double().norm()

    return PairedMetric("latent_error", "latent error", function, of="latents")
