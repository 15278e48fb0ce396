# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The table of a run, from its rows alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import median
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
    - those of :func:`timing`, of seconds per image, and ``network_seconds``, ``network_speedup``;
    - ``memory`` and ``network_memory``: peak bytes per image of tensors above the weights, of a run
      and of its network's calls; ``flops`` and ``network_flops`` per image;
    - per metric its mean under its name; of those of single images also ``<metric>_worst`` and
      ``<metric>_p5``, which 5 % of the images are worse than; of sets what else belongs to it;
    - ``predicted_error``: the mean of what step caching with a tolerance predicted for the relative
      error of the final latents, which ``latent_error`` measures.

    Columns of what was not measured are missing.
    """
    manifest = folder.manifest
    found = _grouped(folder)
    rows = []
    for name, method in manifest.get("methods", {}).items():
        images = {row["number"] for row in found["image", name, None] if row["finite"]}
        row: Row = {"method": name, "label": method["label"], "images": len(images)}
        for prefix in ("", "network_"):
            both = (
                {one["turn"]: one[f"{prefix}seconds"] / one["images"] for one in rounds}
                for rounds in (found["round", BASELINE.name, None], found["round", name, None])
            )
            times = timing(*both)
            chosen = ("seconds", "speedup") if prefix else times
            row.update({f"{prefix}{key}": times[key] for key in chosen if key in times})
        for one in found["memory", name, None]:
            row["memory"] = one["run_bytes"] / one["images"]
            row["network_memory"] = one["network_bytes"] / one["images"]
        for one in found["flops", name, None]:
            row["flops"] = one["run"] / one["images"]
            row["network_flops"] = one["network"] / one["images"]
        for metric, about in manifest.get("metrics", {}).items():
            row.update(_quality(metric, about, found["metric", name, metric]))
        predicted = [one.get("predicted_error") for one in found["image", name, None]]
        if predicted and None not in predicted:
            row["predicted_error"] = float(np.mean(predicted))
        rows.append(row)
    return pd.DataFrame(rows)


def image_table(folder: RunFolder) -> pd.DataFrame:
    """One row per image: ``method``, ``number``, ``prompt``, ``seed``, the metrics of single
    images, None where it is not finite, and ``predicted_error``, see :func:`table`."""
    images: dict[tuple[str, int], Row] = {}
    for row in folder.find(kind="image"):
        keys = ("method", "number", "prompt", "seed")
        images[row["method"], row["number"]] = {key: row[key] for key in keys}
        images[row["method"], row["number"]]["predicted_error"] = row.get("predicted_error")
    for row in folder.find(kind="metric"):
        if row["number"] is not None:
            images[row["method"], row["number"]][row["metric"]] = row["value"]
    return pd.DataFrame(images.values()).dropna(axis="columns", how="all")


def _grouped(folder: RunFolder) -> dict[tuple[str, str | None, str | None], list[Row]]:
    """The rows of every kind, method and metric."""
    groups = defaultdict(list)
    for row in folder.rows:
        groups[row["kind"], row.get("method"), row.get("metric")].append(row)
    return groups


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


def _quality(name: str, about: Mapping[str, Any], rows: list[Row]) -> Row:
    if not rows:
        return {}
    if rows[-1]["number"] is None:
        return {name: rows[-1]["value"], **rows[-1]["others"]}
    values = [row["value"] for row in rows if row["value"] is not None]
    metric = Metric(name, about["label"], None, about["unit"], about["higher_is_better"])
    return metric.figures(values) if values else {}
