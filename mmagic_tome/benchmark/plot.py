# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The picture of a benchmark: per case, how many times faster, and the memory."""

from __future__ import annotations

import os
from typing import Any

from ..apis.files import whole_file
from .statistics import ratios, summarise

_COLOURS = {
    "dense": "#7f7f7f",
    "ours": "#1a7f4b",
    "tomesd": "#c2571a",
    "mmagic": "#3a6fb0",
    "ideal": "#b9b9b9",
}


def write_plot(path: str | os.PathLike, title: str, cases: list[dict[str, Any]]) -> None:
    """Draw all cases, one row each: every round, the median and its interval; peak memory.

    Args:
        path: PNG (or SVG, PDF) to write, under a temporary name first.
        title: over everything.
        cases: dicts of ``label`` and ``results`` (see :func:`.rounds.run_case`).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [len(case["results"]) for case in cases]
    height = 1.0 + sum(0.42 * count + 0.75 for count in rows)
    figure, axes = plt.subplots(
        len(cases),
        2,
        figsize=(9.5, height),
        width_ratios=(3, 1.4),
        height_ratios=[count + 1 for count in rows],
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    for (speed, memory), case in zip(axes, cases):
        _draw_speed(speed, case["results"])
        speed.set_title(case["label"], fontsize=9, loc="left")
        _draw_memory(memory, case["results"])
    axes[-1][0].set_xlabel("times as fast as dense, round by round", fontsize=9)
    axes[-1][1].set_xlabel("peak memory of tensors, MiB", fontsize=9)
    try:
        with whole_file(path) as part:
            figure.savefig(part, dpi=130)
    finally:
        plt.close(figure)


def _draw_speed(axis, results) -> None:
    base = results["dense"]["seconds"]
    for place, row in enumerate(summarise(results)):
        name, ratio = row["contender"], row["speedup"]
        colour = _COLOURS[results[name]["kind"]]
        values = ratios(base, results[name]["seconds"])
        axis.plot(values, [place] * len(values), "o", ms=4, color=colour, alpha=0.35, mew=0)
        axis.plot([ratio.low, ratio.high], [place] * 2, color=colour, lw=3, alpha=0.8)
        axis.plot(ratio.median, place, "|", color="black", ms=13, mew=1.6)
        if row["clear"] is not None:
            text = f"{ratio.median:.2f}x" + ("" if row["clear"] else "  within noise")
            axis.annotate(
                text,
                (max(*values, ratio.high), place),
                textcoords="offset points",
                xytext=(8, 0),
                va="center",
                fontsize=8,
                color="black" if row["clear"] else "#a00000",
            )
    axis.axvline(1, color="#7f7f7f", lw=0.8, ls=":")
    axis.set_yticks(range(len(results)), list(results), fontsize=9)
    axis.set_ylim(len(results) - 0.5, -0.5)
    axis.margins(x=0.22)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_memory(axis, results) -> None:
    for place, (_, result) in enumerate(results.items()):
        peak = result.get("peak_bytes")
        if peak is not None:
            axis.barh(place, peak / 2**20, color=_COLOURS[result["kind"]], height=0.6)
            axis.annotate(
                f"{peak / 2**20:.1f}",
                (peak / 2**20, place),
                textcoords="offset points",
                xytext=(4, 0),
                va="center",
                fontsize=8,
            )
    if all(result.get("peak_bytes") is None for result in results.values()):
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", fontsize=8)
        axis.set_xticks([])
    axis.set_yticks([])
    axis.set_ylim(len(results) - 0.5, -0.5)
    axis.margins(x=0.25)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
