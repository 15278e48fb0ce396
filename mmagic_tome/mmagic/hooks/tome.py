# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``ToMeHook``: token merging and step caching of a run, and the ratio over its iterations."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ...apply import get_handle
from ...config import ToMeConfig
from ...errors import ToMeError
from ...handle import CacheHandle, ToMeHandle
from ..spellings import KEYS, read
from .subject import model_of


@HOOKS.register_module()
class ToMeHook(Hook):
    """Applies token merging and step caching to the runner's model, reports them, changes the
    ratio by a schedule.

    A config with a top-level ``tome_cfg`` or ``cache_cfg`` needs no hook to apply it; then the hook
    uses what is applied, and adds the report and the schedule.

    Args:
        tome_cfg: options of :class:`mmagic_tome.ToMeConfig`. Default: those of the config.
        cache_cfg: what :func:`mmagic_tome.apply_cache` takes as config. Default: that of the
            config.
        schedule: ``dict(by='iter', points=[(0, 0.0), (100, 0.5)])``: the ratio at iterations,
            linear in between, constant before the first and after the last. In training the
            iterations are the runner's; in a test or validation of its own, its batches.
            Validation in between of training runs at the ratio that training has reached.
            Default: the ratio stays.
        summary: whether to log tables of what was merged and skipped, after test, validation and
            training. Default: True.

    Raises:
        ToMeError: at the start of the run: nothing to apply, no diffusion model, another value
            elsewhere in the config, a schedule without token merging; when built: an invalid
            option.

    Priority ABOVE_NORMAL: the ratio of an iteration is set before other hooks look at it. In
    training it is logged as ``tome_ratio``.
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
        self.cache_handle: CacheHandle | None = None
        self._training = False

    def before_run(self, runner) -> None:
        model = model_of(runner, "ToMeHook")
        cfg = getattr(runner, "cfg", None) or {}
        handle = self._applied("tome_cfg", "tome", model, cfg, self.handle is None)
        cache_handle = self._applied("cache_cfg", "cache", model, cfg, self.cache_handle is None)
        if handle is None and cache_handle is None:
            raise ToMeError(
                "ToMeHook has nothing to apply: write tome_cfg=dict(ratio=0.5) or "
                "cache_cfg='balanced' at the top level of the config, or in the hook"
            )
        if handle is not None:
            self._check_points(handle.config)
        elif self.points:
            raise ToMeError(
                "schedule of ToMeHook changes the ratio of token merging, and none is applied; "
                "write tome_cfg=dict(ratio=0.5), or leave the schedule out"
            )
        self.handle, self.cache_handle = handle, cache_handle

    def _applied(self, key: str, technique: str, model: Any, cfg: Any, first: bool) -> Any:
        """Handle of a technique, applied where it is not yet; None if no config names it."""
        own = self.configs[key]
        config = read(key, **{f"{key} of ToMeHook": own, f"{key} of the config": cfg.get(key)})
        handle = get_handle(model, technique)
        if handle is None:
            return None if config is None else KEYS[key][1](model, config)
        if own is not None and first:
            # Applied already, by the config's top level or the model's own key.
            read(key, **{f"{key} of ToMeHook": own, f"{key} of the model": handle.config})
        return handle

    def _check_points(self, config: ToMeConfig) -> None:
        for _, ratio in self.points:
            try:
                config.replace(ratio=ratio)
            except ToMeError as error:
                raise ToMeError(f"schedule of ToMeHook: {error}") from error

    # --- schedule ---------------------------------------------------------------------------------

    def ratio_at(self, iteration: int) -> float:
        """The ratio that the schedule gives an iteration, counted from 0."""
        places = [place for place, _ in self.points]
        after = bisect_right(places, iteration)
        if after == 0:
            return self.points[0][1]
        if after == len(places):
            return self.points[-1][1]
        (first, low), (second, high) = self.points[after - 1 : after + 1]
        return low + (high - low) * (iteration - first) / (second - first)

    def _set(self, iteration: int) -> None:
        if self.points:
            self.handle.ratio = self.ratio_at(iteration)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        self._set(runner.iter)
        # A schedule over the run is no number.
        if self.handle is not None and isinstance(self.handle.ratio, Real):
            runner.message_hub.update_scalar("train/tome_ratio", self.handle.ratio)

    def before_val_iter(self, runner, batch_idx, data_batch=None) -> None:
        if not self._training:
            self._set(batch_idx)

    def before_test_iter(self, runner, batch_idx, data_batch=None) -> None:
        self._set(batch_idx)

    # --- report -----------------------------------------------------------------------------------

    def before_train(self, runner) -> None:
        self._training = True
        self._reset()

    def before_val(self, runner) -> None:
        if not self._training:
            self._reset()

    def before_test(self, runner) -> None:
        self._reset()

    def after_train(self, runner) -> None:
        self._training = False
        self._report(runner)

    def after_val(self, runner) -> None:
        self._report(runner)

    def after_test(self, runner) -> None:
        self._report(runner)

    @property
    def _handles(self) -> list[ToMeHandle | CacheHandle]:
        return [handle for handle in (self.handle, self.cache_handle) if handle is not None]

    def _reset(self) -> None:
        for handle in self._handles:
            handle.reset_stats()

    def _report(self, runner) -> None:
        for handle in self._handles if self.summary else ():
            runner.logger.info(handle.summary())


def _points(schedule: Mapping[str, Any] | None) -> list[tuple[int, float]]:
    """Checked points of a schedule, in order; [] for none."""
    if schedule is None:
        return []
    example = "schedule=dict(by='iter', points=[(0, 0.0), (100, 0.5)])"
    if not isinstance(schedule, Mapping) or set(schedule) - {"by", "points"}:
        raise ToMeError(f"schedule of ToMeHook: expected {example}, got {schedule!r}")
    if schedule.get("by", "iter") != "iter":
        raise ToMeError(
            f"schedule of ToMeHook: by={schedule['by']!r} is not known; write by='iter'"
        )
    points = schedule.get("points")
    if not isinstance(points, (list, tuple)) or not points:
        raise ToMeError(f"schedule of ToMeHook has no points; write {example}")
    checked = []
    for point in points:
        pair = isinstance(point, (list, tuple)) and len(point) == 2
        if not pair or not isinstance(point[0], Integral) or not isinstance(point[1], Real):
            raise ToMeError(
                f"schedule of ToMeHook: {point!r} is no (iteration, ratio); write {example}"
            )
        last = checked[-1][0] if checked else -1
        if point[0] <= last:
            raise ToMeError(
                f"schedule of ToMeHook: iterations rise from 0 on, got {[p[0] for p in points]}"
            )
        checked.append((int(point[0]), float(point[1])))
    return checked
