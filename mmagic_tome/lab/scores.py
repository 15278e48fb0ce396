# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Metrics over the images of a run's folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .images import read_image, read_latents
from .methods import BASELINE, Method
from .metrics import set_features
from .metrics.base import Metric, PairedMetric, SetMetric
from .progress import progress_bar
from .ranks import share
from .real import RealImages
from .results import RunFolder

Features = dict[str, dict[str, Tensor]]
Rows = Mapping[tuple[str, int], dict[str, Any]]


def image_rows(folder: RunFolder) -> Rows:
    """(Name of the method, number) -> row of the image, the last one if there are several."""
    return {(row["method"], row["number"]): row for row in folder.find(kind="image")}


def measure_images(
    folder: RunFolder,
    methods: Sequence[Method],
    metrics: Mapping[str, Metric],
    device: torch.device,
    progress: bool = True,
) -> None:
    """Add the values of single images that a folder lacks: of paired and of text metrics.

    The value of an image that is not finite is None.

    Args:
        folder: With all images.
        methods: Whose images, the baseline's among them.
        metrics: By name; those of sets are passed over.
        device: Where to compute.
        progress: Whether to show a bar.
    """
    rows = image_rows(folder)
    done = {(row["method"], row["number"], row["metric"]) for row in folder.find(kind="metric")}
    work = []
    for method in methods:
        baseline = method.name == BASELINE.name
        wanted = [
            name
            for name, metric in metrics.items()
            if not isinstance(metric, SetMetric)
            and not (baseline and isinstance(metric, PairedMetric))
        ]
        for number in (number for name, number in rows if name == method.name):
            names = [name for name in wanted if (method.name, number, name) not in done]
            if names:
                work.append((method.name, number, names))
    mine = share(work)
    with progress_bar(len(mine), "measuring", "image", progress) as bar:
        for method, number, names in mine:
            bar.set_postfix_str(method)
            row, base = rows[method, number], rows[BASELINE.name, number]
            folder.add(
                *(
                    {
                        "kind": "metric",
                        "method": method,
                        "metric": name,
                        "number": number,
                        "value": _value(folder, metrics[name], base, row, device),
                    }
                    for name in names
                )
            )
            bar.update()


def _value(
    folder: RunFolder, metric: Metric, base: dict, row: dict, device: torch.device
) -> float | None:
    paired = isinstance(metric, PairedMetric)
    if not row["finite"] or (paired and not base["finite"]):
        return None
    if metric.of == "latents":
        values = metric(read_latents(folder, base), read_latents(folder, row))
    elif paired:
        values = metric(read_image(folder, base).to(device), read_image(folder, row).to(device))
    else:
        images = read_image(folder, row).to(device)
        values = metric(images, [row["prompt"]] * len(images))
    # A clip has a value per frame.
    return float(values[0]) if len(values) == 1 else metric.mean(values)


def measure_sets(
    folder: RunFolder,
    methods: Sequence[Method],
    metrics: Mapping[str, Metric],
    device: torch.device,
    real: RealImages | None = None,
    size: tuple[int, int] | None = None,
    progress: bool = True,
) -> None:
    """Add the values of sets of images that a folder lacks.

    Every image goes once through each network, however many metrics share its features. Images
    that are not finite are in no set.

    Args:
        folder, methods, metrics, device, progress: See :func:`measure_images`.
        real: What the sets are compared with. Default: None, the baseline's images.
        size: (height, width) that real images are brought to.
    """
    sets = {name: metric for name, metric in metrics.items() if isinstance(metric, SetMetric)}
    compared = [metric for metric in sets.values() if metric.needs_base]
    done = {(row["method"], row["metric"]) for row in folder.find(kind="metric", number=None)}
    work = []
    for method in methods:
        # Without real images the baseline's are what the others are compared with.
        alone = method.name == BASELINE.name and real is None
        names = [name for name, metric in sets.items() if not (alone and metric.needs_base)]
        names = [name for name in names if (method.name, name) not in done]
        if names:
            work.append((method.name, names))
    mine, base = share(work), None
    rows = image_rows(folder)
    with progress_bar(len(mine) + 1, "measuring sets", "set", progress) as bar:
        for method, names in mine:
            if base is None and compared:
                bar.set_postfix_str("what they are compared with")
                images = _finite(folder, rows, BASELINE.name)
                if real is not None:
                    images = (real.read(number, size) for number in range(len(real)))
                base = _features(compared, images, device)
            bar.set_postfix_str(method)
            found = _features([sets[name] for name in names], _finite(folder, rows, method), device)
            for name in names:
                key, needs_base = sets[name].feature_key, sets[name].needs_base
                values = sets[name].compute(base[key] if needs_base else None, found[key])
                first, *others = values
                folder.add(
                    {
                        "kind": "metric",
                        "method": method,
                        "metric": name,
                        "number": None,
                        "value": values[first],
                        "others": {other: values[other] for other in others},
                        "against": ("real images" if real else "baseline") if needs_base else None,
                    }
                )
            bar.update()


def _finite(folder: RunFolder, rows: Rows, method: str) -> Iterator[Tensor]:
    """The finite images of a method; of clips all frames."""
    for (name, _), row in rows.items():
        if name == method and row["finite"]:
            yield read_image(folder, row)


def _features(
    metrics: Sequence[SetMetric], images: Iterable[Tensor], device: torch.device
) -> Features:
    """Key -> layer -> features (images, D)."""
    parts = [set_features(metrics, image, device) for image in images]
    return {
        key: {layer: torch.cat([part[key][layer] for part in parts]) for layer in layers}
        for key, layers in parts[0].items()
    }
