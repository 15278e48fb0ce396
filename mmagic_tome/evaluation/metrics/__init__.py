# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Metrics of pictures, of sets of pictures, and of what they cost.

Pure Python API, without mmengine::

    psnr = build_paired('psnr')
    per_picture = psnr(dense, merged)            # (B, 3, H, W) uint8 each -> (B,) float64
    print(psnr.text(psnr.mean(per_picture)))     # '31.20 dB', or 'identical'

==============  ====================================================================
base.py         the two interfaces, and the checks that all metrics make
pixels.py       PSNR, SSIM, MS-SSIM
==============  ====================================================================

Libraries are imported when a metric is first used, not when this package is.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from ...errors import ToMeError
from .base import PairedMetric, SetMetric
from .pixels import MSSSIM, PSNR, SSIM

__all__ = [
    "MSSSIM",
    "PAIRED",
    "PSNR",
    "SETS",
    "SSIM",
    "PairedMetric",
    "SetMetric",
    "build_paired",
    "build_set",
]

PAIRED: dict[str, type[PairedMetric]] = {cls.name: cls for cls in (PSNR, SSIM, MSSSIM)}

SETS: dict[str, type[SetMetric]] = {}


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
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ToMeError(f"unknown {kind} {name!r}: {hint}Known: {', '.join(known)}")
    takes = list(inspect.signature(known[name]).parameters)
    unknown = sorted(set(options) - set(takes))
    if unknown:
        raise ToMeError(f"{name} does not take {unknown}; its options are {takes}")
    return known[name](**options)
