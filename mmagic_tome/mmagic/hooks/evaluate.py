# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``ToMeEvalHook``: the same prompts with the baseline and with what is applied, compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor

from ...errors import ToMeError
from ...lab.metrics import available
from ...settings import Handles
from .subject import generate, model_of, part_of, request_of, running, undisturbed


@HOOKS.register_module()
class ToMeEvalHook(Hook):
    """Generates images with and without what is applied, and measures how far they are apart.

    At the end of test and validation, and every ``interval`` training iterations. Each prompt
    yields one sheet of the baseline's image, the other and their amplified difference for the
    visualizer; the metrics go to the log and, as scalars, to the visualizer. Weights and random
    numbers do not change.

    Args:
        prompts: One image each.
        interval: Training iterations between evaluations. Default: None, not in training (but at
            its validations).
        metrics: Names of :data:`mmagic_tome.lab.metrics.PAIRED`, or dicts of a name and options,
            as in ``dict(name='lpips', net='vgg')``. Default: PSNR and SSIM.
        **request: Fields of :class:`mmagic_tome.lab.request.Request`, such as ``seed`` (a number,
            or a list of one for each prompt), ``steps``, ``guidance``, ``size``, ``controls``.
            Default: those of ``infer_cfg`` of the config.

    Raises:
        ToMeError: When built: no prompts, an unknown metric, missing weights. At the start of the
            run: no diffusion model, nothing applied to it.

    Priority NORMAL: after ``ToMeHook`` sets the ratio, before the logger writes.
    """

    priority = "NORMAL"

    def __init__(
        self,
        prompts: Sequence[str],
        interval: int | None = None,
        metrics: Sequence[str | Mapping[str, Any]] = ("psnr", "ssim"),
        **request: Any,
    ) -> None:
        if isinstance(prompts, str) or not prompts:
            raise ToMeError(f"prompts of ToMeEvalHook: write a list of them, got {prompts!r}")
        if interval is not None and (not isinstance(interval, int) or interval < 1):
            raise ToMeError(f"interval={interval!r} of ToMeEvalHook: write 1 or more, or None")
        self.prompts, self.interval, self.request = list(prompts), interval, request
        found, missing = available(metrics)
        for reason in missing.values():
            raise ToMeError(f"metrics of ToMeEvalHook: {reason}")
        self.metrics = list(found.values())

    def before_run(self, runner) -> None:
        if not Handles.of(model_of(runner, "ToMeEvalHook")):
            raise ToMeError(
                "ToMeEvalHook has nothing to compare: nothing is applied to the runner's model; "
                "write tome_cfg=dict(ratio=0.5) or cache_cfg='balanced' at the top level of the "
                "config"
            )

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if self.interval is not None and self.every_n_train_iters(runner, self.interval):
            self.evaluate(runner, "train", runner.iter + 1)

    def after_val_epoch(self, runner, metrics=None) -> None:
        self.evaluate(runner, "val", runner.iter)

    def after_test_epoch(self, runner, metrics=None) -> None:
        self.evaluate(runner, "test", runner.iter)

    @master_only
    def evaluate(self, runner, mode: str, step: int) -> dict[str, float]:
        """Generate, compare, log; return the mean of each metric by name."""
        model = model_of(runner, "ToMeEvalHook")
        handles = Handles.of(model)
        request = request_of(runner, self.prompts, **self.request)
        values: dict[str, list[Tensor]] = {metric.name: [] for metric in self.metrics}
        for number, prompt in enumerate(request.prompts):
            part = part_of(request, [number], [prompt])
            with undisturbed(model), running(""):
                with handles.disabled():
                    base = generate(model, part)
                other = generate(model, part)
            for metric in self.metrics:
                if metric.of == "latents":
                    pair = (base.latents, other.latents)
                else:  # of a clip its frames
                    pair = (one.images.reshape(-1, *one.images.shape[-3:]) for one in (base, other))
                values[metric.name].append(metric(*pair))
            image = sheet(base.images[0], [other.images[0]])
            runner.visualizer.add_image(f"tome_{mode}_{number:03d}", image, step=step)
        means = {
            metric.name: metric.mean(torch.cat(values[metric.name])) for metric in self.metrics
        }
        found = ", ".join(f"{m.label} {m.text(means[m.name])}" for m in self.metrics)
        runner.logger.info(
            f"{mode} at iteration {step}: {handles.description}, against the baseline over "
            f"{len(request)} prompts: {found}"
        )
        # An infinite PSNR (identical images) breaks the files of some backends.
        scalars = {f"tome_{mode}/{key}": x for key, x in means.items() if math.isfinite(x)}
        if scalars:
            runner.visualizer.add_scalars(scalars, step=step)
        return means


def sheet(baseline: Tensor, others: Sequence[Tensor]) -> np.ndarray:
    """Images side by side, the baseline's first, and below each its difference to that one.

    Args:
        baseline: (3, H, W) uint8; of a clip (frames, 3, H, W), its first frame is shown.
        others: Of the same shape.

    Returns:
        (2 H, W * (1 + len(others)), 3) uint8. Differences are amplified by one factor, so that the
        largest of all is white.
    """
    images = [one if one.ndim == 3 else one[0] for one in (baseline, *others)]
    differences = [(one.int() - images[0].int()).abs() for one in images]
    largest = max(int(one.max()) for one in differences) or 1
    rows = [torch.cat(images, 2), torch.cat(differences, 2) * 255 // largest]
    return torch.cat(rows, 1).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
