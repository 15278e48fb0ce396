# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The two kinds of picture metric, and the checks that all of them make."""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...errors import ToMeError


class PairedMetric:
    """Compares a picture with the dense model's picture of the same prompt and seed.

    A call takes two batches ``reference`` and ``candidate`` of shape (B, 3, H, W), uint8, RGB,
    and returns (B,) float64 on the CPU, one number per picture. Pictures are taken one at a
    time: a number never depends on the batch that its picture came in, to the last bit.

    Args:
        device: where to compute. Default: the CPU.

    Attributes:
        name (str): key in :data:`~mmagic_tome.evaluation.metrics.PAIRED`.
        label (str): for tables.
        higher_is_better (bool): whether more means closer to the dense picture.
        unit (str): ``''`` or ``'dB'``.
        of (str): ``'pictures'``, or ``'latents'`` where the two batches are final latents,
            (B, C, h, w) of any floating type.

    Raises:
        ToMeError: shapes, types or sizes that the metric cannot take.
    """

    name: str
    label: str
    higher_is_better: bool
    unit: str = ""
    of: str = "pictures"

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, reference: Tensor, candidate: Tensor) -> Tensor:
        check_pair(reference, candidate)
        values = [
            self.one(r[None].to(self.device), c[None].to(self.device))
            for r, c in zip(reference, candidate)
        ]
        return torch.tensor(values, dtype=torch.float64)

    def one(self, reference: Tensor, candidate: Tensor) -> float:
        """The value of one pair, each (1, 3, H, W) uint8 on :attr:`device`."""
        raise NotImplementedError

    def mean(self, values: Tensor) -> float:
        """One number for many pictures: (N,) values of calls -> their mean.

        Raises:
            ToMeError: no values, or one that is not a number.
        """
        values = _values(self, values)
        if not values.isfinite().all():
            raise ToMeError(f"{self.label}: {_count_bad(values)} of {len(values)} are not finite")
        return float(values.mean())

    def text(self, value: float) -> str:
        """``value`` as a table shows it."""
        return f"{value:#.4g}{self.unit and ' ' + self.unit}"


class SetMetric:
    """Judges a set of pictures, by itself or against a reference set.

    Features are made and kept per picture, so that resuming, sharding over devices and
    gathering are exact; :meth:`compute` is deterministic and works in float64.

    Args:
        device: where to compute features. Default: the CPU.
        min_samples: replaces the class's smallest number of pictures. A smaller one gives a
            number that says little; it is for tests and for curves over the number of pictures.

    Attributes:
        name (str): key in :data:`~mmagic_tome.evaluation.metrics.SETS`.
        label (str): for tables.
        higher_is_better (bool): of the first value of :meth:`compute`.
        needs_real (bool): whether :meth:`compute` needs a reference set.
        needs_prompts (bool): whether :meth:`features` needs the prompts.
        min_samples (int): fewest pictures that :meth:`compute` takes, of each set.
    """

    name: str
    label: str
    higher_is_better: bool
    needs_real: bool = True
    needs_prompts: bool = False
    min_samples: int = 2

    def __init__(self, device: str | torch.device = "cpu", min_samples: int | None = None) -> None:
        self.device = torch.device(device)
        if min_samples is not None:
            if not isinstance(min_samples, int) or isinstance(min_samples, bool) or min_samples < 2:
                raise ToMeError(
                    f"min_samples={min_samples!r} of {self.name}: write an integer of at least 2"
                )
            self.min_samples = min_samples

    @torch.no_grad()
    def features(self, images: Tensor, prompts: list[str] | None = None) -> Tensor:
        """What :meth:`compute` needs to know of pictures.

        Args:
            images: (B, 3, H, W) uint8, RGB.
            prompts: B of them; only where :attr:`needs_prompts`.

        Returns:
            Tensor: (B, D) float32 on the CPU. Pictures are taken one at a time, so that a row
            does not depend on the batch.

        Raises:
            ToMeError: images of another shape or type, prompts missing or of another number, a
                feature that is not a finite number.
        """
        check_images(images)
        if self.needs_prompts and (prompts is None or len(prompts) != len(images)):
            found = "no prompts" if prompts is None else f"{len(prompts)} prompts"
            raise ToMeError(f"{self.label}: {len(images)} pictures came with {found}")
        rows = []
        for number in range(len(images)):
            image = images[number : number + 1].to(self.device)
            rows.append(self.one(image, prompts[number] if self.needs_prompts else None))
        features = torch.stack(rows).float().cpu()
        if not features.isfinite().all():
            raise ToMeError(
                f"{self.label}: the features of {_count_bad(features)} of {len(features)} pictures "
                "are not finite; the metric's weights file does not belong to its network"
            )
        return features

    def one(self, image: Tensor, prompt: str | None) -> Tensor:
        """Features (D,) of one picture, (1, 3, H, W) uint8 on :attr:`device`."""
        raise NotImplementedError

    def compute(self, features: Tensor, reference: Tensor | None = None) -> dict[str, float]:
        """The metric of a set.

        Args:
            features: (N, D), of the pictures to judge.
            reference: (M, D), of the reference set; only where :attr:`needs_real`.

        Returns:
            dict: Name -> value; the first is the metric itself, others belong to it.

        Raises:
            ToMeError: fewer pictures than :attr:`min_samples`, no reference set, or features of
                different widths.
        """
        self.check_number(len(features), "pictures")
        if self.needs_real:
            if reference is None:
                raise ToMeError(f"{self.label} compares with a reference set, and got none")
            self.check_number(len(reference), "reference pictures")
            if features.shape[1] != reference.shape[1]:
                raise ToMeError(
                    f"{self.label}: features of {features.shape[1]} numbers, of the reference set "
                    f"{reference.shape[1]}; they were made by different networks"
                )
        values = self.value(features.double(), None if reference is None else reference.double())
        for name, value in values.items():
            if not math.isfinite(value):
                raise ToMeError(f"{self.label}: {name} of {len(features)} pictures is {value}")
        return values

    def value(self, features: Tensor, reference: Tensor | None) -> dict[str, float]:
        """What :meth:`compute` returns, of checked float64 features."""
        raise NotImplementedError

    def check_number(self, found: int, what: str) -> None:
        if found < self.min_samples:
            raise ToMeError(
                f"{self.label} needs at least {self.min_samples} {what}, found {found}. Generate "
                "more, or leave this metric out"
            )

    def text(self, value: float) -> str:
        """The metric's ``value`` as a table shows it."""
        return f"{value:#.4g}"


def check_images(images: Any, what: str = "images") -> None:
    """Raise ToMeError unless ``images`` is (B, 3, H, W) uint8 with B > 0."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ToMeError(f"{what}: expected a uint8 tensor of shape (B, 3, H, W), got {found}")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ToMeError(f"{what}: expected shape (B, 3, H, W), got {tuple(images.shape)}")


def check_pair(reference: Any, candidate: Any) -> None:
    """Raise ToMeError unless both are uint8 pictures of one shape."""
    check_images(reference, "reference")
    check_images(candidate, "candidate")
    if reference.shape != candidate.shape:
        raise ToMeError(
            f"reference {tuple(reference.shape)} and candidate {tuple(candidate.shape)} must have "
            "the same shape: a picture is compared with the dense one of its prompt and seed"
        )


def library(module: str, package: str, needed_by: str) -> ModuleType:
    """Import an optional library, or say how to get it.

    Args:
        module: what to import, such as ``'torchmetrics.functional'``.
        package: what ``pip install`` calls it.
        needed_by: who asks, for the message.

    Raises:
        ToMeError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ToMeError(f"{needed_by} needs {error.name}: pip install {package}") from error


def _values(metric: PairedMetric, values: Tensor) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.numel() == 0:
        raise ToMeError(f"{metric.label}: no pictures to take a mean of")
    if values.isnan().any():
        raise ToMeError(f"{metric.label}: {int(values.isnan().sum())} of {len(values)} are NaN")
    return values


def _count_bad(values: Tensor) -> int:
    return int((~values.isfinite()).reshape(len(values), -1).any(1).sum())
