# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Rows of whole runs, as ``frontier.py`` writes them: one method of one case, lists with an entry
per image."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from mmagic_tome.lab.measure import Interval, interval, ratios

#: What a row has of each image.
KEPT = ("seconds", "baseline_seconds", "error", "psnr", "predicted", "operations", "held_out")


def known(data: Path) -> list[dict[str, Any]]:
    """The rows that are in a file; none if it is not there."""
    return json.loads(data.read_text())["rows"] if data.exists() else []


def paired(row: dict[str, Any]) -> Interval:
    """How many times as fast as the baseline of the same image: the median, and the interval of
    that."""
    return interval(ratios(row["baseline_seconds"], row["seconds"]))


def speedup(row: dict[str, Any]) -> float:
    """How many times as fast as the baseline, the median over images."""
    return paired(row).median


def saved(row: dict[str, Any]) -> float:
    """How many times fewer operations than the baseline, of all images."""
    return 1 / mean(row["operations"])


def is_fewer_steps(row: dict[str, Any]) -> bool:
    """Whether a row is the baseline with fewer steps."""
    return re.fullmatch(r"\d+ steps", row["method"]) is not None


def fewer_at(
    rows: Iterable[dict[str, Any]],
    factor: float,
    by: Callable[[dict[str, Any]], float] = speedup,
) -> float | None:
    """Mean PSNR of fewer steps at a speed-up.

    It is on the line between the two nearest numbers of steps, along the logarithm of the speed-up;
    None beyond what was measured.

    Args:
        rows: Of one case.
        factor: The speed-up.
        by: What it means: :func:`speedup` or :func:`saved`.
    """
    points = sorted((by(row), mean(row["psnr"])) for row in rows if is_fewer_steps(row))
    for (low, a), (high, b) in zip(points, points[1:]):
        if low <= factor <= high:
            return a + (b - a) * math.log(factor / low) / max(math.log(high / low), 1e-9)
    return None


def advantage(
    rows: Iterable[dict[str, Any]],
    row: dict[str, Any],
    by: Callable[[dict[str, Any]], float] = speedup,
) -> float | None:
    """Mean PSNR above that of fewer steps in the same time, dB; None for fewer steps themselves and
    beyond what was measured of them.

    Args:
        rows: Of the same case.
        row: One of them.
        by: As of :func:`fewer_at`; with :func:`saved` fewer steps of as many operations.
    """
    other = None if is_fewer_steps(row) else fewer_at(rows, by(row), by)
    return None if other is None else mean(row["psnr"]) - other
