# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""EfficientNet-lite0's features: maps for the VAE's loss, pooled numbers for retrieval."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmagic_tome.lab.metrics.pairs import efficientnet

TAPS = (0, 2, 4, 10)  # blocks at 1/2, 1/4, 1/8 and 1/16 of the image's size


class EfficientNetLite0(nn.Module):
    """The network, frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.net = efficientnet()

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

    @torch.no_grad()
    def pooled(self, images: Tensor, size: int = 224) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 1280), of the images resized to the network's size."""
        images = F.interpolate(
            images.float(), size=(size, size), mode="bicubic", antialias=True, align_corners=False
        )
        return self.net.extract_features(_scaled(images)).mean((2, 3))


def _scaled(images: Tensor) -> Tensor:
    return images * (127.5 / 128)  # trained on (x - 127) / 128
