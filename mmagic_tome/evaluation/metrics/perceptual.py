# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Paired metrics over a trained network: LPIPS (lpips), DISTS (torchmetrics)."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from unittest import mock

import torch
from torch import Tensor, nn

from ...errors import ToMeError
from .base import PairedMetric, library
from .weights import fill, find_weights, load_state

_TRUNKS = {
    "alex": ("AlexNet", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"),
    "vgg": ("VGG-16", "https://download.pytorch.org/models/vgg16-397923af.pth"),
}


class LPIPS(PairedMetric):
    """Learned perceptual distance, version 0.1; 0 is identical.

    Args:
        net: ``'alex'`` (as papers that compare pictures) or ``'vgg'``. Default: ``'alex'``.
        weights: torchvision's file of AlexNet or VGG-16, trained on ImageNet. Default: torch
            hub's copy, or a download to there. The calibration comes with the package lpips.
        device: where to compute.

    Raises:
        ToMeError: an unknown ``net``; the package or the weights are not there.

    Source: Zhang et al., "The unreasonable effectiveness of deep features as a perceptual
    metric", 2018.
    """

    name = "lpips"
    label = "LPIPS"
    higher_is_better = False
    smallest = 32  # AlexNet's strides leave nothing of less

    def __init__(
        self,
        net: str = "alex",
        weights: str | os.PathLike | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(device)
        if net not in _TRUNKS:
            raise ToMeError(f"net={net!r} of lpips is not known; write one of {list(_TRUNKS)}")
        self.label = f"LPIPS ({_TRUNKS[net][0]})"
        path = find_weights(weights, _TRUNKS[net][1], "weights", self.label)
        self.network = _lpips(net, path, self.device)

    def one(self, reference: Tensor, candidate: Tensor) -> float:
        if min(reference.shape[-2:]) < self.smallest:
            raise ToMeError(
                f"{self.label} needs pictures of at least {self.smallest} pixels a side, got "
                f"{reference.shape[-2]}x{reference.shape[-1]} (height x width)"
            )
        return float(self.network(reference / 127.5 - 1, candidate / 127.5 - 1))


class DISTS(PairedMetric):
    """Deep image structure and texture similarity as a distance; 0 is identical.

    It forgives texture that is resampled, where LPIPS and SSIM do not.

    Args:
        weights: torchvision's file of VGG-16, trained on ImageNet. Default: torch hub's copy,
            or a download to there. The calibration comes with torchmetrics.
        device: where to compute.

    Raises:
        ToMeError: torchmetrics or the weights are not there.

    Source: Ding et al., "Image quality assessment: unifying structure and texture similarity",
    2020.
    """

    name = "dists"
    label = "DISTS"
    higher_is_better = False

    def __init__(
        self, weights: str | os.PathLike | None = None, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__(device)
        path = find_weights(weights, _TRUNKS["vgg"][1], "weights", self.label)
        self.network = _dists(path, self.device)

    def one(self, reference: Tensor, candidate: Tensor) -> float:
        return float(self.network(candidate / 255, reference / 255))


@lru_cache(maxsize=2)
def _lpips(net, path, device):
    lpips = library("lpips", "lpips", "LPIPS")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, about how lpips calls it
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    return _fill_trunk(network, network.net, "slice", path, "LPIPS").to(device)


@lru_cache(maxsize=1)
def _dists(path, device):
    module = library("torchmetrics.functional.image.dists", "torchmetrics", "DISTS")
    library("torchvision", "torchvision", "DISTS")
    build = module.vgg16
    # It asks torchvision for trained weights, which would download them.
    with mock.patch.object(module, "vgg16", lambda weights: build(weights=None)):
        network = module.DISTSNetwork(load_weights=True)
    return _fill_trunk(network, network, "stage", path, "DISTS").to(device)


def _fill_trunk(network: nn.Module, trunk: nn.Module, part: str, path, needed_by: str):
    """Load the layers ``features.N`` of torchvision's file into ``<part>K.N`` of ``trunk``."""
    state = load_state(path, needed_by)
    own = trunk.state_dict()
    for key in own:
        if not key.startswith(part):
            continue
        source = f"features.{key.split('.', 1)[1]}"
        if source in state:
            own[key] = state[source]
        elif key.endswith(("weight", "bias")):
            raise ToMeError(f"{needed_by}: {path} belongs to another network: it has no {source}")
    fill(trunk, own, path, needed_by)
    return network.eval().requires_grad_(False)
