# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Figures of step caching: predicted errors, smoothness, runs, methods by other authors."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import LogFormatter
from rows import saved

from mmagic_tome.lab import plots

from .data import Data

# Tasks of pipelines, in full.
TASKS = {"text": "from text", "img2img": "from an image, strength 0.5", "inpaint": "inpainting"}


def peers(page: Path) -> str:
    """Operations and PSNR of step caching by other authors, by sampler."""
    data = Data(page, "step_caching_peers")
    cells: dict[str, dict[str, str]] = {}
    for row in data.rows:
        if row["kind"] == "baseline":
            continue
        found = [
            statistics.mean(one[key] for one in row["images"]) for key in ("psnr", "converged")
        ]
        text = f"{saved(row):.2f}x: {found[0]:.1f} ({found[1]:.1f})"
        head = f"{row['scheduler']}, guidance {row['guidance']:g}"
        cells.setdefault(row["method"], {})[head] = text
    heads = list(dict.fromkeys(head for line in cells.values() for head in line))
    lines = [[name, *(line.get(head, "") for head in heads)] for name, line in cells.items()]
    return data.table(["", *heads], lines)


@matplotlib.rc_context(plots.STYLE)
def calibration(page: Path) -> str:
    """Realised against predicted error of every image."""
    data = Data(page, "calibration")
    tasks = list(dict.fromkeys(row["task"] for row in data.rows))
    figure, all_axes = plots.panels_of(1.6 + 4.4 * len(tasks), 4.6, len(tasks))
    names = list(dict.fromkeys(row["scheduler"] for row in data.rows))
    looks = [look for kind, look in plots.KINDS.items() if kind != "baseline"]
    ends = (1e-3, 0.2)
    for axes, task in zip(all_axes, tasks):
        axes.plot(ends, ends, color="black", linewidth=1)
        axes.fill_between(ends, [end / 2 for end in ends], [end * 2 for end in ends], alpha=0.12)
        for name, (colour, shape) in zip(names, looks):
            images = [
                (one["predicted"], one["error"])
                for row in data.rows
                if (row["scheduler"], row["task"]) == (name, task)
                for one in row["images"]
                if one["predicted"]
            ]
            if images:
                axes.plot(*zip(*images), shape, color=colour, label=name, alpha=0.5, markersize=4)
        axes.set(title=TASKS[task], xlabel="predicted error", xscale="log")
        axes.set(yscale="log", xlim=ends, ylim=ends)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(LogFormatter())
    all_axes[0].set_ylabel("realised error of the final latent")
    plots.legend(figure)
    return data.plot("calibration", figure, "Realised against predicted error of every image")


def calibration_table(page: Path) -> str:
    """Realised error over predicted error, by setting: median, and between 5 % and 95 %."""
    data = Data(page, "calibration")
    cells: dict[tuple[str, int, str], dict[float, list[dict[str, float]]]] = {}
    for row in data.rows:
        cell = cells.setdefault((row["task"], row["size"], row["scheduler"]), {})
        cell.setdefault(row["guidance"], []).extend(row["images"])
    guidances = sorted({row["guidance"] for row in data.rows})
    lines = []
    for (task, size, scheduler), by_guidance in cells.items():
        line = [f"{TASKS[task]}, {size} px", scheduler]
        for guidance in guidances:
            images = by_guidance.get(guidance, [])
            found = [one["error"] / one["predicted"] for one in images if one["predicted"]]
            if not found:
                line.append("nothing skipped" if images else "")
                continue
            low, middle, high = np.quantile(found, (0.05, 0.5, 0.95))
            few = f", {len(found)} of {len(images)}" if len(found) < len(images) else ""
            line.append(f"{middle:.2f} ({low:.2f} - {high:.2f}{few})")
        lines.append(line)
    return data.table(["", "", *(f"guidance {one:g}" for one in guidances)], lines)


@matplotlib.rc_context(plots.STYLE)
def lines(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    xlabel: str,
    ylabel: str,
    log: bool = False,
) -> plots.Figure:
    """Draw one line per series, such as an error or a time by step.

    Args:
        panels: Title -> name of the series -> (x, y).
        xlabel, ylabel: Names and units. Where x falls, as timesteps do, the axis falls too.
        log: Draw y on a logarithmic scale.
    """
    figure, all_axes = plots.panels_of(2.4 + 2.8 * len(panels), 3.6, len(panels))
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    colours = [colour for colour, _ in plots.KINDS.values()]
    for axes, (title, series) in zip(all_axes, panels.items()):
        for name, (x, y) in series.items():
            colour = colours[(names.index(name) + 1) % len(colours)]
            axes.plot(x, y, marker=".", linewidth=1.4, color=colour, label=name)
        axes.set(title=title, xlabel=xlabel, yscale="log" if log else "linear")
        if log:  # as plain numbers
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        if all(float(one).is_integer() for one in x):  # there is no step 1.5
            axes.xaxis.get_major_locator().set_params(integer=True)
        if x[-1] < x[0]:
            axes.invert_xaxis()
    all_axes[0].set_ylabel(ylabel)
    plots.legend(figure)
    return figure


def smoothness(page: Path) -> str:
    """Error of extrapolating an output, by timestep."""
    data = Data(page, "smoothness")
    panels: dict[str, dict[str, Any]] = {}
    for row in data.rows:
        series = panels.setdefault(row["region"], {})
        series[f"order {row['order']}"] = (row["timesteps"], row["errors"])
    figure = lines(panels, "timestep", "relative error", log=True)
    return data.plot("smoothness", figure, "Relative error of extrapolated outputs by timestep")


def continuity(page: Path) -> str:
    """Residuals of the fit that tells runs apart: smallest, median, largest."""
    data = Data(page, "run_continuity")
    cells = []
    for row in data.rows:
        cells.append([f"{row['scheduler']}, guidance {row['guidance']:g}"])
        for values in (row["own"], row["other"], row["later"]):
            middle = statistics.median(values)
            cells[-1].append(f"{min(values):.1g} / {middle:.2g} / {max(values):.2g}")
    heads = ["", "own next step", "another image, same step", "another image, four steps later"]
    return data.table(heads, cells)
