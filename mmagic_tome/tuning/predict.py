# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Seconds of a candidate without running it: the sum over its steps of what runs there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..config import ToMeConfig
from ..reuse import ScopeState, foretold
from ..temporal import Lanes
from .space import Candidate


def left_out(
    config: ToMeConfig, times: Sequence[float | None], levels: Sequence[float | None]
) -> list[frozenset[str]]:
    """The scopes that are left out at every call of a network.

    It asks the code that decides while a model runs, with the timesteps alone.

    Args:
        config: with or without ``reuse``.
        times, levels: timestep and noise level of every call of one denoising run.
    """
    plan = config.reuse_plan
    scopes = {} if plan is None else plan.scopes
    states = [ScopeState(name, scope, modules=[None]) for name, scope in scopes.items()]
    lanes, found = Lanes(), []
    for time, level in zip(times, levels):
        lanes.begin_step(time, key=None)
        run = lanes.run
        out = foretold(states, run, level)
        if "network" in out:
            run.leave_out()
        for state in states:
            if state.name not in out and "network" not in out:
                kept = run.kept.get((state.name, 0), [])
                # As many as a run keeps of the true outputs.
                run.kept[state.name, 0] = [*kept, time][-1 - state.options.order :]
        found.append(out)
    return found


@dataclass(frozen=True)
class Costs:
    """What the parts of a network cost on a machine, a whole dense call being 1.

    Args:
        foretold: a call at which the network is left out.
        shallow: one at which its inner levels are; None where it has none.
        rest: everything in a run but the network: text encoder, VAE, sampler.
        merges: (site, level, ratio) -> what merging there adds to a call; below 0, it saves.
        deep_levels: levels of which all blocks are among the inner ones.
    """

    foretold: float
    shallow: float | None
    rest: float
    merges: Mapping[tuple[str, int, float], float] = field(default_factory=dict)
    deep_levels: frozenset[int] = frozenset()


class Predictor:
    """Time of candidates, in dense calls of the network.

    Args:
        costs: of the machine.
        times, levels: see :func:`left_out`.
    """

    def __init__(
        self, costs: Costs, times: Sequence[float | None], levels: Sequence[float | None]
    ) -> None:
        self.costs, self.times, self.levels = costs, times, levels
        self._known: dict[Candidate, float] = {}

    def time(self, candidate: Candidate) -> float:
        """Of a whole run, with everything around the network."""
        if candidate not in self._known:
            out = left_out(candidate.config(), self.times, self.levels)
            calls = (self._call(candidate, *one) for one in zip(out, self.levels))
            self._known[candidate] = self.costs.rest + sum(calls)
        return self._known[candidate]

    def speedup(self, candidate: Candidate) -> float:
        """How many times faster than dense."""
        return (self.costs.rest + len(self.times)) / self.time(candidate)

    def fewer_steps(self, share: float) -> float:
        """Speed-up of the dense model with this share of its steps."""
        count = len(self.times)
        return (self.costs.rest + count) / (self.costs.rest + count * share)

    def _call(self, candidate: Candidate, out: frozenset[str], level: float | None) -> float:
        costs, merge = self.costs, candidate.merge
        if "network" in out:
            return costs.foretold
        deep = "deep" in out
        total = costs.shallow if deep else 1.0
        if merge is None:
            return total
        for part in merge.parts:
            acts = level is None or part.low <= min(level, 1) <= part.high
            if acts and not (deep and part.level in costs.deep_levels):
                total += costs.merges[merge.site, part.level, part.ratio]
        # What merging saves at levels that partly lie inside may be more than what is left.
        return max(total, costs.foretold)
