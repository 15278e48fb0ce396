# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The table of a run, from its rows alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from .measure import Interval, interval, ratios
from .methods import BASELINE
from .metrics.base import Metric
from .results import RunFolder

Row = dict[str, Any]


def table(folder: RunFolder) -> pd.DataFrame:
    """One row per method, the baseline first, unrounded.

    Columns:

    - ``method``, ``label``, ``images`` (those that are finite);
    - those of :func:`timing`, of seconds per image, and ``network_seconds``, ``network_speedup``;
    - ``memory``: peak bytes per image of tensors above the weights; ``flops`` per image;
    - per metric its mean under its name; of those of single images also ``<metric>_worst`` and
      ``<metric>_p5``, which 5 % of the images are worse than; of sets what else belongs to it;
    - ``predicted_error``: the mean of what step caching with a tolerance predicted for the relative
      error of the final latents, which ``latent_error`` measures;
    - ``relative_error`` of a network's output, in a benchmark.

    Columns of what was not measured are missing, and so are methods that could not run.
    """
    manifest = folder.manifest
    found, metrics = _grouped(folder), metrics_of(manifest)
    rows = []
    for name, method in manifest.get("methods", {}).items():
        row: Row = {}
        images = found["image", name, None]
        if images:
            row["images"] = len({one["number"] for one in images if one["finite"]})
        both = [found["round", one, None] for one in (BASELINE.name, name)]
        row.update(timing(*(_seconds(rounds, "seconds") for rounds in both)))
        network = timing(*(_seconds(rounds, "network_seconds") for rounds in both))
        if network:
            row.update(network_seconds=network["seconds"], network_speedup=network["speedup"])
        for one in found["memory", name, None]:
            row["memory"] = one["run_bytes"] / one["images"]
            if "relative_error" in one:
                row["relative_error"] = one["relative_error"]
        for one in found["flops", name, None]:
            row["flops"] = one["run"] / one["images"]
        for key, metric in metrics.items():
            row.update(_quality(metric, found["metric", name, key]))
        predicted = [one.get("predicted_error") for one in images]
        if predicted and None not in predicted:
            row["predicted_error"] = float(np.mean(predicted))
        if row:
            rows.append({"method": name, "label": method["label"], **row})
    return pd.DataFrame(rows)


def _grouped(folder: RunFolder) -> dict[tuple[str, str | None, str | None], list[Row]]:
    """The rows of every kind, method and metric."""
    groups = defaultdict(list)
    for row in folder.rows:
        groups[row["kind"], row.get("method"), row.get("metric")].append(row)
    return groups


def _seconds(rounds: list[Row], key: str) -> dict[int, float]:
    """Number of a round -> seconds per image."""
    return {one["turn"]: one[key] / one["images"] for one in rounds if key in one}


def timing(base: Mapping[int, float], seconds: Mapping[int, float]) -> Row:
    """How fast a method was; empty without rounds.

    Args:
        base, seconds: Number of the round -> seconds, of the baseline and of the method. Rounds
            that both have are compared: methods may have been added later.

    Returns:
        dict: ``seconds`` (the median), ``speedup`` over the baseline (the median of the ratios
        within rounds) with its interval ``speedup_low``, ``speedup_high`` and ``coverage``,
        ``certain`` (whether the interval excludes 1) and ``rounds``.
    """
    turns = sorted(set(base) & set(seconds))
    if not turns:
        return {}
    own = [seconds[turn] for turn in turns]
    speedup = interval(ratios([base[turn] for turn in turns], own))
    return {
        "rounds": len(turns),
        "seconds": median(own),
        "speedup": speedup.median,
        "speedup_low": speedup.low,
        "speedup_high": speedup.high,
        "coverage": speedup.coverage,
        "certain": speedup.excludes(1),
    }


def speedup_text(row: Mapping[str, Any]) -> str:
    """The speed-up of a row of :func:`table` with its interval, see ``Interval.text``."""
    ends = [row[f"speedup{end}"] for end in ("", "_low", "_high")]
    return Interval(*ends, row["coverage"], int(row["rounds"])).text()


def metrics_of(manifest: Mapping[str, Any]) -> dict[str, Metric]:
    """The metrics that a run was measured by, as far as its table needs them."""
    return {
        name: Metric(name, about["label"], None, about["unit"], about["higher_is_better"])
        for name, about in manifest.get("metrics", {}).items()
    }


def _quality(metric: Metric, rows: list[Row]) -> Row:
    if not rows:
        return {}
    if rows[-1]["number"] is None:
        return {metric.name: rows[-1]["value"], **rows[-1]["others"]}
    values = [row["value"] for row in rows if row["value"] is not None]
    return metric.figures(values) if values else {}
