# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What can be tuned, and the moves that make a candidate faster or slower.

A candidate does up to three things, each in a window of the run (see ``timestep_range``):

- ``network`` and ``inner``: skip the network, or its inner region, at some steps (step caching);
- ``merge``: merge tokens at some levels (option ``ratio``), each level in a window of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..cache.config import REGIONS, StepCacheConfig
from ..settings import Setting

# Width of one move of a window's edge, as a share of the run.
NOTCH = 0.1
# A region that is computed at every fifth step or more rarely is extrapolated too far.
MAX_INTERVAL = 4
RATIOS = (0.25, 0.5, 0.75)
# None and half: what the presets have.
ERROR_FEEDBACK = (0.5, 0.0)
# Steps that a merge plan is used for: matching is a large part of what merging costs.
PLAN_INTERVAL = 2


@dataclass(frozen=True)
class Window:
    """How a region of the network is skipped, see :class:`~mmagic_tome.cache.StepCacheConfig`.

    Args:
        interval: it is computed at every this many steps.
        low, high: its ``timestep_range``.
        error_feedback: fraction of the extrapolation error that is added back.
    """

    interval: int
    low: float
    high: float
    error_feedback: float = 0.0


@dataclass(frozen=True)
class Part:
    """Token merging at one level.

    Args:
        downsample: how many times coarser its grid is than the finest one.
        ratio: of its tokens.
        low, high: the ``timestep_range`` in which they are merged.
    """

    downsample: int
    ratio: float
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Merge:
    """Token merging.

    Args:
        target: kind of target, as in ``ToMeConfig(targets=...)``.
        parts: one for every level with merging, by level.
        prop_attn: whether attention is proportional.
    """

    target: str
    parts: tuple[Part, ...]
    prop_attn: bool = False

    def at(self, level: int) -> Part | None:
        """The part of a level."""
        return next((part for part in self.parts if part.downsample == level), None)

    def with_part(self, part: Part) -> Merge:
        """With another part at a level, or one more."""
        held = {one.downsample: one for one in self.parts} | {part.downsample: part}
        return replace(self, parts=tuple(held[level] for level in sorted(held)))


@dataclass(frozen=True)
class Candidate:
    """A setting; the empty one is the dense model.

    Args:
        network, inner: how these regions are skipped; None: never.
        merge: what is merged, or None.
        order: of extrapolation.
    """

    network: Window | None = None
    inner: Window | None = None
    merge: Merge | None = None
    order: int = 1

    def options(self) -> dict[str, Any]:
        """What :meth:`~mmagic_tome.settings.Setting.coerce` takes; of JSON's types but for
        levels."""
        options: dict[str, Any] = {}
        if self.merge is not None:
            merge = self.merge
            options["ratio"] = {"downsample": {part.downsample: part.ratio for part in merge.parts}}
            windows = {part.downsample: [part.low, part.high] for part in merge.parts}
            first = next(iter(windows.values()))
            if any(window != first for window in windows.values()):
                narrow = {k: {"timestep_range": w} for k, w in windows.items() if w != [0.0, 1.0]}
                options["ratio"]["timestep"] = {"downsample": narrow}
            elif first != [0.0, 1.0]:
                options["ratio"]["timestep"] = {"timestep_range": first}
            options["targets"] = [merge.target]
            options["max_downsample"] = max(windows)
            options["plan_interval"] = PLAN_INTERVAL
            if merge.prop_attn:
                options["prop_attn"] = True
        caches = []
        for name in REGIONS:
            window = getattr(self, name)
            if window is not None:
                cache = {"region": name, "interval": window.interval}
                cache["timestep_range"] = [window.low, window.high]
                if window.error_feedback:
                    cache["error_feedback"] = window.error_feedback
                if self.order != 1:
                    cache["order"] = self.order
                caches.append(cache)
        if caches:
            options["cache"] = caches
        return options

    def setting(self) -> Setting:
        """The same, validated."""
        return Setting.coerce(self.options())

    @property
    def caches(self) -> tuple[StepCacheConfig, ...]:
        """The step caches; empty where nothing is skipped."""
        return self.setting().cache or ()

    @property
    def dense(self) -> bool:
        """Whether it changes nothing."""
        return self.network is None and self.inner is None and self.merge is None

    def text(self) -> str:
        """A few words, for tables."""
        words = []
        for name in REGIONS:
            window = getattr(self, name)
            if window is not None:
                feedback = window.error_feedback
                more = f" error feedback {feedback:g}" if feedback else ""
                words.append(f"{name} 1/{window.interval} in {window.low:g}-{window.high:g}{more}")
        if self.merge is not None:
            merge = self.merge
            levels = ", ".join(
                f"/{part.downsample}: {part.ratio:g} in {part.low:g}-{part.high:g}"
                for part in merge.parts
            )
            more = " prop_attn" if merge.prop_attn else ""
            words.append(f"merge {merge.target} {levels}{more}")
        return "; ".join(words) or "dense"


def candidate_of(setting: Mapping[str, Any] | Setting) -> Candidate | None:
    """The candidate that does the same as a setting; None where there is none.

    Args:
        setting: what :meth:`Setting.coerce` takes, such as ``dict(cache='fast')``.
    """
    setting = Setting.coerce(setting)
    if setting.tome is not None or setting.cache is None:
        return None
    windows = {
        one.region: Window(one.interval, *one.timestep_range, one.error_feedback)
        for one in setting.cache
    }
    candidate = Candidate(**windows, order=setting.cache[0].order)
    # Another order per region, or other outer blocks, no candidate has.
    return candidate if candidate.caches == setting.cache else None


@dataclass(frozen=True)
class Space:
    """What a search may do to a model on this machine.

    Args:
        regions: of 'network' and 'inner', those that can be skipped.
        merges: target -> level -> ratios, ascending, of merging that saves time here.
        order: of every candidate.
        prop_attn: of the targets in ``merges``, those with proportional attention: as fast, and
            closer to the baseline output.
    """

    regions: tuple[str, ...]
    merges: Mapping[str, Mapping[int, tuple[float, ...]]] = field(default_factory=dict)
    order: int = 1
    prop_attn: tuple[str, ...] = ()

    @property
    def dense(self) -> Candidate:
        """Where a search starts."""
        return Candidate(order=self.order)

    def holds(self, candidate: Candidate) -> bool:
        """Whether this space contains a candidate."""
        regions = all(getattr(candidate, name) is None or name in self.regions for name in REGIONS)
        return regions and candidate.order == self.order

    def fastest(self) -> list[Candidate]:
        """The far ends of the space; one of them is the fastest candidate."""
        everything = Window(MAX_INTERVAL, 0.0, 1.0)
        base = replace(self.dense, **dict.fromkeys(self.regions, everything))
        merges = [
            self._merge(target, (Part(level, table[level][-1]) for level in sorted(table)))
            for target, table in self.merges.items()
        ]
        return [base, *(replace(base, merge=merge) for merge in merges)]

    def _merge(self, target: str, parts: Iterable[Part]) -> Merge:
        return Merge(target, tuple(parts), target in self.prop_attn)

    def faster(self, candidate: Candidate) -> Iterator[tuple[str, list[Candidate]]]:
        """Moves that make a candidate faster.

        Yields:
            Name of the move, and the candidates that it leads to, the nearest first: the first of
            them that is faster is meant. A window's edge may have to move several notches to
            reach the next step of the scheduler.
        """
        for name in self.regions:
            window = getattr(candidate, name)
            if window is None:
                # Noise between the steps makes interpolation between outputs meaningless.
                feedback = ERROR_FEEDBACK[0] if self.order else 0.0
                edges = [_edges(0.5 - k * NOTCH, 0.5 + k * NOTCH) for k in range(1, 6)]
                starts = [Window(2, *pair, feedback) for pair in edges]
                yield f"{name}: in", [replace(candidate, **{name: start}) for start in starts]
                continue
            for edge, windows in _wider(window):
                yield f"{name}: {edge}", [replace(candidate, **{name: one}) for one in windows]
            if window.interval < MAX_INTERVAL:
                more = replace(window, interval=window.interval + 1)
                yield f"{name}: interval", [replace(candidate, **{name: more})]
        yield from self._more_merging(candidate)

    def _more_merging(self, candidate: Candidate) -> Iterator[tuple[str, list[Candidate]]]:
        merge = candidate.merge
        for target, table in self.merges.items():
            if merge is not None and target != merge.target:
                continue
            now = merge or self._merge(target, ())
            for level, ratios in table.items():
                part, name = now.at(level), f"merge {target} at {level}"
                if part is None:
                    for when, low, high in (("late", 0.0, 0.5), ("early", 0.5, 1.0)):
                        start = now.with_part(Part(level, ratios[0], low, high))
                        yield f"{name}: {when}", [replace(candidate, merge=start)]
                    continue
                higher = [ratio for ratio in ratios if ratio > part.ratio]
                more = [("more", [replace(part, ratio=higher[0])])] if higher else []
                for move, parts in [*_wider(part), *more]:
                    chain = [replace(candidate, merge=now.with_part(one)) for one in parts]
                    yield f"{name}: {move}", chain
        for edge, wider in _all_wider(merge.parts if merge is not None else ()):
            chain = [replace(candidate, merge=replace(merge, parts=parts)) for parts in wider]
            yield f"merge: {edge}", chain
        for other in self.elsewhere(candidate):
            yield f"merge: at {other.merge.target} instead", [other]

    def elsewhere(self, candidate: Candidate) -> Iterator[Candidate]:
        """The same merging at the other targets, at the nearest ratios that there are."""
        merge = candidate.merge
        for target, table in self.merges.items() if merge is not None else ():
            if target == merge.target:
                continue
            parts = [
                replace(
                    one, ratio=min(table[one.downsample], key=lambda r, one=one: abs(r - one.ratio))
                )
                for one in merge.parts
                if one.downsample in table
            ]
            if parts:
                yield replace(candidate, merge=self._merge(target, parts))

    def alike(self, candidate: Candidate) -> Iterator[Candidate]:
        """Neighbours that take as long."""
        for name in self.regions:
            window = getattr(candidate, name)
            for feedback in ERROR_FEEDBACK if window is not None and self.order else ():
                if feedback != window.error_feedback:
                    other = replace(window, error_feedback=feedback)
                    yield replace(candidate, **{name: other})

    def slower(self, candidate: Candidate) -> Iterator[Candidate]:
        """Neighbours that do one thing less."""
        for name in REGIONS:
            window = getattr(candidate, name)
            if window is None:
                continue
            for narrower in _narrower(window):
                yield replace(candidate, **{name: narrower})
            if window.interval > 2:
                less = replace(window, interval=window.interval - 1)
                yield replace(candidate, **{name: less})
            yield replace(candidate, **{name: None})
        merge = candidate.merge
        if merge is None:
            return
        for part in merge.parts:
            for narrower in _narrower(part):
                yield replace(candidate, merge=merge.with_part(narrower))
        for part in merge.parts:
            ratios = self.merges.get(merge.target, {}).get(part.downsample, ())
            lower = [ratio for ratio in ratios if ratio < part.ratio]
            if lower:
                less = merge.with_part(replace(part, ratio=lower[-1]))
            else:
                rest = tuple(one for one in merge.parts if one is not part)
                less = replace(merge, parts=rest) if rest else None
            yield replace(candidate, merge=less)


def _edges(low: float, high: float) -> tuple[float, float]:
    """Within [0, 1], and without the last digits of sums of floats."""
    return max(round(low, 2), 0.0), min(round(high, 2), 1.0)


def _wider(part: Any) -> Iterator[tuple[str, list[Any]]]:
    count = round(1 / NOTCH)
    for edge in ("low", "high"):
        chain, last = [], part
        for k in range(1, count + 1):
            low = part.low - k * NOTCH * (edge == "low")
            high = part.high + k * NOTCH * (edge == "high")
            low, high = _edges(low, high)
            one = replace(part, low=low, high=high)
            if one != last:
                chain.append(one)
            last = one
        if chain:
            yield edge, chain


def _all_wider(parts: Sequence[Any]) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
    """All of several in one move, which one at a time would be a trial for each notch of each."""
    ways = [dict(_wider(part)) for part in parts]
    for edge in ("low", "high"):
        chains = [[part, *way.get(edge, ())] for part, way in zip(parts, ways)]
        longest = max(map(len, chains), default=0)
        if sum(len(chain) > 1 for chain in chains) > 1:
            yield (
                edge,
                [tuple(c[min(k, len(c) - 1)] for c in chains) for k in range(1, longest)],
            )


def _narrower(part: Any) -> Iterator[Any]:
    for low, high in ((part.low + NOTCH, part.high), (part.low, part.high - NOTCH)):
        low, high = _edges(low, high)
        if low < high:
            yield replace(part, low=low, high=high)
