# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Metrics by name: of pairs of images, of sets of images.

::

    psnr = paired("psnr")
    values = psnr(baseline_images, images)  # (B, 3, H, W) uint8 each -> (B,)
    psnr.text(psnr.mean(values))  # '31.20 dB', or 'identical'

    kid = set_metric("kid")
    kid.compute(kid.features_of(real_images), kid.features_of(images))  # {'kid': ...}

Libraries and weights are looked for when a metric is built, not when this package is imported:
weights in torch hub's folder (``$TORCH_HOME/hub/checkpoints``), or downloaded to there unless
``HF_HUB_OFFLINE=1``.
"""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from unittest import mock

import torch

from ...errors import ToMeError, one_line
from ...validate import did_you_mean
from . import pairs, sets
from .base import Metric, PairedMetric, SetMetric

PAIRED = ("psnr", "ssim", "ms_ssim", "lpips", "latent_error", "efficientnet_lite0_distance")
SETS = ("fid", "kid", "frechet_efficientnet_lite0")
NAMES = (*PAIRED, *SETS)

_HUB_DOWNLOAD = torch.hub.download_url_to_file


def paired(name: str, **options: Any) -> PairedMetric:
    """A metric of :data:`PAIRED`, with options of its function in ``pairs.py``.

    Raises:
        ToMeError: An unknown name or option; a library or weights that are not there.
    """
    return _build(PAIRED, name, options)


def set_metric(name: str, **options: Any) -> SetMetric:
    """A metric of :data:`SETS`, with options of its function in ``sets.py``; as :func:`paired`."""
    return _build(SETS, name, options)


def available(
    names: Iterable[str | Mapping[str, Any]],
    size: tuple[int, int] | None = None,
    count: int | None = None,
) -> tuple[dict[str, Metric], dict[str, str]]:
    """Build metrics, before images are made.

    Args:
        names: Of :data:`NAMES`; one with options is a mapping of ``name`` and these.
        size, count: (height, width) and number of the images of each method; None if not known.

    Returns:
        Name -> metric, and name -> why it is left out, in one line.

    Raises:
        ToMeError: A name or option that no metric has; a name twice.
    """
    metrics, missing = {}, {}
    for entry in names:
        name, options = check_metric(entry)
        if name in metrics or name in missing:
            raise ToMeError(f"metric {name!r} is named twice")
        try:
            metric = _build(NAMES, name, options)
            metric.check(size, count)
            metrics[name] = metric
        except ToMeError as error:
            missing[name] = str(error)
    return metrics, missing


def check_metric(entry: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and the options of a metric as :func:`available` takes it; nothing is loaded.

    Raises:
        ToMeError: A name or option that no metric has.
    """
    options = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = options.pop("name", None)
    _function(NAMES, name, options)
    return name, options


def _build(known: Iterable[str], name: str, options: Mapping[str, Any]) -> Any:
    function = _function(known, name, options)
    try:
        with mock.patch.object(torch.hub, "download_url_to_file", _download):
            return function(**options)
    except ImportError as error:
        needs = f"{error.name}: pip install {error.name}" if error.name else str(error)
        raise ToMeError(f"{name} needs {needs}") from error
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ToMeError(f"{name} cannot be loaded: {one_line(error)}") from error


def _download(url: str, path: str, *args: Any, **kwargs: Any) -> None:
    """torch hub's own, which says where the file belongs if it fails, and heeds the switch."""
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "TRUE", "YES"):
            raise OSError("HF_HUB_OFFLINE forbids downloads")
        _HUB_DOWNLOAD(url, path, *args, **kwargs)
    except (OSError, RuntimeError) as error:
        raise OSError(f"{error}; put {url} at {path}") from error


def _function(known: Iterable[str], name: Any, options: Mapping[str, Any]) -> Callable[..., Any]:
    if name not in known:
        hint = did_you_mean(name, known)
        raise ToMeError(f"unknown metric {name!r}: {hint}known are {', '.join(known)}")
    function = getattr(sets if name in SETS else pairs, name)
    takes = list(inspect.signature(function).parameters)
    for unknown in sorted(set(options) - set(takes)):
        raise ToMeError(f"{name} has no option {unknown!r}; it has {takes}")
    return function
