# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The two kinds of metrics, and the checks that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ToMeError


@dataclass(frozen=True)
class Metric:
    """What both kinds share. Images are (B, 3, H, W) uint8 RGB, and each is measured by itself."""

    name: str  #: key in NAMES
    label: str  #: title for tables
    function: Callable[..., Any]  #: computes it, of one image or of sets
    unit: str = ""  #: or 'dB'
    higher_is_better: bool = False  #: of sets: of the first value
    of: str = "images"  #: or 'latents', (B, ...) of any floating type
    smallest: int = 1  #: pixels a side that it takes at least
    fewest: int = 1  #: images of each set that it takes at least

    def check(self, size: tuple[int, int] | None = None, count: int | None = None) -> None:
        """Raise ToMeError if a (height, width) or a number of images does not suffice."""
        if size is not None and min(size) < self.smallest:
            lacks = f"{self.smallest} pixels a side, not {size[0]}x{size[1]}"
        elif count is not None and count < self.fewest:
            lacks = f"{self.fewest} images of each set, not {count}"
        else:
            return
        raise ToMeError(f"{self.label} needs at least {lacks}; leave it out")

    def mean(self, values: Tensor) -> float:
        """The values (N,) of N images as one number; NaN if one is.

        That of decibels is the mean of the squared errors, turned into dB: identical images count
        as no error, where a mean of dB would be infinite.
        """
        values = torch.as_tensor(values, dtype=torch.float64)
        if self.unit != "dB":
            return float(values.mean())
        return float(-10 * (10 ** (-values / 10)).mean().log10())

    def figures(self, values: Sequence[float]) -> dict[str, float]:
        """Of the values of images: the mean as NAME, the worst as NAME_worst, and as NAME_p5 that
        which 5 % of the images are worse than."""
        # From the worst on; an image's own value, since that of identical images may be infinite.
        ordered = sorted(values, reverse=not self.higher_is_better)
        p5 = ordered[int(0.05 * (len(ordered) - 1))]
        return {
            self.name: self.mean(values),
            f"{self.name}_worst": ordered[0],
            f"{self.name}_p5": p5,
        }

    def text(self, value: float) -> str:
        """A value as a table shows it."""
        if self.unit == "dB":
            return "identical" if value == math.inf else f"{value:.2f} dB"
        return f"{value:#.4g}"


class PairedMetric(Metric):
    """Compares images or final latents with the baseline's of the same prompts and seeds."""

    @torch.no_grad()
    def __call__(self, base: Tensor, other: Tensor) -> Tensor:
        """One value per image, computed where the images are: (B,) float64 on the CPU.

        Raises:
            ToMeError: Shapes that differ, another type, images that are too small.
        """
        if self.of == "images":
            check_images(base, other)
            self.check(size=tuple(base.shape[-2:]))
        if base.shape != other.shape:
            shapes = f"{tuple(base.shape)} of the baseline and {tuple(other.shape)}"
            raise ToMeError(f"{self.label} compares {self.of} of one shape, and got {shapes}")
        values = [float(self.function(*pair)) for pair in zip(base.split(1), other.split(1))]
        return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class SetMetric(Metric):
    """Compares a set of images with another one: real images, or the baseline's."""

    #: (1, 3, H, W) uint8 -> (1, D) features; metrics with the same one share them.
    extract: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def features_of(self, images: Tensor, device: str | torch.device = "cpu") -> Tensor:
        """(B, D) float32 on the CPU; ``torch.cat`` joins those of more images."""
        check_images(images)
        return torch.cat([self.extract(one.to(device)) for one in images.split(1)]).float().cpu()

    def compute(self, base: Tensor, other: Tensor) -> dict[str, float]:
        """Name -> value, the metric itself first, in float64; the order of images is irrelevant.

        Args:
            base, other: (N, D) and (M, D), features of what is compared with and of the images.

        Raises:
            ToMeError: Too few images.
        """
        for features in (base, other):
            self.check(count=len(features))
        # Sorted, since libraries draw subsets by number.
        base, other = (x[np.lexsort(x.numpy().T)].double() for x in (base, other))
        return self.function(other, base)


def check_images(*batches: Tensor) -> None:
    """Raise ToMeError unless all are (B, 3, H, W) uint8 with B > 0."""
    for images in batches:
        shape = tuple(images.shape)
        if images.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or 0 in shape:
            raise ToMeError(f"images must be (B, 3, H, W) uint8, got {shape} {images.dtype}")
