# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What the rows of a frontier say: speed-up, and the advantage over fewer steps.

A row is a method in one case: lists of ``seconds``, ``baseline_seconds`` and ``psnr``, an entry per
image; or ``failed``, why it does not run. ``frontier.py`` measures them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from statistics import mean
from typing import Any

from mmagic_tome.lab.measure import Interval, interval, ratios

Row = Mapping[str, Any]


def paired(row: Row) -> Interval:
    """How many times as fast as the baseline: each image beside the baseline's of the same turn."""
    return interval(ratios(row["baseline_seconds"], row["seconds"]))


def speedup(row: Row) -> float:
    """How many times as fast as the baseline, the median over images."""
    return paired(row).median


def is_fewer_steps(row: Row) -> bool:
    """Whether a row is the baseline with fewer steps."""
    return re.fullmatch(r"\d+ steps", row["method"]) is not None


def fewer_at(rows: Iterable[Row], factor: float) -> float | None:
    """Mean PSNR of fewer steps at a speed-up, on the line between the two nearest numbers of
    steps; None beyond what was measured."""
    points = sorted((speedup(row), mean(row["psnr"])) for row in rows if is_fewer_steps(row))
    for (low, a), (high, b) in itertools.pairwise(points):
        if low <= factor <= high:
            return a + (b - a) * (factor - low) / max(high - low, 1e-9)
    return None


def advantage(rows: Iterable[Row], row: Row) -> float | None:
    """Mean PSNR above that of fewer steps in the same time, dB; None for fewer steps themselves and
    beyond what was measured of them.

    Args:
        rows: Of the same case.
        row: One of them.
    """
    other = None if is_fewer_steps(row) else fewer_at(rows, speedup(row))
    return None if other is None else mean(row["psnr"]) - other
