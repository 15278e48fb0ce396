# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Handles of what is applied to a diffusion model: to look at it, change it and remove it."""

from __future__ import annotations

from typing import Any

from .base_handle import Handle
from .cache import StepCacheConfig
from .cache.skip import CachePatch
from .errors import ToMeError
from .tome.place import follow_signals
from .tome.state import TomePatch

# A step of a run in summaries, by the region that was skipped.
_MARKS = {None: "#", "innermost": "j", "inner": "i", "network": "."}


class ToMeHandle(Handle[TomePatch]):
    """A view on the token merging of a model."""

    @property
    def ratio(self) -> Any:
        """Share of tokens removed per target, or its schedule; 0 is the baseline. Assign to change
        it from the next call on, in every network.

        Raises:
            ToMeError: on assignment of a ratio outside [0, config.ceiling], or after removal.
        """
        return self.config.ratio

    @ratio.setter
    def ratio(self, value: Any) -> None:
        if not self.active:
            raise ToMeError(
                "this token merging was removed or replaced, its ratio changes nothing; use the "
                "handle of the last apply_tome, or get_handle(model)"
            )
        # All are checked before any is changed.
        configs = [part.patch.config.replace(ratio=value) for part in self._parts]
        for part, config in zip(self._parts, configs):
            part.patch.config = config
            part.patch.forget_run()
            follow_signals(part.network(), part.patch)

    @property
    def description(self) -> str:
        """The ratio and the options that are not the default."""
        return self.config.description

    def stats(self) -> list[dict[str, Any]]:
        """What was merged where, one dict per target in running order.

        Keys: ``target`` (dotted path and kind), ``block`` (dotted path), ``kind`` (see
        :class:`ToMeConfig`), ``downsample``, ``tokens`` and ``kept`` (counts at the last call; None
        before it), ``calls``, ``unmerged_calls`` (those without merging) and ``plans`` (plans made
        for the block) since :meth:`reset_stats`. Compiled forwards record token counts, but no
        calls and plans. Further networks come last, with their name in front.
        """
        return [
            {
                "target": part.name + target.name,
                "block": part.name + target.block.name,
                "kind": target.kind,
                "downsample": target.block.downsample,
                "tokens": target.tokens,
                "kept": target.kept,
                "calls": target.calls,
                "unmerged_calls": target.unmerged_calls,
                "plans": target.block.plans,
            }
            for part in self._parts
            for target in part.patch.targets
        ]

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for row in self.stats():
            tokens, kept = row["tokens"], row["kept"]
            row["removed"] = None if tokens is None else f"{1 - kept / tokens:.0%}"
            shown = ("target", "downsample", "tokens", "kept", "removed", "calls", "plans")
            rows.append({key: row[key] for key in shown})
        return rows


class CacheHandle(Handle[CachePatch]):
    """A view on the step caching of a model."""

    technique = "step caching"

    @property
    def config(self) -> tuple[StepCacheConfig, ...]:
        """The step caches in force, the larger region first."""
        return self._patch.configs

    @property
    def description(self) -> str:
        """Those of every step cache in a few words."""
        return ", ".join(one.description for one in self.config)

    def reset_stats(self) -> None:
        for patch in self._patches:
            patch.budget = None
            for region in patch.regions.values():
                region.computed = region.skipped = 0

    def stats(self) -> list[dict[str, Any]]:
        """What was skipped, one dict per region.

        Keys: ``region`` ('network', 'inner' or, with a tolerance, 'innermost'; in further networks
        with their name in front), ``computed`` and ``skipped`` (calls at which it was computed, and
        at which its output was extrapolated) since :meth:`reset_stats`.
        """
        return [
            {"region": part.name + name, "computed": region.computed, "skipped": region.skipped}
            for part in self._parts
            for name, region in part.patch.regions.items()
        ]

    @property
    def predicted_error(self) -> list[float] | None:
        """With a tolerance, of the last run: the predicted error of each image's final latent,
        relative to the baseline's. None without a tolerance and before a run."""
        budget = self._patch.budget
        return None if budget is None else budget.predicted

    @property
    def steps(self) -> list[str] | None:
        """With a tolerance, what was done at each step of the last run: 'computed', or the region
        that was skipped. None without a tolerance and before a run."""
        budget = self._patch.budget
        return None if budget is None else [region or "computed" for region in budget.skipped]

    @property
    def speedup(self) -> float | None:
        """With a tolerance, of the last run: how many times as fast its steps were as if all had
        been computed, by the clock; without text encoder and decoder. None without a tolerance, and
        where too few steps were computed to tell."""
        budget = self._patch.budget
        return None if budget is None else budget.speedup

    def summary(self) -> str:
        """As of every handle; with a tolerance also the steps of the last run, how much faster they
        were, and the error that was predicted for its images."""
        text, budget = super().summary(), self._patch.budget
        if budget is None:
            return text
        marks = "".join(_MARKS[region] for region in budget.skipped)
        predicted = ", ".join(f"{error:.4f}" for error in budget.predicted) or "0"
        speedup = budget.speedup
        faster = "" if speedup is None else f"\nits steps: {speedup:.2f} times as fast"
        return (
            f"{text}\nlast run: {marks}  (# computed, j innermost skipped, i inner skipped, "
            f". network skipped){faster}\npredicted error of its final latents: {predicted}"
        )
