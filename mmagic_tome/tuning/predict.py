# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Seconds of a candidate without running it: the sum over its steps of what runs there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..cache.skip import skips_of_run
from ..timeline import in_range
from .space import Candidate


@dataclass(frozen=True)
class Costs:
    """What the parts of a network cost on a machine, a whole dense call being 1.

    Args:
        network_skipped: a call at which the network is skipped.
        inner_skipped: one at which its inner region is; None where it has none.
        rest: everything in a run but the network: text encoder, VAE, scheduler.
        merges: (target, level, ratio) -> what merging there adds to a call; below 0, it saves.
        inner_levels: levels of which all blocks are among the inner ones.
    """

    network_skipped: float
    inner_skipped: float | None
    rest: float
    merges: Mapping[tuple[str, int, float], float] = field(default_factory=dict)
    inner_levels: frozenset[int] = frozenset()


class Predictor:
    """Time of candidates, in dense calls of the network.

    Args:
        costs: of the machine.
        num_calls: calls of the network in one run.
    """

    def __init__(self, costs: Costs, num_calls: int) -> None:
        self.costs, self.num_calls = costs, num_calls
        self._known: dict[Candidate, float] = {}

    def time(self, candidate: Candidate) -> float:
        """Of a whole run, with everything around the network."""
        if candidate not in self._known:
            count = self.num_calls
            calls = (
                self._call(candidate, skipped, (count - 1 - step) / count)
                for step, skipped in enumerate(skips_of_run(candidate.caches, count))
            )
            self._known[candidate] = self.costs.rest + sum(calls)
        return self._known[candidate]

    def speedup(self, candidate: Candidate) -> float:
        """How many times faster than dense."""
        return (self.costs.rest + self.num_calls) / self.time(candidate)

    def fewer_steps(self, share: float) -> float:
        """Speed-up of the dense model with this share of its steps."""
        count = self.num_calls
        return (self.costs.rest + count) / (self.costs.rest + count * share)

    def _call(self, candidate: Candidate, skipped: set[str], remaining: float) -> float:
        costs, merge = self.costs, candidate.merge
        if "network" in skipped:
            return costs.network_skipped
        inner = "inner" in skipped
        total = costs.inner_skipped if inner else 1.0
        if merge is None:
            return total
        for part in merge.parts:
            acts = in_range(remaining, (part.low, part.high))
            if acts and not (inner and part.downsample in costs.inner_levels):
                total += costs.merges[merge.target, part.downsample, part.ratio]
        # What merging saves at levels that partly lie inside may be more than what is left.
        return max(total, costs.network_skipped)
