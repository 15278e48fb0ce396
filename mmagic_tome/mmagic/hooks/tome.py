# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``ToMeHook``: token merging and step caching of a run, and the ratio over its iterations."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ...apply import get_handle
from ...config import ToMeConfig
from ...errors import ToMeError
from ...handle import ToMeHandle
from ...settings import Handles
from ..config_keys import KEYS, read
from .subject import iteration_of, model_of


@HOOKS.register_module()
class ToMeHook(Hook):
    """Applies token merging and step caching to the runner's model, logs what they did, and changes
    the ratio by a schedule.

    Top-level ``tome_cfg`` and ``cache_cfg`` of a config are applied without it; the hook adds the
    log and the schedule.

    Args:
        tome_cfg: Options of :class:`mmagic_tome.ToMeConfig`. Default: None, what is applied.
        cache_cfg: What :func:`mmagic_tome.apply_cache` takes as config. Default: None, likewise.
        schedule: ``dict(by='iter', points=[(0, 0.0), (100, 0.5)])``: the ratio at iterations,
            linear in between, constant before the first and after the last. In training the
            iterations are the runner's; in a test or validation of its own, its batches.
            Validation during training runs at the ratio that training has reached. Default: None,
            the ratio stays.
        summary: Whether to log tables of what was merged and skipped after the run. Default: True.

    Raises:
        ToMeError: When built: an invalid option. At the start of the run: nothing to apply; no
            diffusion model; another value in the config; a schedule without token merging.

    Priority ABOVE_NORMAL: the ratio of an iteration is set before other hooks read it. Training
    logs it as ``tome_ratio``.
    """

    priority = "ABOVE_NORMAL"

    def __init__(
        self,
        tome_cfg: ToMeConfig | Mapping[str, Any] | None = None,
        cache_cfg: Any = None,
        schedule: Mapping[str, Any] | None = None,
        summary: bool = True,
    ) -> None:
        given = {"tome_cfg": tome_cfg, "cache_cfg": cache_cfg}
        self.configs = {key: read(key, **{f"{key} of ToMeHook": given[key]}) for key in KEYS}
        self.points = _points(schedule)
        if self.configs["tome_cfg"] is not None:
            self._check_points(self.configs["tome_cfg"])
        self.summary = summary
        self.handle: ToMeHandle | None = None
        self._checked = False

    def before_run(self, runner) -> None:
        model = model_of(runner, "ToMeHook")
        for key, technique in (("tome_cfg", "tome"), ("cache_cfg", "cache")):
            own, applied = self.configs[key], get_handle(model, technique)
            if own is not None and applied is None:
                KEYS[key][1](model, own)
            elif own is not None and not self._checked:  # later a schedule may have changed it
                read(key, **{f"{key} of ToMeHook": own, f"{key} of the config": applied.config})
        self._checked = True
        if not Handles.of(model):
            raise ToMeError(
                "ToMeHook has nothing to apply: write tome_cfg=dict(ratio=0.5) or "
                "cache_cfg='balanced' at the top level of the config, or in the hook"
            )
        Handles.of(model).reset_stats()
        self.handle = Handles.of(model).tome
        if self.handle is not None:
            self._check_points(self.handle.config)
        elif self.points:
            raise ToMeError(
                "schedule of ToMeHook changes the ratio of token merging, and none is applied; "
                "write tome_cfg=dict(ratio=0.5), or leave the schedule out"
            )

    def after_run(self, runner) -> None:
        for handle in Handles.of(model_of(runner, "ToMeHook")) if self.summary else ():
            runner.logger.info(handle.summary())

    def _check_points(self, config: ToMeConfig) -> None:
        for _, ratio in self.points:
            try:
                config.replace(ratio=ratio)
            except ToMeError as error:
                raise ToMeError(f"schedule of ToMeHook: {error}") from error

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


def _points(schedule: Mapping[str, Any] | None) -> list[tuple[int, float]]:
    """Checked points of a schedule; [] for none."""
    if schedule is None:
        return []
    try:
        given = dict(schedule)
        points = [(int(place), float(ratio)) for place, ratio in given.pop("points")]
        by = given.pop("by", "iter")
    except (TypeError, ValueError, KeyError):
        points, given, by = [], {}, None
    places = [place for place, _ in points]
    if not points or given or by != "iter" or places != sorted(set(places)) or places[0] < 0:
        raise ToMeError(
            "schedule of ToMeHook: write dict(by='iter', points=[(0, 0.0), (100, 0.5)]), with "
            f"rising iterations from 0 on; got {schedule!r}"
        )
    return points
