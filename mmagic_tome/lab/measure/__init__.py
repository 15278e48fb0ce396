# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The measuring core: the only clock, order of runs, interval, memory and FLOPs of the lab.

A speed-up is always measured the same way: all methods run once per round, in a balanced order
(:func:`interleaved`); seconds are divided within each round (:func:`ratios`); and the median ratio
is stated with the interval of the sign test (:func:`interval`).
"""

from .clock import Clock, StepMarks, synchronize
from .flops import count_flops, count_flops_of
from .interval import FEWEST_ROUNDS, Interval, interval, ratios
from .memory import peak_memory
from .rounds import balanced_order, interleaved

__all__ = [
    "FEWEST_ROUNDS",
    "Clock",
    "Interval",
    "StepMarks",
    "balanced_order",
    "count_flops",
    "count_flops_of",
    "interleaved",
    "interval",
    "peak_memory",
    "ratios",
    "synchronize",
]
