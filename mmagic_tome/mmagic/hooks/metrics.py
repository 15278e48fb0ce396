# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``ToMeMetric``: the metrics of :mod:`mmagic_tome.lab.metrics` in evaluators.

::

    test_evaluator = [
        dict(type='ToMeMetric', metric='psnr'),
        dict(type='ToMeMetric', metric='lpips', net='vgg'),
        dict(type='ToMeMetric', metric='fid', against='real'),
        dict(type='ToMeSeconds'),
    ]

They read the samples of ``ToMeTestLoop`` and ``ToMeValLoop``.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from torch import Tensor

from ...errors import ToMeError
from ...lab.metrics import available
from ...lab.metrics.base import PairedMetric, TextMetric

_REFERENCES = {"baseline": "baseline_img", "real": "gt_img"}


class _SampleMetric(BaseMetric):
    """What evaluators of mmengine and MMagic ask of a metric; results are named ``tome/...``."""

    default_prefix = "tome"
    SAMPLER_MODE = "normal"
    sample_model = "orig"
    #: Whether it compares with the baseline, and so has no value for the baseline itself.
    needs_baseline = False

    def prepare(self, module, dataloader) -> None:
        """Called by MMagic's evaluator before a run."""
        self.size = len(dataloader.dataset)

    def get_metric_sampler(self, model, dataloader, metrics):
        """Called by MMagic's evaluator: which images to judge."""
        return dataloader

    def evaluate(self, size: int | None = None) -> dict[str, float]:
        """Results by name; ``size`` is that of the data set (MMagic's evaluator has it not)."""
        return super().evaluate(self.size if size is None else size)


@METRICS.register_module()
class ToMeMetric(_SampleMetric):
    """A metric by name, over all images, or all frames of all clips.

    Args:
        metric: One of :data:`mmagic_tome.lab.metrics.NAMES`.
        against: What images are compared with: ``'baseline'`` (default), those of the same prompts
            and seeds without merging and caching; ``'real'``, ``gt_img`` of the samples. Results
            of the latter are named ``fid_to_real``.
        device: Where networks of metrics run. Default: ``'cpu'``.
        collect_device, prefix: As in mmengine's ``BaseMetric``.
        **options: Of the metric.

    Raises:
        ToMeError: An unknown metric or option; weights or a library that are missing; samples
            without what it reads.
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
        if against not in _REFERENCES:
            raise ToMeError(f"against={against!r} of ToMeMetric: write 'baseline' or 'real'")
        found, missing = available([{"name": metric, **options}])
        if missing:
            raise ToMeError(missing[metric])
        self.metric, self.against, self.device = found[metric], against, device
        compares = getattr(self.metric, "needs_base", not isinstance(self.metric, TextMetric))
        self.reference = _REFERENCES[against] if compares else None
        self.needs_baseline = self.reference == "baseline_img"
        if getattr(self.metric, "of", "images") == "latents":
            self.reference = "baseline_latents"

    def process(self, data_batch, data_samples) -> None:
        """Judge samples, one result each."""
        for sample in data_samples:
            if self.reference and sample.get(self.reference) is None:
                raise ToMeError(
                    f"{self.metric.label} compares with {self.reference}, which the samples do not "
                    "have; use test_cfg=dict(type='ToMeTestLoop') with tome_cfg, cache_cfg or "
                    "methods, or images=FOLDER of ToMePromptDataset for against='real'"
                )
            if isinstance(self.metric, TextMetric):
                images = _frames(sample["fake_img"]).to(self.device)
                result = self.metric(images, [sample["prompt"]] * len(images))
            elif not isinstance(self.metric, PairedMetric):
                reference = self.reference and self._features(sample, self.reference)
                result = (reference, self._features(sample, "fake_img"))
            elif self.metric.of == "latents":
                result = self.metric(sample[self.reference][None], sample["latents"][None])
            else:
                pair = (_frames(sample[key]) for key in (self.reference, "fake_img"))
                result = self.metric(*(images.to(self.device) for images in pair))
            self.results.append(result)

    def _features(self, sample: dict[str, Any], key: str) -> dict[str, Tensor]:
        """Features of an image, made once for all metrics that share them."""
        known = sample.setdefault("features", {})
        place = (self.metric.feature_key, key)
        if place not in known:
            known[place] = self.metric.features_of(_frames(sample[key]), self.device)
        return known[place]

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """The value over all samples by name; metrics of sets may have several."""
        if isinstance(self.metric, (PairedMetric, TextMetric)):
            values = {self.metric.name: self.metric.mean(torch.cat(results))}
        else:
            base, other = zip(*results)
            values = self.metric.compute(_joined(base) if self.reference else None, _joined(other))
        ending = "_to_real" if self.reference == "gt_img" else ""
        return {f"{name}{ending}": value for name, value in values.items()}


@METRICS.register_module()
class ToMeSeconds(_SampleMetric):
    """Median seconds of an image, without the first batch, which warms up.

    A speed-up with an interval needs interleaved rounds: ``python -m mmagic_tome evaluate``.
    """

    def process(self, data_batch, data_samples) -> None:
        """Note the seconds of samples."""
        self.results += [(sample["warm"], sample["seconds"]) for sample in data_samples]

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """``seconds``: of a warm image, or of the first if there is only one batch."""
        seconds = [one for warm, one in results if warm] or [one for _, one in results]
        return {"seconds": statistics.median(seconds)}


def _joined(rows: tuple[dict[str, Tensor], ...]) -> dict[str, Tensor]:
    """Features of many images, layer by layer."""
    return {layer: torch.cat([row[layer] for row in rows]) for layer in rows[0]}


def _frames(image: Tensor) -> Tensor:
    """An image (3, H, W) or clip (frames, 3, H, W) of MMagic, BGR in 0 ... 255, as uint8 RGB of
    four dimensions."""
    if not image.isfinite().all():
        raise ToMeError("an image has values that are not finite; the model's output is broken")
    frames = image if image.ndim == 4 else image[None]
    return frames.detach().cpu().flip(1).round().clamp(0, 255).to(torch.uint8)
