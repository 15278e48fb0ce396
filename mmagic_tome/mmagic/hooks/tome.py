# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``ToMeHook``: token merging of a run, and its ratio over the iterations."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ...apply import apply_tome, get_handle
from ...config import ToMeConfig
from ...errors import ToMeError
from ..spellings import read
from .subject import model_of


@HOOKS.register_module()
class ToMeHook(Hook):
    """Applies token merging to the runner's model, reports it, changes its ratio by a schedule.

    A config with a top-level ``tome_cfg`` is merged without this hook too; then the hook takes
    what is there, and adds the report and the schedule.

    Args:
        tome_cfg: options of :class:`mmagic_tome.ToMeConfig`. Default: those of the config.
        schedule: ``dict(by='iter', points=[(0, 0.0), (100, 0.5)])``: the ratio at iterations,
            linear in between, constant before the first and after the last. In training the
            iterations are the runner's; in a test or validation of its own, its batches.
            Validation in between of training runs at the ratio that training has reached.
            Default: the ratio stays.
        summary: whether to log a table of what was merged where, after test, validation and
            training. Default: True.

    Raises:
        ToMeError: at the start of the run: nothing to apply, no diffusion model, another
            ``tome_cfg`` elsewhere in the config; when built: an invalid option.

    Priority ABOVE_NORMAL: the ratio of an iteration is set before other hooks look at it. In
    training it is logged as ``tome_ratio``.
    """

    priority = "ABOVE_NORMAL"

    def __init__(
        self,
        tome_cfg: ToMeConfig | Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        summary: bool = True,
    ) -> None:
        self.config = read(**{"tome_cfg of ToMeHook": tome_cfg})
        self.points = _points(schedule)
        if self.config is not None:
            self._check_points(self.config)
        self.summary = summary
        self.handle = None
        self._training = False

    def before_run(self, runner) -> None:
        model = model_of(runner, "ToMeHook")
        cfg = getattr(runner, "cfg", None) or {}
        config = read(
            **{"tome_cfg of ToMeHook": self.config, "tome_cfg of the config": cfg.get("tome_cfg")}
        )
        handle = get_handle(model)
        if handle is None and config is None:
            raise ToMeError(
                "ToMeHook has nothing to apply: write tome_cfg=dict(ratio=0.5) at the top level of "
                "the config, or in the hook"
            )
        if handle is None:
            handle = apply_tome(model, config)
        elif self.config is not None and self.handle is None:
            # Applied already, by the config's top level or the model's own key.
            read(**{"tome_cfg of ToMeHook": self.config, "tome_cfg of the model": handle.config})
        self._check_points(handle.config)
        self.handle = handle

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
        if isinstance(self.handle.ratio, Real):  # and not a schedule over the noise
            runner.message_hub.update_scalar("train/tome_ratio", self.handle.ratio)

    def before_val_iter(self, runner, batch_idx, data_batch=None) -> None:
        if not self._training:
            self._set(batch_idx)

    def before_test_iter(self, runner, batch_idx, data_batch=None) -> None:
        self._set(batch_idx)

    # --- report -----------------------------------------------------------------------------------

    def before_train(self, runner) -> None:
        self._training = True
        self.handle.reset()

    def before_val(self, runner) -> None:
        if not self._training:
            self.handle.reset()

    def before_test(self, runner) -> None:
        self.handle.reset()

    def after_train(self, runner) -> None:
        self._training = False
        self._report(runner)

    def after_val(self, runner) -> None:
        self._report(runner)

    def after_test(self, runner) -> None:
        self._report(runner)

    def _report(self, runner) -> None:
        if self.summary:
            runner.logger.info(self.handle.summary())


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
