# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Metrics of :mod:`mmagic_tome.lab.metrics` in the evaluators of ``ToMeTestLoop``."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from torch import Tensor

from ...errors import ToMeError
from ...lab.metrics import available
from ...lab.metrics.base import SetMetric

#: Keys of the baseline in a sample.
BASELINE_KEYS = ("baseline_img", "baseline_latents")


class _SampleMetric(BaseMetric):
    """What MMagic's evaluator needs besides: the number of samples."""

    default_prefix = "tome"

    def prepare(self, module, dataloader) -> None:
        self.size = len(dataloader.dataset)

    def evaluate(self, size: int | None = None) -> dict[str, float]:
        return super().evaluate(size or self.size)


@METRICS.register_module()
class ToMeMetric(_SampleMetric):
    """A metric by name, over all images, or all frames of all clips.

    Args:
        metric: One of :data:`mmagic_tome.lab.metrics.NAMES`.
        against: What images are compared with: ``'baseline'``, the same prompts and seeds without
            merging and caching; or ``'real'``, ``gt_img`` of the samples. Default: 'baseline'.
        device: Where networks of metrics run. Default: 'cpu'.
        collect_device, prefix: As in mmengine's ``BaseMetric``.
        **options: Of the metric.

    Raises:
        ToMeError: An unknown metric or option; missing weights or libraries; samples without what
            it reads.
    """

    def __init__(
        self,
        metric: str,
        against: str = "baseline",
        device: str = "cpu",
        collect_device: str = "cpu",
        prefix: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(collect_device, prefix)
        if against not in ("baseline", "real"):
            raise ToMeError(f"against={against!r} of ToMeMetric: write 'baseline' or 'real'")
        found, missing = available([{"name": metric, **options}])
        if missing:
            raise ToMeError(missing[metric])
        self.metric, self.device = found[metric], device
        #: Key in a sample of what images are compared with.
        self.reference = "baseline_img" if against == "baseline" else "gt_img"
        if self.metric.of == "latents":
            self.reference = "baseline_latents"

    def process(self, data_batch, data_samples) -> None:
        for sample in data_samples:
            if sample.get(self.reference) is None:
                raise ToMeError(
                    f"{self.metric.label} compares with {self.reference}, which the samples do not "
                    "have; use ToMeTestLoop, or ToMePromptDataset(images=FOLDER) for real images"
                )
            keys = (self.reference, "fake_img")
            if isinstance(self.metric, SetMetric):
                result = [self._features(sample, key) for key in keys]
            elif self.metric.of == "latents":
                result = self.metric(sample["baseline_latents"][None], sample["latents"][None])
            else:
                result = self.metric(*(_frames(sample[key]).to(self.device) for key in keys))
            self.results.append(result)

    def _features(self, sample: dict[str, Any], key: str) -> Tensor:
        """Features of an image, made once for all metrics that share them."""
        known = sample.setdefault("features", {})
        place = (self.metric.extract, key)
        if place not in known:
            known[place] = self.metric.features_of(_frames(sample[key]), self.device)
        return known[place]

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        if isinstance(self.metric, SetMetric):
            return self.metric.compute(*map(torch.cat, zip(*results)))
        return {self.metric.name: self.metric.mean(torch.cat(results))}


@METRICS.register_module()
class ToMeSeconds(_SampleMetric):
    """Median seconds of an image, without the first batch (which warms up) if there are others.

    A speed-up with an interval needs interleaved rounds: ``python -m mmagic_tome evaluate``.
    """

    def process(self, data_batch, data_samples) -> None:
        self.results += [(sample["warm"], sample["seconds"]) for sample in data_samples]

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        warm = [seconds for is_warm, seconds in results if is_warm]
        return {"seconds": statistics.median(warm or [seconds for _, seconds in results])}


def _frames(image: Tensor) -> Tensor:
    """(3, H, W) or (frames, 3, H, W), BGR in 0 ... 255 -> (1 or frames, 3, H, W) uint8 RGB."""
    if not image.isfinite().all():
        raise ToMeError("an image has values that are not finite; the model's output is broken")
    frames = image if image.ndim == 4 else image[None]
    return frames.detach().cpu().flip(1).round().clamp(0, 255).to(torch.uint8)
