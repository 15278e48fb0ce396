# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""ZEUS: Accelerating Diffusion Models with Only Second-Order Predictor (arXiv 2604.01552).

Of every ``interval`` steps the first is computed. A skipped output is extrapolated from the last
computed one and its backward difference, ``2 * last - before``. In a run of skips no two
extrapolations follow each other: the extrapolated output and the last computed one alternate.

The predictor and the interleaving are those of the abstract and the project's page; settings are
those of its examples (50 steps, the window between steps 10 and 45). The published method counts in
steps of one, whatever lies between the two outputs, so the slope after a run of skips is as many
times too steep; the output that is held afterwards makes up for it. ``spaced=True`` divides by the
true spacing (our reading of what a backward difference should be).
"""

from __future__ import annotations

from torch import Tensor

from mmagic_tome.lab.methods import Method

from .skipping import Call, History, Peer, as_method, check, in_window


def line(last: Tensor, before: Tensor, distance: float = 1.0) -> Tensor:
    """The second-order predictor: on the line through the last two outputs, ``distance`` times
    their spacing ahead."""
    return last + distance * (last - before)


class Zeus(Peer):
    """See the module. ``interval``: steps per computed step; 1 skips nothing."""

    def __init__(
        self, interval: int = 3, start: float = 0.2, end: float = 0.9, spaced: bool = False
    ) -> None:
        check("interval", interval, 1)
        check("start", start, 0, end)
        self.interval, self.start, self.end, self.spaced = interval, start, end, spaced
        self.in_a_row = 0

    def skips(self, call: Call, history: History) -> bool:
        skip = (
            call.step % self.interval > 0
            and in_window(call, self.start, self.end)
            and len(history.steps) > 1
        )
        self.in_a_row = self.in_a_row + 1 if skip else 0
        return skip

    def estimate(self, call: Call, history: History) -> Tensor:
        last = history.outputs[-1]
        if len(history.steps) < 2 or self.in_a_row % 2 == 0:
            return last
        # The third, fifth ... skip of a run returns what the first one did.
        distance = 1.0
        if self.spaced:
            distance /= history.steps[-1] - history.steps[-2]
        return line(last, history.outputs[-2], distance)


def method(interval: int = 3, name: str | None = None, **options: float) -> Method:
    """ZEUS; options of :class:`Zeus`."""
    name = name or f"ZEUS {interval}" + (" spaced" if options.get("spaced") else "")
    return as_method(name, lambda: Zeus(interval, **options))
