# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The metrics of :mod:`mmagic_tome.evaluation.metrics` in evaluators of mmengine and MMagic.

Each has a type of its own, ``ToMe`` and the name of its class, and takes its options::

    test_evaluator = [
        dict(type='ToMePSNR'),
        dict(type='ToMeLPIPS', net='vgg'),
        dict(type='ToMeFID', weights='inception.pth'),
        dict(type='ToMeCLIPScore', model='clip-vit-large-patch14'),
    ]

They read the samples of ``ToMeTestLoop`` and ``ToMeValLoop``; those of a set also read those of
MMagic's loops.
"""

from __future__ import annotations

from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from torch import Tensor

from ...errors import ToMeError
from ...evaluation.metrics import PAIRED, SETS


class _Adapter(BaseMetric):
    """What both kinds share; ``cls`` is the metric's class.

    Args:
        collect_device, prefix: as of mmengine's ``BaseMetric``. Default: ``'cpu'``; ``'tome'``,
            so that results are ``tome/psnr`` and do not collide with MMagic's.
        **options: of the metric.
    """

    default_prefix = "tome"
    cls: type
    # What MMagic's evaluator asks of a metric.
    SAMPLER_MODE = "normal"
    sample_model = "orig"

    def __init__(
        self, collect_device: str = "cpu", prefix: str | None = None, **options: Any
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.metric = self.build(**options)

    def build(self, **options: Any) -> Any:
        raise NotImplementedError

    def prepare(self, module, dataloader) -> None:
        """Called by MMagic's evaluator before a run."""
        self.size = len(dataloader.dataset)

    def get_metric_sampler(self, model, dataloader, metrics):
        """Called by MMagic's evaluator: the pictures of the data loader's samples."""
        return dataloader

    def evaluate(self, size: int | None = None) -> dict[str, float]:
        """Results by name; ``size`` is that of the data set (MMagic's evaluator gives none)."""
        return super().evaluate(self.size if size is None else size)


class _PairedAdapter(_Adapter):
    def build(self, **options):
        from ...evaluation.metrics import build_paired

        return build_paired(self.cls.name, **options)

    def process(self, data_batch, data_samples) -> None:
        for sample in data_samples:
            if sample.get("dense_img") is None:
                raise ToMeError(
                    f"{self.metric.label} compares with the dense picture, which is not there; use "
                    "test_cfg=dict(type='ToMeTestLoop') and a config with tome_cfg"
                )
            if self.metric.of == "latents":
                pair = [sample.get(key) for key in ("dense_latents", "latents")]
                if pair[0] is None or pair[1] is None:
                    raise ToMeError(
                        f"{self.metric.label} compares the final latents, which this model does "
                        "not show; leave it out"
                    )
            else:
                pair = [_rgb(sample[key]) for key in ("dense_img", "fake_img")]
            self.results.append(float(self.metric(pair[0][None], pair[1][None])))

    def compute_metrics(self, results):
        return {self.metric.name: self.metric.mean(torch.tensor(results, dtype=torch.float64))}


class _SetAdapter(_Adapter):
    """See :class:`_Adapter`; of the reference set is also ``against``.

    Args:
        against: ``'real'`` (``gt_img`` of the samples) or ``'dense'`` (the same prompts without
            merging). Default: ``'real'``. Results against the dense set are named
            ``fid_to_dense``.
    """

    def __init__(self, against: str = "real", **options: Any) -> None:
        if against not in ("real", "dense"):
            raise ToMeError(f"against={against!r} of {self.cls.name}: write 'real' or 'dense'")
        super().__init__(**options)
        self.against = against

    def build(self, **options):
        from ...evaluation.metrics import build_set

        return build_set(self.cls.name, **options)

    def process(self, data_batch, data_samples) -> None:
        for sample in data_samples:
            prompts = [sample.get("prompt")] if self.metric.needs_prompts else None
            row = self.metric.features(_rgb(sample["fake_img"])[None], prompts)[0]
            reference = None
            if self.metric.needs_real:
                key = "gt_img" if self.against == "real" else "dense_img"
                if sample.get(key) is None:
                    raise ToMeError(
                        f"{self.metric.label} compares with {self.against} pictures, and the "
                        f"samples have no {key}; "
                        + (
                            "give the data set real pictures, or write against='dense'"
                            if self.against == "real"
                            else "use ToMeTestLoop and a config with tome_cfg"
                        )
                    )
                reference = self.metric.features(_rgb(sample[key])[None])[0].numpy()
            self.results.append((row.numpy(), reference))

    def compute_metrics(self, results):
        rows, references = zip(*results)
        features = torch.stack([torch.from_numpy(row) for row in rows])
        reference = None
        if self.metric.needs_real:
            reference = torch.stack([torch.from_numpy(row) for row in references])
        values = self.metric.compute(features, reference)
        ending = "_to_dense" if reference is not None and self.against == "dense" else ""
        return {f"{name}{ending}": value for name, value in values.items()}


def _rgb(picture: Tensor) -> Tensor:
    """(3, H, W) in 0 ... 255, BGR as MMagic's -> uint8 RGB."""
    if not picture.isfinite().all():
        raise ToMeError("a picture has values that are not finite; the model's output is broken")
    return picture.detach().cpu().flip(0).round().clamp(0, 255).to(torch.uint8)


def _adapt(base: type, cls: type) -> type:
    name = f"ToMe{cls.__name__}"
    return type(name, (base,), {"cls": cls, "__doc__": cls.__doc__, "__module__": __name__})


ADAPTERS = {
    adapter.__name__: adapter
    for base, classes in ((_PairedAdapter, PAIRED), (_SetAdapter, SETS))
    for adapter in (_adapt(base, cls) for cls in classes.values())
}
globals().update(ADAPTERS)  # to be found by pickle

for _adapter in ADAPTERS.values():
    METRICS.register_module(module=_adapter)


def register_in_mmagic() -> None:
    """Put them into MMagic's METRICS too, beside its own."""
    from mmagic.registry import METRICS as MMAGIC

    for adapter in ADAPTERS.values():
        MMAGIC.register_module(module=adapter, force=True)
