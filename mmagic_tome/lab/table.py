# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The table of a run, from its rows alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from .measure import interval, ratios
from .methods import BASELINE
from .metrics.base import Metric
from .results import RunFolder

Row = dict[str, Any]


def table(folder: RunFolder) -> pd.DataFrame:
    """One row per method, the baseline first, unrounded.

    Columns:

    - ``method``, ``label``, ``images`` (those that are finite);
    - of interleaved rounds ``seconds`` per image (the median), ``speedup`` over the baseline (the
      median of the ratios within rounds) with its interval ``speedup_low``, ``speedup_high`` and
      ``certain`` (whether the interval excludes 1; None for the baseline), ``network_seconds`` and
      ``network_speedup``, ``rounds``;
    - ``memory`` and ``network_memory``: peak bytes per image of tensors above the weights, of a run
      and of its network's calls; ``flops`` and ``network_flops`` per image;
    - per metric its mean under its name; of those of single images also ``<metric>_worst`` and
      ``<metric>_p5``, which 5 % of the images are worse than; of sets what else belongs to it.

    Columns of what was not measured are missing.
    """
    manifest = folder.manifest
    found = _grouped(folder)
    base = _by_turn(found["round", BASELINE.name, None])
    rows = []
    for name, method in manifest.get("methods", {}).items():
        images = {row["number"] for row in found["image", name, None] if row["finite"]}
        row: Row = {"method": name, "label": method["label"], "images": len(images)}
        row.update(_time(base, _by_turn(found["round", name, None]), name == BASELINE.name))
        for one in found["memory", name, None]:
            row["memory"] = one["run_bytes"] / one["images"]
            row["network_memory"] = one["network_bytes"] / one["images"]
        for one in found["flops", name, None]:
            row["flops"] = one["run"] / one["images"]
            row["network_flops"] = one["network"] / one["images"]
        for metric, about in manifest.get("metrics", {}).items():
            row.update(_quality(metric, about, found["metric", name, metric]))
        rows.append(row)
    return pd.DataFrame(rows)


def _grouped(folder: RunFolder) -> dict[tuple[str, str | None, str | None], list[Row]]:
    """The rows of every kind, method and metric."""
    groups = defaultdict(list)
    for row in folder.rows:
        groups[row["kind"], row.get("method"), row.get("metric")].append(row)
    return groups


def _by_turn(rounds: list[Row]) -> dict[int, Row]:
    return {row["turn"]: row for row in rounds}


def _time(base: Mapping[int, Row], rounds: Mapping[int, Row], is_base: bool) -> Row:
    """Compare rounds that both have: methods may have been added later."""
    turns = sorted(set(base) & set(rounds))
    if not turns:
        return {}
    found: Row = {}
    for prefix in ("", "network_"):
        seconds = [rounds[turn][f"{prefix}seconds"] for turn in turns]
        speedups = ratios([base[turn][f"{prefix}seconds"] for turn in turns], seconds)
        speedup = interval(speedups)
        per_image = [rounds[turn][f"{prefix}seconds"] / rounds[turn]["images"] for turn in turns]
        found[f"{prefix}seconds"] = float(np.median(per_image))
        found[f"{prefix}speedup"] = speedup.median
        if not prefix:
            found["speedup_low"], found["speedup_high"] = speedup.low, speedup.high
            found["certain"] = None if is_base else speedup.excludes(1)
    return {**found, "rounds": len(turns)}


def _quality(name: str, about: Mapping[str, Any], rows: list[Row]) -> Row:
    if not rows:
        return {}
    if rows[-1]["number"] is None:
        return {name: rows[-1]["value"], **rows[-1]["others"]}
    values = np.array([row["value"] for row in rows if row["value"] is not None])
    if not len(values):
        return {}
    metric = Metric(name, about["label"], function=None, unit=about["unit"])
    # From the worst on; an image's own value, since that of identical images may be infinite.
    ordered = np.sort(values)[:: 1 if about["higher_is_better"] else -1]
    return {
        name: metric.mean(values),
        f"{name}_worst": ordered[0],
        f"{name}_p5": ordered[int(0.05 * (len(ordered) - 1))],
    }
