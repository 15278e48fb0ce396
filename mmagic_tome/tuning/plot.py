# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The Pareto picture of a search: speed-up against PSNR."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from ..apis.files import whole_file
from ..evaluation.report.plots import place_labels
from .search import Goal, Trial, front

_OURS, _OTHERS, _GREY = "#1a7f4b", "#c2571a", "#9a9a9a"


def write_plot(
    path: str | os.PathLike,
    title: str,
    trials: Sequence[Trial],
    others: Sequence[tuple[str, float, float]],
    goal: Goal,
    chosen: Trial,
    checked: dict[str, Any] | None,
) -> None:
    """Draw a search.

    Args:
        path: PNG (or SVG, PDF) to write, under a temporary name first.
        title: over everything.
        trials: all candidates that were tried.
        others: (name, speed-up, PSNR) of what the search is compared with.
        goal: drawn as a line.
        chosen: one of the trials.
        checked: of :func:`~.check.check`, or None.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    # Pictures that are the same have no PSNR to draw.
    drawn = [trial for trial in trials if math.isfinite(trial.psnr)]
    axes.plot(
        [t.speedup for t in drawn],
        [t.psnr for t in drawn],
        ".",
        color=_GREY,
        label=f"tried ({len(trials)})",
    )
    best = [trial for trial in front(drawn) if trial.speedup > 1]
    axes.plot(
        [t.speedup for t in best],
        [t.psnr for t in best],
        "-o",
        color=_OURS,
        markersize=4,
        linewidth=1.2,
        label="nothing tried is better in both",
    )
    named = [(name, x, y) for name, x, y in others if math.isfinite(y)]
    shapes = ((False, "^", "fewer steps"), (True, "s", "presets"))
    for is_preset, shape, label in shapes:
        points = [(x, y) for name, x, y in named if name.startswith("preset") == is_preset]
        if points:
            axes.plot(*zip(*points), shape, color=_OTHERS, markersize=6, label=label)
    if math.isfinite(chosen.psnr):
        axes.plot(
            chosen.speedup, chosen.psnr, "*", color=_OURS, markersize=16, label="chosen: predicted"
        )
    if checked is not None and checked["psnr"] is not None:
        factor = checked["speedup"]
        around = [[factor["median"] - factor["p10"]], [factor["p90"] - factor["median"]]]
        axes.errorbar(
            factor["median"],
            checked["psnr"],
            xerr=around,
            fmt="D",
            color="black",
            markersize=5,
            capsize=3,
            label="chosen: measured, unseen prompts",
        )
    line = {"color": _GREY, "linestyle": ":", "linewidth": 1, "label": f"goal: {goal.text()}"}
    if goal.speedup is not None:
        axes.axvline(goal.speedup, **line)
    else:
        axes.axhline(goal.psnr, **line)
    axes.set_xlabel("times as fast as dense, whole runs (predicted from measured costs)")
    axes.set_ylabel("PSNR against the dense pictures (dB), search prompts")
    axes.grid(alpha=0.3)
    axes.margins(0.08)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    place_labels(figure, axes, named)
    with whole_file(path) as part:
        figure.savefig(part, dpi=130)
