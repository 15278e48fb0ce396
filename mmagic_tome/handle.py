# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Handles of what is applied to a model: to look at it, change it and remove it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import nn

from .cache import StepCacheConfig
from .cache.skip import CachePatch
from .config import ToMeConfig
from .errors import ToMeError
from .patch import Patch, find_patch, remove, restore
from .tome.place import follow_signals
from .tome.state import TomePatch

P = TypeVar("P", bound=Patch)


@dataclass
class Part(Generic[P]):
    """One network with one patch.

    Attributes:
        name (str): '' or the beginning of its names, such as 'transformer_2.'.
        network (weakref): of the network: a handle keeps no model alive.
        patch (Patch): what is applied.
    """

    name: str
    network: Any
    patch: P

    @property
    def active(self) -> bool:
        """Whether the network still carries the patch."""
        network = self.network()
        return network is not None and find_patch(network, type(self.patch)) is self.patch


class Handle(Generic[P]):
    """A view on what one technique has applied to the networks of a model.

    As a context manager it removes on exit, and puts back what was there before.

    Args:
        parts: (name, network, patch) of every network, the first denoiser first.
        replaced: (network, what :func:`~.patch.remove` returned) of what was there before.
    """

    #: 'token merging' or 'step caching'.
    technique = ""

    def __init__(
        self,
        parts: Sequence[tuple[str, nn.Module, P]],
        replaced: Sequence[tuple[nn.Module, list]] = (),
    ) -> None:
        self._parts = [Part(name, weakref.ref(network), patch) for name, network, patch in parts]
        self._replaced = [(weakref.ref(network), removed) for network, removed in replaced]

    @property
    def network(self) -> nn.Module | None:
        """The network, or the first of several; None once it is gone."""
        return self._parts[0].network()

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Every network by name, ControlNets included."""
        found = {part.name.rstrip("."): part.network() for part in self._parts}
        return {name: network for name, network in found.items() if network is not None}

    @property
    def active(self) -> bool:
        """False once this was removed or replaced."""
        return self._parts[0].active

    @property
    def _patches(self) -> list[P]:
        return [part.patch for part in self._parts]

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The baseline model, bit for bit, for calls in this thread while entered.

        What is kept between steps is forgotten at both ends.
        """
        with contextlib.ExitStack() as stack:
            for patch in self._patches:
                stack.enter_context(patch.disabled())
            yield

    def remove(self) -> None:
        """Take it out of the networks again, exactly; a second call does nothing."""
        for part in self._parts:
            if part.active:
                remove(part.network(), part.patch)

    def reset_run(self) -> None:
        """Forget what is kept between steps: the next call begins a new denoising run.

        Only needed where a run was left in the middle and its tensors should be freed.
        """
        for patch in self._patches:
            patch.forget_run()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # One that was removed or replaced in the meantime has nothing to undo.
        if not self.active:
            return
        self.remove()
        for network, removed in self._replaced:
            if network() is not None:
                restore(network(), removed)

    @property
    def _title(self) -> str:
        networks = ", ".join(dict.fromkeys(type(one).__name__ for one in self.networks.values()))
        return f"{self.technique} in {networks or 'a model that is gone'}: {self.description}"

    def __repr__(self) -> str:
        networks = ", ".join(type(one).__name__ for one in self.networks.values())
        removed = ", removed" if networks and not self.active else ""
        networks = networks or "of a model that is gone"
        return f"{type(self).__name__}({networks}, {self.description}{removed})"


class ToMeHandle(Handle[TomePatch]):
    """A view on the token merging of a model."""

    technique = "token merging"

    @property
    def config(self) -> ToMeConfig:
        """The options in force."""
        return self._patches[0].config

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
        """What is done, in a few words."""
        return ", ".join(_in_words(self.config))

    def reset_stats(self) -> None:
        """Set the counters of :meth:`stats` back to zero."""
        for patch in self._patches:
            for target in patch.targets:
                target.tokens, target.kept, target.calls, target.unmerged_calls = None, None, 0, 0
            for block in patch.blocks:
                block.plans = 0

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

    def summary(self) -> str:
        """A table of :meth:`stats` to print, with the options in its title."""
        title = self._title
        if not self.active:
            return f"{title} (removed)"
        stats = self.stats()
        if all(row["tokens"] is None for row in stats):
            title += " (not run yet)"
        header = ("target", "downsample", "tokens", "kept", "removed", "calls", "plans")
        rows = []
        for row in stats:
            tokens, kept = row["tokens"], row["kept"]
            counts = ("-", "-", "-")
            if tokens is not None:
                counts = (str(tokens), str(kept), f"{1 - kept / tokens:.0%}")
            shown = (row["target"], str(row["downsample"]), *counts)
            rows.append((*shown, str(row["calls"]), str(row["plans"])))
        return "\n".join([title, *table(header, rows)])


class CacheHandle(Handle[CachePatch]):
    """A view on the step caching of a model."""

    technique = "step caching"

    @property
    def config(self) -> tuple[StepCacheConfig, ...]:
        """The step caches in force, the larger region first."""
        return self._patches[0].configs

    @property
    def description(self) -> str:
        """What is done, in a few words."""
        return ", ".join(
            f"{one.region} every {one.interval} steps in [{one.timestep_range[0]:g}, "
            f"{one.timestep_range[1]:g})"
            for one in self.config
        )

    def reset_stats(self) -> None:
        """Set the counters of :meth:`stats` back to zero."""
        for patch in self._patches:
            for region in patch.regions.values():
                region.computed = region.skipped = 0

    def stats(self) -> list[dict[str, Any]]:
        """What was skipped, one dict per region.

        Keys: ``region`` ('network' or 'inner', in further networks with their name in front),
        ``computed`` and ``skipped`` (calls at which it was computed, and at which its output was
        extrapolated) since :meth:`reset_stats`.
        """
        return [
            {"region": part.name + name, "computed": region.computed, "skipped": region.skipped}
            for part in self._parts
            for name, region in part.patch.regions.items()
        ]

    def summary(self) -> str:
        """A table of :meth:`stats` to print, with the options in its title."""
        if not self.active:
            return f"{self._title} (removed)"
        stats = self.stats()
        title = self._title
        if not any(row["computed"] + row["skipped"] for row in stats):
            title += " (not run yet)"
        rows = [(row["region"], str(row["computed"]), str(row["skipped"])) for row in stats]
        return "\n".join([title, *table(("region", "computed", "skipped"), rows)])


def _in_words(config: ToMeConfig) -> list[str]:
    """What merging does, phrase by phrase."""
    schedule = config.ratio_schedule
    words = [
        f"ratio {config.ratio:g}" if schedule.constant else f"ratio by schedule {config.ratio!r}",
        f"cells {config.sx}x{config.sy}",
        f"{'random' if config.use_rand else 'regular'} destinations",
    ]
    if config.method != "tome":
        words.append(f"method {config.method!r}")
    if config.prop_attn:
        words.append("proportional attention")
    if config.across_frames:
        words.append("across frames")
    interval = config.plan_interval
    if isinstance(interval, tuple):
        words.append(f"plans computed at steps {', '.join(map(str, interval))}")
    elif interval > 1:
        words.append(f"plans computed every {interval} steps")
    if config.share_plans:
        words.append("one plan per level")
    if config.residual:
        words.append("residual added")
    return words


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table: first column to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: tuple[str, ...]) -> str:
        first, *rest = cells
        padded = [first.ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
        return "  ".join(padded).rstrip()

    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]
