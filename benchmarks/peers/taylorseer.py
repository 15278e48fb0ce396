# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""TaylorSeer: From Reusing to Forecasting (arXiv 2503.06923), on the network's output.

Of every ``interval`` steps one is computed; others are a Taylor expansion about the last computed
one. Derivatives are finite differences, each order from the one below at the last two computed
steps. The paper expands every module's output; expanding the last output only needs the least
memory and is offered as its "lite" form. The first three steps are always computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import factorial

from torch import Tensor

from mmagic_tome.lab.methods import Method

from .skipping import Call, History, Peer, as_method, check


def update_derivatives(old: Sequence[Tensor], new: Tensor, distance: int, order: int) -> list:
    """Derivatives per step at a newly computed step, the output itself first.

    Args:
        old: the same at the computed step before; [] at the first one.
        new: the output.
        distance: steps between both.
        order: highest derivative.
    """
    found = [new]
    for below in old[:order]:
        found.append((found[-1] - below) / distance)
    return found


def expand(derivatives: Sequence[Tensor], distance: int) -> Tensor:
    """The Taylor polynomial, ``distance`` steps after the computed step."""
    return sum(one * (distance**order / factorial(order)) for order, one in enumerate(derivatives))


class TaylorSeer(Peer):
    """See the module. ``interval``: steps per computed step; 1 skips nothing."""

    def __init__(self, order: int = 1, interval: int = 2, warmup: int = 3) -> None:
        check("order", order, 0)
        check("interval", interval, 1)
        check("warmup", warmup, 1)
        self.order, self.interval, self.warmup = order, interval, warmup
        self.in_a_row = 0
        self.derivatives: dict[int, list[Tensor]] = {}  # per branch

    def skips(self, call: Call, history: History) -> bool:
        skip = call.step >= self.warmup and self.in_a_row < self.interval - 1
        self.in_a_row = self.in_a_row + 1 if skip else 0
        return skip

    def computed(self, call: Call, history: History) -> None:
        distance = history.steps[-1] - history.steps[-2] if len(history.steps) > 1 else 1
        old = self.derivatives.get(call.branch, [])
        new = update_derivatives(old, history.outputs[-1], distance, self.order)
        self.derivatives[call.branch] = new

    def estimate(self, call: Call, history: History) -> Tensor:
        return expand(self.derivatives[call.branch], call.step - history.steps[-1])


def method(order: int = 1, interval: int = 2, warmup: int = 3) -> Method:
    """TaylorSeer; options of :class:`TaylorSeer`."""
    return as_method(
        f"TaylorSeer order {order}, {interval}", lambda: TaylorSeer(order, interval, warmup)
    )
