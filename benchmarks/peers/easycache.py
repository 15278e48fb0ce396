# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""EasyCache (arXiv 2507.02860), and UCache, its variant for UNets in stable-diffusion.cpp.

A skipped output is the present input plus what the last computed call added to its input,
``x + (output - input)`` (equation 5). The network's output is predicted to change ``rate`` times as
much as its input, the ratio that was measured between the last two computed steps; these changes,
relative to the output, add up until they reach the threshold, and then a step is computed. Changes
and sizes are mean absolute values.

UCache measures a step's change from the last *computed* input, makes it larger with every skip in a
row, and compares it to a mixture of the output's size and of its usual change; the threshold is
halved during the first fifth of the run's steps and 1.5 times as large during the last one
(documentation and source of stable-diffusion.cpp, MIT; "computed steps so far" counts).
"""

from __future__ import annotations

from torch import Tensor

from mmagic_tome.lab.methods import Method

from .skipping import Call, History, Peer, as_method, check, in_window, mean_abs


def predicted_change(rate: float, moved: float, size: float) -> float:
    """The output's predicted change relative to its size.

    Args:
        rate: change of the output per change of the input.
        moved: change of the input.
        size: of the output.
    """
    return rate * moved / max(size, 1e-12)


def measured_rate(inputs: list[Tensor], outputs: list[Tensor]) -> float:
    """Change of the output per change of the input, between the last two computed steps."""
    moved = mean_abs(inputs[-1] - inputs[-2])
    return mean_abs(outputs[-1] - outputs[-2]) / max(moved, 1e-12)


class EasyCache(Peer):
    """See the module.

    Args:
        threshold: of the accumulated relative change; 0 skips nothing.
        start, end: shares of the run between which steps may be skipped. The authors' code
            computes the first ten of fifty steps and the last one.
    """

    def __init__(self, threshold: float = 0.1, start: float = 0.2, end: float = 1.0) -> None:
        check("threshold", threshold, 0)
        check("start", start, 0, end)
        self.threshold, self.start, self.end = threshold, start, end
        self.rate: float | None = None
        self.sum = 0.0
        self.last: Tensor | None = None  # input of the step before, whether computed or skipped

    def skips(self, call: Call, history: History) -> bool:
        before, self.last = self.last, call.sample
        open_ = in_window(call, self.start, self.end) and call.step < call.steps - 1
        if not open_ or self.rate is None:
            self.sum = 0.0
            return False
        moved, size = mean_abs(call.sample - before), mean_abs(history.outputs[-1])
        self.sum += predicted_change(self.rate, moved, size)
        if self.sum < self.threshold:
            return True
        self.sum = 0.0
        return False

    def computed(self, call: Call, history: History) -> None:
        if not call.branch and len(history.steps) > 1:
            self.rate = measured_rate(history.inputs, history.outputs)

    def estimate(self, call: Call, history: History) -> Tensor:
        return call.sample + (history.outputs[-1] - history.inputs[-1])


def ucache_change(rate: float, moved: float, size: float, usual: float, in_a_row: int) -> float:
    """UCache's relative change of an output.

    Args:
        rate, moved, size: as in :func:`predicted_change`.
        usual: moving average of the output's change between computed steps; 0 if unknown.
        in_a_row: skipped steps since the last computed one.
    """
    scale = (size * 1.6 * usual) ** 0.5 if usual else size
    return rate * moved / max(scale, 1e-12) * (1 + 0.5 * in_a_row)


class UCache(EasyCache):
    """See the module; arguments as of :class:`EasyCache`.

    Args:
        decay: what is left of the sum at each step.
        reset: whether a computed step resets the sum.
    """

    def __init__(
        self,
        threshold: float = 1.0,
        start: float = 0.15,
        end: float = 0.95,
        decay: float = 1.0,
        reset: bool = True,
    ) -> None:
        super().__init__(threshold, start, end)
        check("decay", decay, 0, 1)
        self.decay, self.reset = decay, reset
        self.usual, self.in_a_row, self.count = 0.0, 0, 0
        self.began: int | None = None  # computed steps before the window, which do not count

    def skips(self, call: Call, history: History) -> bool:
        if not in_window(call, self.start, self.end):
            return False
        if self.began is None:
            self.began = len(history.steps)
        if self.rate is None or len(history.steps) == self.began:
            return False
        moved, size = mean_abs(call.sample - history.inputs[-1]), mean_abs(history.outputs[-1])
        change = ucache_change(self.rate, moved, size, self.usual, self.in_a_row)
        self.sum = self.sum * self.decay + change
        done = self.count / call.steps
        if self.sum < self.threshold * (0.5 if done < 0.2 else 1.5 if done > 0.8 else 1.0):
            self.in_a_row += 1
            return True
        if self.reset:
            self.sum = 0.0
        return False

    def computed(self, call: Call, history: History) -> None:
        if call.branch or self.began is None:
            return
        self.count, self.in_a_row = self.count + 1, 0
        if len(history.steps) - self.began > 1:
            change = mean_abs(history.outputs[-1] - history.outputs[-2])
            self.usual = 0.8 * self.usual + 0.2 * change if self.usual else change
            self.rate = measured_rate(history.inputs, history.outputs)


def method(threshold: float = 0.1, name: str | None = None, **options: float) -> Method:
    """EasyCache; options of the class."""
    name = name or f"EasyCache {threshold:g}"
    return as_method(name, lambda: EasyCache(threshold, **options))


def ucache(threshold: float = 1.0, name: str | None = None, **options: float) -> Method:
    """UCache; options of the class."""
    return as_method(name or f"UCache {threshold:g}", lambda: UCache(threshold, **options))
