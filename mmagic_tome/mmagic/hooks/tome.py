# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``ToMeHook``: what token merging and step caching did in a run, and the ratio over iterations."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import numpy as np
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ...errors import ToMeError
from ...handle import ToMeHandle
from ...settings import Handles
from .subject import iteration_of, model_of


@HOOKS.register_module()
class ToMeHook(Hook):
    """Logs what token merging and step caching did in a run, and changes the ratio by a schedule.

    The config applies them, by ``tome_cfg`` and ``cache_cfg``.

    Args:
        schedule: ``[(0, 0.0), (100, 0.5)]``: the ratio at iterations, linear in between, constant
            before the first and after the last. In training the iterations are the runner's; in a
            test or validation of its own, its batches. Validation during training runs at the
            ratio that training has reached. Default: none, the ratio stays.
        summary: Whether to log tables of what was merged and skipped after the run. Default: True.

    Raises:
        ToMeError: When built: iterations that do not rise. At the start of the run: nothing is
            applied; no diffusion model; a schedule without token merging, or with a ratio that
            it cannot have.

    Priority ABOVE_NORMAL: the ratio of an iteration is set before other hooks read it. Training
    logs it as ``tome_ratio``.
    """

    priority = "ABOVE_NORMAL"

    def __init__(self, schedule: Sequence[tuple[int, float]] = (), summary: bool = True) -> None:
        places = [place for place, _ in schedule]
        if places != sorted(set(places)):
            raise ToMeError(f"schedule of ToMeHook: iterations must rise, got {schedule!r}")
        self.points = list(schedule)
        self.summary = summary
        self.handle: ToMeHandle | None = None

    def before_run(self, runner) -> None:
        handles = Handles.of(model_of(runner, "ToMeHook"))
        if not handles:
            raise ToMeError(
                "ToMeHook has nothing to report: nothing is applied to the runner's model; write "
                "tome_cfg=dict(ratio=0.5) or cache_cfg='balanced' at the top level of the config"
            )
        handles.reset_stats()
        self.handle = handles.tome
        if self.points and self.handle is None:
            raise ToMeError(
                "schedule of ToMeHook changes the ratio of token merging, and none is applied; "
                "write tome_cfg=dict(ratio=0.5), or leave the schedule out"
            )
        for _, ratio in self.points:
            try:
                self.handle.config.replace(ratio=ratio)
            except ToMeError as error:
                raise ToMeError(f"schedule of ToMeHook: {error}") from error

    def after_run(self, runner) -> None:
        for handle in Handles.of(model_of(runner, "ToMeHook")) if self.summary else ():
            runner.logger.info(handle.summary())

    def ratio_at(self, iteration: int) -> float:
        """The ratio of the schedule at an iteration, counted from 0."""
        return float(np.interp(iteration, *zip(*self.points)))

    def _set(self, iteration: int) -> None:
        if self.points:
            self.handle.ratio = self.ratio_at(iteration)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        self._set(runner.iter)
        # A schedule over denoising steps is no number.
        if self.handle is not None and isinstance(self.handle.ratio, Real):
            runner.message_hub.update_scalar("train/tome_ratio", self.handle.ratio)

    def before_val_iter(self, runner, batch_idx, data_batch=None) -> None:
        if iteration_of(runner) == 0:  # not during training
            self._set(batch_idx)

    def before_test_iter(self, runner, batch_idx, data_batch=None) -> None:
        self._set(batch_idx)
