# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``ToMeEvalHook``: the same prompts dense and merged, side by side, with metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor, nn

from ...errors import ToMeError
from ...settings import Handles
from .subject import aside, model_of, request_of, undisturbed


@HOOKS.register_module()
class ToMeEvalHook(Hook):
    """Generates pictures with and without what is applied, and says how far they are apart.

    At the end of test and validation, and every ``interval`` training iterations. Of each prompt,
    dense, merged and amplified difference go as one picture to every backend of the visualizer;
    the metrics go to the log and, as scalars, to the visualizer. Neither the weights nor
    anybody's random numbers change.

    Args:
        prompts: one picture each.
        seeds: one number (picture i has ``seeds + i``), or a list of one for each prompt.
            Default: 0.
        interval: training iterations between evaluations. Default: None, not in training (but
            at the validations in between).
        metrics: names in :data:`mmagic_tome.evaluation.metrics.PAIRED`, or dicts of a name and
            options, as ``dict(name='lpips', weights='alexnet.pth')``. Default: PSNR and SSIM.
        steps, guidance, size: of generating; size is (height, width) in pixels. Default: those
            of ``infer_cfg`` of the config, else 50, 7.5 and the model's own.

    Raises:
        ToMeError: when built: unknown metrics or their weights missing, no prompts. At the
            start of the run: no text-to-image model in the runner, nothing applied to it.

    Priority NORMAL: after the ratio is set (``ToMeHook``), before the logger writes.
    """

    priority = "NORMAL"

    def __init__(
        self,
        prompts: Sequence[str],
        seeds: int | Sequence[int] = 0,
        interval: int | None = None,
        metrics: Sequence[str | dict[str, Any]] = ("psnr", "ssim"),
        steps: int | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        from ...evaluation.metrics import build_paired

        if isinstance(prompts, str) or not prompts:
            raise ToMeError(f"prompts of ToMeEvalHook: write a list of them, got {prompts!r}")
        if interval is not None and (not isinstance(interval, int) or interval < 1):
            raise ToMeError(f"interval={interval!r} of ToMeEvalHook: write 1 or more, or None")
        self.prompts = list(prompts)
        if isinstance(seeds, int):
            seeds = [seeds + number for number in range(len(self.prompts))]
        if len(seeds) != len(self.prompts):
            raise ToMeError(
                f"ToMeEvalHook has {len(self.prompts)} prompts and {len(seeds)} seeds; write one "
                "number, or one for each"
            )
        self.seeds = list(seeds)
        self.interval = interval
        named = [
            {"name": metric} if isinstance(metric, str) else dict(metric) for metric in metrics
        ]
        self.metrics = [build_paired(**metric) for metric in named]
        self.settings = {"steps": steps, "guidance": guidance, "size": size}

    def before_run(self, runner) -> None:
        model = model_of(runner, "ToMeEvalHook", generates=True)
        if not Handles.of(model):
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
        """Generate, compare, report; returns the mean of each metric by name."""
        model = model_of(runner, "ToMeEvalHook", generates=True)
        handles = Handles.of(model)
        values: dict[str, list[Tensor]] = {metric.name: [] for metric in self.metrics}
        with undisturbed(model), aside():
            for number, (prompt, seed) in enumerate(zip(self.prompts, self.seeds)):
                request = request_of(runner, [prompt], seed=seed, **self.settings)
                dense, merged = dense_and_merged(model, handles, request, [0])
                for metric in self.metrics:
                    values[metric.name].append(metric(*_what_it_compares(metric, dense, merged)))
                picture = _side_by_side(dense.pictures, merged.pictures)
                runner.visualizer.add_image(f"tome_{mode}_{number:03d}", picture, step=step)
        means = {
            metric.name: metric.mean(torch.cat(values[metric.name])) for metric in self.metrics
        }
        said = ", ".join(f"{m.label} {m.text(means[m.name])}" for m in self.metrics)
        runner.logger.info(
            f"dense and merged ({handles.description}), {len(self.prompts)} prompts, {mode} at "
            f"iteration {step}: {said}"
        )
        # An infinite PSNR (identical pictures) is in the log; as a point of a curve it breaks
        # the files of some backends.
        scalars = {f"tome_{mode}/{key}": x for key, x in means.items() if math.isfinite(x)}
        if scalars:
            runner.visualizer.add_scalars(scalars, step=step)
        return means


class Generated(NamedTuple):
    """Pictures, (B, 3, H, W) uint8 RGB, and the latents that they were decoded from.

    The latents are (B, C, h, w) float32 on the CPU, None of a model that does not show them.
    """

    pictures: Tensor
    latents: Tensor | None


def generate(generator, numbers: Sequence[int]) -> Generated:
    """The pictures ``numbers`` of a :class:`~mmagic_tome.apis.text2image.Generator`."""
    from ...evaluation.generate import LatentWatch

    with LatentWatch(generator.model) as watch:
        images, _ = generator.run(numbers)
    return Generated(to_tensor(images), watch.latents)


def dense_and_merged(
    model: nn.Module, handles: Handles, request, numbers: Sequence[int]
) -> tuple[Generated, Generated]:
    """The pictures ``numbers`` of a request, without and with what is applied."""
    from ...apis.text2image import Generator

    generator = Generator(model, request)
    with handles.disabled():
        dense = generate(generator, numbers)
    return dense, generate(generator, numbers)


def _what_it_compares(metric, dense: Generated, merged: Generated) -> tuple[Tensor, Tensor]:
    if metric.of == "pictures":
        return dense.pictures, merged.pictures
    if dense.latents is None or merged.latents is None:
        raise ToMeError(f"the final latents of this model cannot be seen; leave out {metric.name}")
    return dense.latents, merged.latents


def to_tensor(images: Sequence) -> Tensor:
    """PIL images of one size -> (B, 3, H, W) uint8 RGB."""
    arrays = [np.array(image.convert("RGB")) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def _side_by_side(dense: Tensor, merged: Tensor) -> np.ndarray:
    """One picture of three: dense, merged, amplified difference; (H + words, 3 W, 3) uint8 RGB."""
    from ...evaluation.metrics import max_error_picture

    difference = np.array(max_error_picture(dense, merged)[0])
    white = np.full((difference.shape[0] - dense.shape[-2], dense.shape[-1], 3), 255, np.uint8)
    columns = [
        np.concatenate([images[0].permute(1, 2, 0).numpy(), white]) for images in (dense, merged)
    ]
    return np.concatenate([*columns, difference], axis=1)
