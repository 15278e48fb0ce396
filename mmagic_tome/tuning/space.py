# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What can be tuned, and the moves that make a candidate faster or slower.

A candidate does up to three things, each in a window of noise levels:

- ``network`` and ``deep``: leave the network, or its inner levels, out at some steps
  (option ``reuse``);
- ``merge``: merge tokens at some levels (option ``ratio``), each level in a window of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..config import ToMeConfig
from ..presets import with_preset
from ..reuse import SCOPES, Reuse

# Width of one move of a window's edge, in noise levels.
NOTCH = 0.1
# A part that runs at every fifth step or more rarely is foretold from too far away.
MOST_STEPS = 4
RATIOS = (0.25, 0.5, 0.75)
# Nothing and half: the share that the presets repay.
REPAY = (0.5, 0.0)
# Steps that a plan of merging serves: matching is a large part of what merging costs.
REFRESH = 2


@dataclass(frozen=True)
class Window:
    """A part of the network that is left out.

    Args:
        steps: it runs at every this many steps.
        low, high: noise levels between which it is left out, 1 = pure noise.
        repay: share of what was foretold wrongly that is made good at the next run.
    """

    steps: int
    low: float
    high: float
    repay: float = 0.0


@dataclass(frozen=True)
class Part:
    """Token merging at one level.

    Args:
        level: how many times coarser its grid is than the finest one.
        ratio: of its tokens.
        low, high: noise levels between which they are merged.
    """

    level: int
    ratio: float
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Merge:
    """Token merging.

    Args:
        site: kind of site, as in ``ToMeConfig(sites=...)``.
        parts: one for every level with merging, by level.
        proportional: whether attention knows how many tokens its keys stand for.
    """

    site: str
    parts: tuple[Part, ...]
    proportional: bool = False

    def at(self, level: int) -> Part | None:
        """The part of a level."""
        return next((part for part in self.parts if part.level == level), None)

    def with_part(self, part: Part) -> Merge:
        """With another part at a level, or one more."""
        held = {one.level: one for one in self.parts} | {part.level: part}
        return replace(self, parts=tuple(held[level] for level in sorted(held)))


@dataclass(frozen=True)
class Candidate:
    """A setting; the empty one is the dense model.

    Args:
        network, deep: what is left out, or None.
        merge: what is merged, or None.
        order: of the line or curve on which left-out outputs are foretold.
    """

    network: Window | None = None
    deep: Window | None = None
    merge: Merge | None = None
    order: int = 1

    def options(self) -> dict[str, Any]:
        """Options of a :class:`~mmagic_tome.config.ToMeConfig`; of JSON's types but for levels."""
        options: dict[str, Any] = {"ratio": 0}
        if self.merge is not None:
            merge = self.merge
            options["ratio"] = {"level": {part.level: part.ratio for part in merge.parts}}
            windows = {part.level: [part.low, part.high] for part in merge.parts}
            first = next(iter(windows.values()))
            if any(window != first for window in windows.values()):
                narrow = {k: {"between": w} for k, w in windows.items() if w != [0.0, 1.0]}
                options["ratio"]["noise"] = {"level": narrow}
            elif first != [0.0, 1.0]:
                options["ratio"]["noise"] = {"between": first}
            options["sites"] = [merge.site]
            options["max_downsample"] = max(windows)
            options["refresh"] = {"steps": REFRESH}
            if merge.proportional:
                options["proportional"] = True
        reuse = {}
        for name in SCOPES:
            window = getattr(self, name)
            if window is not None:
                reuse[name] = {"steps": window.steps, "between": [window.low, window.high]}
                if window.repay:
                    reuse[name]["repay"] = window.repay
                if self.order != 1:
                    reuse[name]["order"] = self.order
        if reuse:
            options["reuse"] = reuse
        return options

    def config(self) -> ToMeConfig:
        """The same as a validated config."""
        return ToMeConfig.from_dict(self.options())

    @property
    def dense(self) -> bool:
        """Whether it changes nothing."""
        return self.network is None and self.deep is None and self.merge is None

    def text(self) -> str:
        """A few words, for tables."""
        words = []
        for name in SCOPES:
            window = getattr(self, name)
            if window is not None:
                repay = f" repay {window.repay:g}" if window.repay else ""
                words.append(f"{name} 1/{window.steps} in {window.low:g}-{window.high:g}{repay}")
        if self.merge is not None:
            merge = self.merge
            levels = ", ".join(
                f"/{part.level}: {part.ratio:g} in {part.low:g}-{part.high:g}"
                for part in merge.parts
            )
            weighed = " proportional" if merge.proportional else ""
            words.append(f"merge {merge.site} {levels}{weighed}")
        return "; ".join(words) or "dense"


def candidate_of(options: Mapping[str, Any]) -> Candidate | None:
    """The candidate that options stand for; None where they say what no candidate can.

    Args:
        options: of a ToMeConfig, such as ``dict(preset='fast')``.
    """
    options = with_preset(options)
    if options.pop("ratio", None) != 0:
        return None
    reuse = Reuse.coerce(options.pop("reuse", None))
    if options or reuse is None or reuse.outer != 1:
        return None
    scopes = reuse.scopes
    orders = {scope.order for scope in scopes.values()}
    if len(orders) != 1:
        return None
    windows = {n: Window(s.steps, *s.between, s.repay) for n, s in scopes.items()}
    candidate = Candidate(**windows, order=orders.pop())
    return candidate if candidate.config().reuse_plan == reuse else None


@dataclass(frozen=True)
class Space:
    """What a search may do to a model on this machine.

    Args:
        scopes: of 'network' and 'deep', those that can be left out.
        merges: site -> level -> ratios, ascending, of merging that saves time here.
        order: of every candidate.
        proportional: of the sites in ``merges``, those where attention is told how many tokens
            its keys stand for: as fast, and nearer to dense.
    """

    scopes: tuple[str, ...]
    merges: Mapping[str, Mapping[int, tuple[float, ...]]] = field(default_factory=dict)
    order: int = 1
    proportional: tuple[str, ...] = ()

    @property
    def dense(self) -> Candidate:
        """Where a search starts."""
        return Candidate(order=self.order)

    def holds(self, candidate: Candidate) -> bool:
        """Whether a candidate does nothing that this space leaves out."""
        scopes = all(getattr(candidate, name) is None or name in self.scopes for name in SCOPES)
        return scopes and candidate.order == self.order

    def fastest(self) -> list[Candidate]:
        """The far ends of the space; one of them is the fastest candidate."""
        everything = Window(MOST_STEPS, 0.0, 1.0)
        base = replace(self.dense, **dict.fromkeys(self.scopes, everything))
        merges = [
            self._merge(site, (Part(level, table[level][-1]) for level in sorted(table)))
            for site, table in self.merges.items()
        ]
        return [base, *(replace(base, merge=merge) for merge in merges)]

    def _merge(self, site: str, parts: Iterable[Part]) -> Merge:
        return Merge(site, tuple(parts), site in self.proportional)

    def faster(self, candidate: Candidate) -> Iterator[tuple[str, list[Candidate]]]:
        """Moves that make a candidate faster.

        Yields:
            Name of the move, and the candidates that it leads to, the nearest first: the first of
            them that is faster is meant. A window's edge may have to move several notches to
            reach the next step of the sampler.
        """
        for name in self.scopes:
            window = getattr(candidate, name)
            if window is None:
                # Outputs that noise moves about lie on no line between their neighbours.
                repay = REPAY[0] if self.order else 0.0
                edges = [_edges(0.5 - k * NOTCH, 0.5 + k * NOTCH) for k in range(1, 6)]
                starts = [Window(2, *pair, repay) for pair in edges]
                yield f"{name}: in", [replace(candidate, **{name: start}) for start in starts]
                continue
            for edge, windows in _wider(window):
                yield f"{name}: {edge}", [replace(candidate, **{name: one}) for one in windows]
            if window.steps < MOST_STEPS:
                more = replace(window, steps=window.steps + 1)
                yield f"{name}: steps", [replace(candidate, **{name: more})]
        yield from self._more_merging(candidate)

    def _more_merging(self, candidate: Candidate) -> Iterator[tuple[str, list[Candidate]]]:
        merge = candidate.merge
        for site, table in self.merges.items():
            if merge is not None and site != merge.site:
                continue
            now = merge or self._merge(site, ())
            for level, ratios in table.items():
                part, name = now.at(level), f"merge {site} at {level}"
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
            yield f"merge: at {other.merge.site} instead", [other]

    def elsewhere(self, candidate: Candidate) -> Iterator[Candidate]:
        """The same merging at the other sites, at the nearest ratios that there are."""
        merge = candidate.merge
        for site, table in self.merges.items() if merge is not None else ():
            if site == merge.site:
                continue
            parts = [
                replace(one, ratio=min(table[one.level], key=lambda r, one=one: abs(r - one.ratio)))
                for one in merge.parts
                if one.level in table
            ]
            if parts:
                yield replace(candidate, merge=self._merge(site, parts))

    def alike(self, candidate: Candidate) -> Iterator[Candidate]:
        """Neighbours that take as long."""
        for name in self.scopes:
            window = getattr(candidate, name)
            for repay in REPAY if window is not None and self.order else ():
                if repay != window.repay:
                    yield replace(candidate, **{name: replace(window, repay=repay)})

    def slower(self, candidate: Candidate) -> Iterator[Candidate]:
        """Neighbours that do one thing less."""
        for name in SCOPES:
            window = getattr(candidate, name)
            if window is None:
                continue
            for narrower in _narrower(window):
                yield replace(candidate, **{name: narrower})
            if window.steps > 2:
                yield replace(candidate, **{name: replace(window, steps=window.steps - 1)})
            yield replace(candidate, **{name: None})
        merge = candidate.merge
        if merge is None:
            return
        for part in merge.parts:
            for narrower in _narrower(part):
                yield replace(candidate, merge=merge.with_part(narrower))
        for part in merge.parts:
            ratios = self.merges.get(merge.site, {}).get(part.level, ())
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
