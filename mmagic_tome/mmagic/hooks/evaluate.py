# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``ToMeEvalHook``: the same prompts with the baseline and with what is applied, compared."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ...errors import ToMeError
from ...settings import Handles
from .subject import iteration_of, model_of, running, undisturbed


@HOOKS.register_module()
class ToMeEvalHook(Hook):
    """Generates images with and without what is applied, and measures how far they are apart.

    At the end of test and validation, and every ``interval`` training iterations, as
    ``ToMeValLoop`` does it, but with prompts of its own and with any loop. The visualizer gets a
    sheet of each prompt and the metrics as scalars, ``tome_<mode>/psnr``; the log has them too.
    Weights and random numbers do not change.

    Args:
        prompts: One image each.
        interval: Training iterations between evaluations. Default: None, not in training (but at
            its validations).
        metrics: Names of :data:`mmagic_tome.lab.metrics.PAIRED`, or arguments of ``ToMeMetric``, as
            in ``dict(metric='lpips', net='vgg')``. Default: PSNR and SSIM.
        **request: As in ``ToMeValLoop``, such as ``seed``, ``steps``, ``guidance`` and
            ``controls``. Default: those of ``infer_cfg`` of the config.

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
        from .metrics import ToMeMetric
        from .prompts import ToMePromptDataset

        if interval is not None and (not isinstance(interval, int) or interval < 1):
            raise ToMeError(f"interval={interval!r} of ToMeEvalHook: write 1 or more, or None")
        self.prompts, self.interval, self.request = ToMePromptDataset(prompts), interval, request
        named = [{"metric": one} if isinstance(one, str) else dict(one) for one in metrics]
        self.metrics = [ToMeMetric(**options) for options in named]

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
        self.evaluate(runner, "val", iteration_of(runner))

    def after_test_epoch(self, runner, metrics=None) -> None:
        self.evaluate(runner, "test", iteration_of(runner))

    def evaluate(self, runner, mode: str, step: int) -> dict[str, float]:
        """Generate, compare, log; return the value of each metric by name."""
        from .loops import ToMeValLoop

        loader = dict(
            batch_size=1,
            num_workers=0,
            dataset=self.prompts,
            sampler=dict(type="DefaultSampler", shuffle=False),
        )
        loop = ToMeValLoop(runner, loader, copy.copy(self.metrics), **self.request)
        model = model_of(runner, "ToMeEvalHook")
        with undisturbed(model), running(""):
            found = loop.evaluate(f"tome_{mode}", step)
        values = {key.partition("/")[2]: value for key, value in found.items()}
        texts = [f"{m.metric.label} {m.metric.text(values[m.metric.name])}" for m in self.metrics]
        runner.logger.info(
            f"{mode} at iteration {step}: {Handles.of(model).description}, against the baseline "
            f"over {len(self.prompts)} prompts: {', '.join(texts)}"
        )
        # An infinite PSNR (identical images) breaks the files of some backends.
        scalars = {f"tome_{mode}/{key}": x for key, x in values.items() if math.isfinite(x)}
        if scalars:
            runner.visualizer.add_scalars(scalars, step=step)
        return values
