# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Loops that evaluate a diffusion model: images of the same prompts by several methods, judged.

MMagic's own loops run its Stable Diffusion models with 50 steps whatever the config says, pass
samplers without prompts to FID and Inception Score, and lack what PSNR and SSIM read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.registry import LOOPS
from mmengine.runner.base_loop import BaseLoop
from torch import Tensor

from ...errors import ToMeError
from ...lab.methods import BASELINE, Method, check_names
from ...lab.request import Request
from ...settings import Handles
from .evaluate import sheet
from .subject import (
    Generated,
    generate,
    model_of,
    part_of,
    request_of,
    running,
    undisturbed,
)


class _ImageLoop(BaseLoop):
    """Generates an image, or a clip, for each sample of a data set with prompts.

    Args:
        runner: mmengine's runner, with a diffusion model.
        dataloader: Of samples with a ``prompt``, not shuffled, such as ``ToMePromptDataset``. A
            sample may have a real image, ``gt_img``.
        evaluator: Metrics of MMagic, of this package (``ToMeMetric``), or both.
        methods: What to compare with the baseline: dicts as of
            :meth:`mmagic_tome.lab.methods.Method.from_dict`. Results are then named by method, as
            in ``merged/psnr``. Default: what the config applies (``tome_cfg``, ``cache_cfg``), with
            results such as ``tome/psnr``.
        draw: For how many samples to give the visualizer a sheet of all methods' images and their
            differences. Default: 16.
        **request: Fields of :class:`mmagic_tome.lab.request.Request`, such as ``steps``,
            ``guidance``, ``seed`` and ``controls``; image i has the seed ``seed + i``, whatever
            the batch size and the number of processes. Default: those of ``infer_cfg``.

    What metrics find in a sample, images being (3, H, W), clips (frames, 3, H, W), in 0 ... 255
    and BGR as in MMagic: ``fake_img``, and the same as ``output.pred_img``; ``baseline_img``, the
    baseline's, unless the model is the baseline; ``latents`` and ``baseline_latents``, what they
    were decoded from; ``gt_img``, the real image, if the data set has one; ``prompt``; ``seconds``,
    and ``warm``, whether this was not the first batch.

    Raises:
        ToMeError: No diffusion model; samples without a prompt; ``methods`` next to a ``tome_cfg``
            or ``cache_cfg``; a metric that needs more images or another image than there are.
    """

    mode: str

    def __init__(
        self,
        runner,
        dataloader,
        evaluator,
        methods: Sequence[Mapping[str, Any]] | None = None,
        draw: int = 16,
        **request: Any,
    ) -> None:
        super().__init__(runner, dataloader)
        self.model = model_of(runner, type(self).__name__)
        self.methods = None if methods is None else [Method.from_dict(one) for one in methods]
        if self.methods is not None:
            check_names([BASELINE, *self.methods])
            if Handles.of(self.model):
                raise ToMeError(
                    "the config applies tome_cfg or cache_cfg and its test has methods; write "
                    "everything into methods, or leave methods out"
                )
        self.draw = draw
        count = len(self.dataloader.dataset)
        # Prompts come with the samples.
        self.request = request_of(runner, ["-"] * count, **request)
        names = [None] if methods is None else [BASELINE.name, *(m.name for m in self.methods)]
        self.evaluators = {name: _evaluator(runner, evaluator, name) for name in names}
        for metric in self.evaluators[names[-1]].metrics or ():
            _check_number(metric, count)

    @property
    def evaluator(self):
        """The evaluator of what the config applies, or of the last method."""
        return list(self.evaluators.values())[-1]

    def run(self) -> dict[str, Any]:
        """Generate and judge everything; return the results of the metrics."""
        runner, mode = self.runner, self.mode
        runner.call_hook(f"before_{mode}")
        runner.call_hook(f"before_{mode}_epoch")
        if mode == "test":
            runner.model.eval()
        # A validation must not disturb the training around it.
        with undisturbed(self.model) if mode == "val" else nullcontext(), torch.no_grad():
            metrics = self._evaluate()
        runner.call_hook(f"after_{mode}_epoch", metrics=metrics)
        runner.call_hook(f"after_{mode}")
        return metrics

    def _evaluate(self) -> dict[str, Any]:
        runner, mode = self.runner, self.mode
        for evaluator in self.evaluators.values():
            if hasattr(evaluator, "prepare_metrics"):  # MMagic's; FID reads the real images here
                evaluator.prepare_metrics(self.model, self.dataloader)
        for index, batch in enumerate(self.dataloader):
            runner.call_hook(f"before_{mode}_iter", batch_idx=index, data_batch=batch)
            outputs = self._outputs(index, batch)
            for name, evaluator in self.evaluators.items():
                # To all metrics at once, without the samplers of MMagic's evaluator.
                metrics = [evaluator.metrics] if hasattr(evaluator, "prepare_metrics") else []
                evaluator.process(outputs[name], batch, *metrics)
            last = outputs[list(outputs)[-1]]
            runner.call_hook(f"after_{mode}_iter", batch_idx=index, data_batch=batch, outputs=last)
        results = {}
        for name, evaluator in self.evaluators.items():
            if not evaluator.metrics:
                continue
            size = [] if hasattr(evaluator, "prepare_metrics") else [len(self.dataloader.dataset)]
            for key, value in evaluator.evaluate(*size).items():
                results[key if name is None else f"{name}/{key.removeprefix('tome/')}"] = value
        return results

    def _outputs(self, index: int, batch: Any) -> dict[str | None, list]:
        """Samples with images of each method, by its name; None for what the config applies."""
        samples = batch["data_samples"]
        # As mmengine's DefaultSampler deals them out; a last round that it fills up repeats.
        first, count = index * self.dataloader.batch_size, len(self.request)
        numbers = [
            ((first + i) * get_world_size() + get_rank()) % count for i in range(len(samples))
        ]
        for number, sample in zip(numbers, samples):
            if not isinstance(sample.get("prompt"), str):
                raise ToMeError(
                    f"{type(self).__name__}: sample {number} has no prompt; use "
                    "dict(type='ToMePromptDataset', prompts=[...]) or another set of prompts"
                )
        request = part_of(self.request, numbers, [sample.prompt for sample in samples])
        images = self._images(request, first=index == 0)
        baseline = images.get(BASELINE.name)
        others = {name: one for name, one in images.items() if name != BASELINE.name}
        for i, number in enumerate(numbers):
            if number < self.draw and baseline is not None and others:
                drawn = sheet(baseline.images[i], [one.images[i] for one in others.values()])
                self.runner.visualizer.add_image(f"{self.mode}_{number:04d}", drawn)
        if self.methods is None:
            others = others or {None: baseline}
            images = {None: next(iter(others.values()))}
        return {
            name: [
                self._sample(name, i, sample, made, baseline if others else None, index > 0)
                for i, sample in enumerate(samples)
            ]
            for name, made in images.items()
        }

    def _images(self, request: Request, first: bool) -> dict[str, Generated]:
        """Images by the name of their method, the baseline's first."""
        model, handles = self.model, Handles.of(self.model)
        with handles.disabled(), running(BASELINE.name):
            images = {BASELINE.name: generate(model, request)}
        if self.methods is None and handles:
            images["applied"] = generate(model, request)
        for method in self.methods or ():
            with method.on(model) as applied, running(method.name):
                images[method.name] = generate(model, request, method.steps)
                if first:
                    for handle in applied:
                        self.runner.logger.info(f"{method.name}: {handle.summary()}")
        return images

    def _sample(self, name, i, sample, made: Generated, baseline: Generated | None, warm: bool):
        from mmagic.structures import DataSample

        image = _bgr(made.images[i])
        output = DataSample(fake_img=image, output=DataSample(pred_img=image), prompt=sample.prompt)
        output.set_field(made.seconds, "seconds")
        output.set_field(warm, "warm")
        if made.latents is not None:
            output.latents = made.latents[i]
        if baseline is not None and made is not baseline:
            output.baseline_img = _bgr(baseline.images[i])
            if baseline.latents is not None:
                output.baseline_latents = baseline.latents[i]
        real = sample.get("gt_img")
        if real is not None:
            # MMagic's reader of images notes if it read another order.
            rgb = str(sample.get("gt_channel_order") or "bgr").lower() == "rgb"
            output.gt_img = _bgr(real) if rgb else real.float()
        for metric in self.evaluators[name].metrics or ():
            key = getattr(metric, "gt_key", None)
            if key is not None and key not in output:
                kind = type(metric).__name__
                raise ToMeError(
                    f"{kind} compares with {key}, which the samples do not have; write dict(type="
                    f"'{kind}', gt_key='baseline_img') to compare with the baseline, in a config "
                    "with tome_cfg, cache_cfg or methods"
                )
        return output


@LOOPS.register_module()
class ToMeTestLoop(_ImageLoop):
    __doc__ = _ImageLoop.__doc__
    mode = "test"


@LOOPS.register_module()
class ToMeValLoop(_ImageLoop):
    __doc__ = _ImageLoop.__doc__
    mode = "val"


def _evaluator(runner, evaluator: Any, method: str | None):
    """An evaluator of a config, MMagic's by default: mmengine's cannot run its metrics."""
    evaluator = copy.deepcopy(evaluator)
    if isinstance(evaluator, dict) and "metrics" not in evaluator:
        evaluator = [evaluator]
    if isinstance(evaluator, list):
        evaluator = {"metrics": evaluator}
    if isinstance(evaluator, dict):
        evaluator = runner.build_evaluator({"type": "mmagic.Evaluator", **evaluator})
    if method == BASELINE.name:
        evaluator.metrics = [
            metric
            for metric in evaluator.metrics or ()
            if not getattr(metric, "needs_baseline", False)
            and getattr(metric, "gt_key", None) != "baseline_img"
        ]
    return evaluator


def _check_number(metric, count: int) -> None:
    """Metrics of MMagic would stop short, or never start, without an error."""
    name = type(metric).__name__
    wanted = getattr(metric, "fake_nums", None)
    if wanted is None:
        return
    if wanted < 1:
        raise ToMeError(f"{name} has fake_nums={wanted}, which reads no image; write {count}")
    if wanted > count:
        raise ToMeError(f"{name} wants fake_nums={wanted} images, and there are {count} prompts")


def _bgr(images: Tensor) -> Tensor:
    """(..., 3, H, W) RGB <-> BGR."""
    return images.flip(-3).float()
