# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Metrics over the images of a run's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import ToMeError
from .methods import BASELINE, Method
from .metrics.base import Metric, SetMetric
from .progress import progress_bar
from .ranks import share
from .real import RealImages
from .results import RunFolder
from .runners.media import to_tensor

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
    """Add the values of paired metrics that a folder lacks; None where an image is not finite."""
    rows = image_rows(folder)
    done = {(row["method"], row["number"], row["metric"]) for row in folder.find(kind="metric")}
    asked = {method.name for method in methods} - {BASELINE.name}
    paired = [name for name, metric in metrics.items() if not isinstance(metric, SetMetric)]
    work = []
    for method, number in rows:
        names = [name for name in paired if (method, number, name) not in done]
        if method in asked and names:
            work.append((method, number, names))
    mine = share(work)
    with progress_bar(len(mine), "measuring", "image", progress) as bar:
        for method, number, names in mine:
            bar.set_postfix_str(method)
            row, base = rows[method, number], rows[BASELINE.name, number]
            known = {"kind": "metric", "method": method, "number": number}
            values = {name: _value(folder, metrics[name], base, row, device) for name in names}
            folder.add(*({**known, "metric": name, "value": x} for name, x in values.items()))
            bar.update()


def _value(
    folder: RunFolder, metric: Metric, base: dict, row: dict, device: torch.device
) -> float | None:
    if not (row["finite"] and base["finite"]):
        return None
    if metric.of == "latents":
        values = metric(_latents(folder, base), _latents(folder, row))
    else:
        values = metric(*(_pixels(folder, one).to(device) for one in (base, row)))
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
    """Add the values of sets of images that a folder lacks, compared with real images, which are
    brought to a (height, width), or with the baseline's. Images that are not finite are in no set.
    """
    sets = {name: metric for name, metric in metrics.items() if isinstance(metric, SetMetric)}
    done = {(row["method"], row["metric"]) for row in folder.find(kind="metric", number=None)}
    work = []
    for method in methods:
        names = [name for name in sets if (method.name, name) not in done]
        if names and (real is not None or method.name != BASELINE.name):
            work.append((method.name, names))
    mine, base = share(work), {}
    rows = image_rows(folder)
    with progress_bar(len(mine) + 1, "measuring sets", "set", progress) as bar:
        for method, names in mine:
            if not base:
                bar.set_postfix_str("what they are compared with")
                images = _finite(folder, rows, BASELINE.name)
                if real is not None:
                    images = (real.read(number, size) for number in range(len(real)))
                base = _features(sets.values(), images, device)
            bar.set_postfix_str(method)
            chosen = {name: sets[name] for name in names}
            found = _features(chosen.values(), _finite(folder, rows, method), device)
            for name, metric in chosen.items():
                values = metric.compute(base[metric.extract], found[metric.extract])
                value, *others = values.items()
                row = {"kind": "metric", "method": method, "metric": name, "number": None}
                against = "real images" if real else "baseline"
                folder.add({**row, "value": value[1], "others": dict(others), "against": against})
            bar.update()


def _finite(folder: RunFolder, rows: Rows, method: str) -> Iterator[Tensor]:
    """The finite images of a method; of clips all frames."""
    for (name, _), row in rows.items():
        if name == method and row["finite"]:
            yield _pixels(folder, row)


def _features(
    metrics: Iterable[SetMetric], images: Iterable[Tensor], device: torch.device
) -> dict[Callable, Tensor]:
    """What extracts features -> these of all images, (N, D)."""
    different = {metric.extract: metric for metric in metrics}
    parts = [[one.features_of(image, device) for one in different.values()] for image in images]
    return dict(zip(different, map(torch.cat, zip(*parts))))


def read_frames(folder: RunFolder, row: Mapping[str, Any]) -> list[Image.Image]:
    """The image of a row, or the frames of its clip, without loss."""
    path, count = folder.path / row.get("strip", row["file"]), row.get("frames", 1)
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, ValueError) as error:
        raise ToMeError(f"cannot read {path}: {error}; start without --resume") from None
    height = image.height // count
    return [image.crop((0, n * height, image.width, (n + 1) * height)) for n in range(count)]


def _pixels(folder: RunFolder, row: Mapping[str, Any]) -> Tensor:
    """The image of a row, (1, 3, H, W) uint8; of a clip (frames, 3, H, W)."""
    return to_tensor(read_frames(folder, row))


def _latents(folder: RunFolder, row: Mapping[str, Any]) -> Tensor:
    """The final latents (1, ...) of a row's image."""
    return torch.load(folder.path / row["latents"], weights_only=True)[None]
