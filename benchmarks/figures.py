#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Writes every table and plot of measured values in the pages, from the files in ``data/``.

A page has a pair of markers where a figure belongs::

    <!-- figure: NAME --><!-- /figure -->

Files in ``data/`` are the ``results.json`` of a run's folder, or of a script beside this one; they
hold the command that measured them. To measure again, run it and copy the file here; then
``make figures``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import LogFormatter
from rows import fewer_at, is_fewer_steps, paired, saved

from mmagic_tome.cache import PRESETS
from mmagic_tome.lab import plots
from mmagic_tome.lab.measure import Interval, interval, ratios
from mmagic_tome.lab.report import markdown

PAGES = ("*.md", "docs/**/*.md", "benchmarks/*.md", "configs/*/README.md")
MARKER = re.compile(r"<!-- figure: (\S+) -->")
# Rows of tolerances -> the named setting that it is.
NAMED = {f"tolerance {one[0].tolerance:g}": name for name, one in PRESETS.items()}
# Step caches at the same steps of every run.
FIXED = ("fixed: inner", "fixed: both", "fixed: most")
# Networks of the benchmark, in full.
NETWORKS = {
    "unet": "demo model",
    "transformer": "demo transformer",
    "sd15": "Stable Diffusion 1.5, random weights",
    "sd15-level0": "finest level of Stable Diffusion 1.5, random weights",
}
# Tasks of pipelines, in full.
TASKS = {"text": "from text", "img2img": "from an image, strength 0.5", "inpaint": "inpainting"}
PSNR = "PSNR to the baseline images (dB)"
Row = dict[str, Any]


class Data:
    """A file of ``data/``, for a figure in a page."""

    def __init__(self, page: Path, name: str) -> None:
        self.page = page
        self.root = next(one for one in page.parents if (one / "benchmarks/data").is_dir())
        self.path = self.root / f"benchmarks/data/{name}.json"
        self.record = json.loads(self.path.read_text(encoding="utf-8"))
        self.rows: list[Row] = self.record["rows"]

    def __getitem__(self, method: str) -> Row:
        return {row["method"]: row for row in self.rows}[method]

    def speedup(self, row: Row) -> Interval:
        """How many times as fast as the baseline."""
        return interval(ratios(self["baseline"]["round_seconds"], row["round_seconds"]))

    def link(self, path: Path, text: str) -> str:
        """A link from the page."""
        return f"[{text}]({Path(os.path.relpath(path, self.page.parent)).as_posix()})"

    def source(self) -> str:
        """What was measured, how, where, when; and a link to the file."""
        settings, where = self.record["settings"], self.record["environment"]
        said = [settings[key] for key in ("model", "size", "dtype") if key in settings]
        said = [NETWORKS.get(one, str(one)) for one in said]
        of_rows = {(row["model"], row["size"]) for row in self.rows if {"model", "size"} <= {*row}}
        said[:0] = [f"{NETWORKS[model]}, {size}x{size}" for model, size in sorted(of_rows)]
        for key in ("images", "steps"):
            if settings.get(key, 1) > 1:
                said.append(f"{settings[key]} {key}")
        if "guidance" in settings:
            said.append(f"{settings['scheduler']}, guidance {settings['guidance']:g}")
        batch = settings.get("images_per_timed_run", settings.get("batch_size"))
        said += [f"batch {batch}"] if batch else []
        if any("round_seconds" in row for row in self.rows):
            seconds = self["baseline"]["round_seconds"]
            said.append(f"{len(seconds)} rounds in {settings.get('order', 'balanced')} order")
            said.append(f"intervals of {interval(seconds).coverage:.0%}")
            said += ["CPU seconds"] if settings.get("clock") == "cpu" else []
        versions = where["versions"]
        said.append(f"{where['gpu'] or where['processor']}, threads: {where['threads']}")
        said += [f"{key} {versions[key]}" for key in ("torch", "diffusers")]
        said.append(self.record["date"])
        older = sum(row.get("transcribed", False) for row in self.rows)
        said += [f"{older} of {len(self.rows)} values from an earlier page"] if older else []
        return f"<sub>{', '.join(said)}. {self.link(self.path, 'Data and command')}.</sub>"

    def table(self, heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
        """A table without the columns that are empty, and where it comes from."""
        full = [place for place in range(len(heads)) if any(line[place] for line in cells)]
        lines = [[line[place] for place in full] for line in cells]
        return f"{markdown([heads[place] for place in full], lines)}\n\n{self.source()}"

    def plot(self, name: str, figure: plots.Figure, says: str) -> str:
        """Write a plot; return what shows it in the page."""
        path = plots.save(figure, self.root / f"docs/images/{name}.png")
        return f"!{self.link(path, says)}"


def _seconds(data: Data, row: Row) -> str:
    values = row["round_seconds"]
    return f"{statistics.median(values):.3g} ({min(values):.3g} - {max(values):.3g})"


# Head of a column -> its cell; a cell of which a value is missing is empty.
COLUMNS: dict[str, Callable[[Data, Row], str]] = {
    "s, median (min - max)": _seconds,
    "times as fast": lambda data, row: data.speedup(row).text(),
    "operations": lambda data, row: f"{row['flops'] / data['baseline']['flops']:.3f}",
    "PSNR, dB": lambda data, row: f"{row['psnr']:.1f}",
    "SSIM": lambda data, row: f"{row['ssim']:.4f}",
    "latent error": lambda data, row: f"{row['latent_error']:.2g}",
    "feature distance": lambda data, row: f"{row['efficientnet_lite0_distance']:.2g}",
    "peak memory, MiB": lambda data, row: f"{row['memory'] / 2**20:.1f}",
    "plan": lambda data, row: f"{row['plan']:.3g}",
    "merge": lambda data, row: f"{row['merge']:.2g}",
    "unmerge": lambda data, row: f"{row['unmerge']:.2g}",
}


def listed(page: Path, name: str, pick: str = "", by_speed: bool = False) -> str:
    """Every method with whatever was measured.

    Args:
        page: Where the table goes.
        name: Of the data.
        pick: Regular expression of whole names. Default: all.
        by_speed: Sort by speed-up.
    """
    data = Data(page, name)
    rows = [row for row in data.rows if re.fullmatch(pick or ".*", row["method"])]
    if by_speed:
        rows.sort(key=lambda row: data.speedup(row).median)

    def cell(function: Callable[[Data, Row], str], row: Row) -> str:
        try:
            return function(data, row)
        except KeyError:
            return ""

    cells = [[row["method"], *(cell(one, row) for one in COLUMNS.values())] for row in rows]
    return data.table(["", *COLUMNS], cells)


def presets(page: Path, what: str, fewer: str) -> str:
    """The named settings, each beside as many fewer steps as take the same time."""
    data = Data(page, "tolerance")
    cells = []
    for case, rows in _by_place(data).items():
        line = [what.format(*case)]
        for row in filter(lambda row: row["method"] in NAMED, rows):
            speed = paired(row)
            beside = fewer_at(rows, speed.median)
            line.append(
                f"{speed.text()}: **{statistics.mean(row['psnr']):.1f} dB**"
                + ("" if beside is None else f" ({fewer} {beside:.1f})")
            )
        cells.append(line)
    return data.table(["", *(f"`{name}`" for name in NAMED.values())], cells)


def _by_place(data: Data) -> dict[tuple[str, float, int], list[Row]]:
    """Scheduler, guidance scale, steps -> rows in the order of their methods, few steps first."""

    def place(row: Row) -> tuple[int, float, str]:
        return row["steps"], row["guidance"], row["scheduler"]

    cases: dict[tuple[str, float, int], list[Row]] = {}
    for row in sorted(data.rows, key=place):
        cases.setdefault((row["scheduler"], row["guidance"], row["steps"]), []).append(row)
    return {case: sorted(rows, key=lambda row: row["method"]) for case, rows in cases.items()}


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
        text = f"{1 / statistics.mean(row['operations']):.2f}x: {found[0]:.1f} ({found[1]:.1f})"
        head = f"{row['scheduler']}, guidance {row['guidance']:g}"
        cells.setdefault(row["method"], {})[head] = text
    heads = list(dict.fromkeys(head for line in cells.values() for head in line))
    lines = [[name, *(line.get(head, "") for head in heads)] for name, line in cells.items()]
    return data.table(["", *heads], lines)


def tolerance_pareto(page: Path) -> str:
    """PSNR against whole-run speed-up of tolerances and of fewer steps, on two samplers; narrow, so
    that its words can be read at the width of a page."""
    data = Data(page, "tolerance")
    cases, panels = _by_place(data), {}
    for case in (("DDIM", 3.0, 20), ("DPM-Solver++ 2M", 7.5, 20)):
        points = panels.setdefault("{}, guidance {:g}".format(*case[:2]), [])
        for row in cases[case]:
            speed, psnr = paired(row), statistics.mean(row["psnr"])
            kind = "fewer steps" if is_fewer_steps(row) else "caching"
            label = NAMED.get(row["method"], row["method"])
            points.append(plots.Point(label, kind, speed.median, psnr, speed.low, speed.high))
    figure = plots.fidelity(panels, PSNR, width=4.6)
    return data.plot("pareto", figure, "Fidelity against speed-up")


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


def pareto(page: Path, name: str, steps: Sequence[int], named: str) -> str:
    """PSNR against speed-up on the demo model; names that match ``named`` are written."""
    panels = {}
    for data in (Data(page, f"demo_{number}_steps") for number in steps):
        points = []
        for row in data.rows[1:]:
            speed = data.speedup(row)
            label = None if re.fullmatch(named, row["method"]) else ""
            place = (speed.median, row["psnr"], speed.low, speed.high)
            points.append(plots.Point(row["method"], row["kind"], *place, label))
        panels[f"demo model, {data.record['settings']['steps']} steps"] = points
    return data.plot(name, plots.fidelity(panels, PSNR), "Fidelity against speed-up")


def speedups(page: Path, name: str, methods: Sequence[str], last: str) -> str:
    """Speed-ups within a sentence."""
    data = Data(page, name)
    said = [data.speedup(data[method]).text() for method in methods]
    return ", ".join(said[:-1]) + last + said[-1]


def with_weights(page: Path, name: str, group: str = "") -> str:
    """Methods called ``GROUP: WHAT``, each beside itself with ``, prop_attn``."""
    data, end = Data(page, name), ", prop_attn"
    start = f"{group}: " if group else ""
    found: dict[str, dict[bool, Row]] = {}
    for row in data.rows:
        plain = row["method"].removesuffix(end)
        if plain.startswith(start) and (start or ": " not in plain) and "psnr" in row:
            found.setdefault(plain[len(start) :], {})[plain != row["method"]] = row
    heads = [group, "operations", *["PSNR, dB", "latent error"] * 2]
    heads[4:] = ["PSNR, dB, `prop_attn`", "latent error, `prop_attn`"]
    cells = []
    for what, both in found.items():
        line = [what, ""]
        for weighted in (False, True):
            row = both.get(weighted)
            line += [
                COLUMNS[head](data, row) if row else "" for head in ("PSNR, dB", "latent error")
            ]
            if row and group == "ratios":
                line[1] = COLUMNS["operations"](data, row)
        cells.append(line)
    return data.table(heads, cells)


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


def tolerance(page: Path) -> str:
    """Runs with a tolerance: time, predicted and realised errors, fewer steps beside them."""
    data = Data(page, "tolerance")
    cells = []
    for case, rows in _by_place(data).items():
        for row in filter(lambda row: row["method"].startswith("tolerance"), rows):
            speed, psnr = paired(row), row["psnr"]
            met = [error / one for error, one in zip(row["error"], row["predicted"]) if one]
            spread = [f"{one:.2f}" for one in np.quantile(met, [0.05, 0.5, 0.95])] if met else []
            fewer = fewer_at(rows, speed.median), fewer_at(rows, saved(row), saved)
            cells.append(
                [
                    "{}, guidance {:g}, {} steps".format(*case),
                    row["method"].removeprefix("tolerance "),
                    speed.text(),
                    f"{saved(row):.2f}x",
                    f"{statistics.mean(row['error']):.4f}",
                    " / ".join(spread) or "-",
                    f"{statistics.mean(psnr):.1f} ({np.quantile(psnr, 0.05):.1f}, {min(psnr):.1f})",
                    *("-" if one is None else f"{one:.1f}" for one in fewer),
                ]
            )
    heads = ["", "tolerance", "times as fast", "fewer operations", "error of the final latent"]
    heads += ["realised / predicted: 5 %, median, 95 %", "PSNR, dB: mean (5 %, worst)"]
    heads += ["fewer steps in that time, dB", "fewer steps of as many operations, dB"]
    return data.table(heads, cells)


def operations(page: Path) -> str:
    """Operations of one step, of the configs beside the page."""
    data = Data(page, "operations")
    cells = []
    for row in data.rows:
        if row["folder"] == page.parent.name:
            both = [f"{row[key] / 1e12:.2f}" for key in ("baseline", "merged")]
            cells.append([row["config"], row["image"], *both])
            cells[-1].append(f"{row['baseline'] / row['merged']:.2f}")
    heads = ["config", "image", "baseline, TFLOP", "merged, TFLOP", "baseline / merged"]
    return data.table(heads, cells)


def vit_correlation(page: Path) -> str:
    """That of a saliency map at r = 13 with the baseline's, within a sentence."""
    return f"{Data(page, 'vit_quality')['r=13']['correlation']:.3f}"


def vit_quality(page: Path, size: int) -> str:
    """Agreement of a vision transformer's answers with the baseline's."""
    data = Data(page, "vit_quality")
    cells = []
    for row in (row for row in data.rows if row["size"] == size):
        line = [row["method"], f"{row['correlation']:.4f}", f"{row['worst']:.4f}"]
        labels = [str(row[key]) if key in row else "" for key in ("right", "changed")]
        cells.append([*line, f"{row['iou']:.3f}", *labels])
    heads = ["", "correlation", "worst", "IoU", "neighbours right", "votes changed"]
    return data.table(heads, cells)


def matching_sentence(page: Path) -> str:
    """Milliseconds of ToMe and of tomesd within a sentence."""
    data = Data(page, "matching")
    ours, theirs = data["tome"], data["tomesd 0.1.3"]
    both = [one["merge"] + one["unmerge"] for one in (ours, theirs)]
    return (
        f"merging and unmerging take {both[0]:.1f} ms of CPU time (tomesd: {both[1]:.0f}), the "
        f"matching {ours['plan']:.0f} (tomesd: {theirs['plan']:.0f})"
    )


def _by_case(data: Data) -> dict[str, dict[str, Row]]:
    """Case -> method -> row, of the records of ``gpu.py``."""
    cases: dict[str, dict[str, Row]] = {}
    for row in data.rows:
        cases.setdefault(row["case"], {})[row["method"]] = row
    return cases


def attention(page: Path, name: str) -> str:
    """How many times as long attention takes if it weighs keys."""
    data, cells = Data(page, name), []
    for case, rows in _by_case(data).items():
        base = rows["baseline"]["round_seconds"]
        line = [case, f"{1000 * statistics.median(base):.4g}"]
        for method in ("mask", "channels"):
            line.append(interval(ratios(rows[method]["round_seconds"], base)).text())
        cells.append(line)
    return data.table(["", "no weights, ms", "mask", "channels"], cells)


def gpu_networks(page: Path) -> str:
    """Speed-ups and peak memory of whole networks."""
    data = Data(page, "gpu_networks")
    methods = [one for one in dict.fromkeys(r["method"] for r in data.rows) if one != "baseline"]
    cells = []
    for case, rows in _by_case(data).items():
        base = rows["baseline"]
        line = [case, f"{1000 * statistics.median(base['round_seconds']):.4g}"]
        for row in map(rows.get, methods):
            both = row and ratios(base["round_seconds"], row["round_seconds"])
            line.append(interval(both).text() if both else "")
        memory = [rows[one]["memory"] / 2**20 for one in ("baseline", *methods) if one in rows]
        cells.append([*line, " / ".join(f"{one:.0f}" for one in memory)])
    return data.table(["", "baseline, ms", *methods, "peak memory in this order, MiB"], cells)


def gpu_caching(page: Path) -> str:
    """Milliseconds of computed and of skipped steps."""
    data, cells = Data(page, "gpu_caching"), []
    for row in data.rows:
        line = [row["case"], row["method"]]
        for key in ("computed", "skipped"):
            steps = [seconds for one in row[key] for seconds in one]
            line.append(f"{1000 * statistics.median(steps):.3g}" if steps else "")
        cells.append(line)
    return data.table(["", "step cache", "computed step, ms", "skipped step, ms"], cells)


def distance_budget(page: Path) -> str:
    """Mean ratio and error of constant ratios and of ratios chosen by distance."""
    data = Data(page, "distance_budget")
    cells = [
        [
            row["method"],
            f"{row['guidance']:g}",
            *(f"{statistics.mean(row[key]):.{digits}f}" for key, digits in _BUDGET),
        ]
        for row in data.rows
    ]
    return data.table(["", "guidance", "ratio, mean", "latent error", "PSNR, dB"], cells)


_BUDGET = (("ratio", 2), ("error", 4), ("psnr", 1))


def if_measured(figure: Callable[[Path], str], name: str) -> Callable[[Path], str]:
    """A figure of data that may not be there yet; a note in its place as long as they are not."""

    def found(page: Path) -> str:
        here = any((root / f"benchmarks/data/{name}.json").exists() for root in page.parents)
        return figure(page) if here else "*Not measured yet.*"

    return found


_GROUPS = ("downsample", "block", "timestep_range", "targets", "targets, residual", "method")
_GROUPS += ("ratios", "plan_interval", "share_plans", "residual")
FIGURES: Mapping[str, Callable[[Path], str]] = {
    "presets": partial(presets, what="{}, guidance {:g}, {} steps", fewer="fewer steps:"),
    "presets-zh": partial(presets, what="{}，引导 {:g}，{} 步", fewer="减少步数："),
    "pareto": tolerance_pareto,
    "calibration": calibration,
    "calibration_table": calibration_table,
    "peers": peers,
    "pareto-both": partial(
        pareto,
        name="pareto_both",
        steps=[20, 50],
        named=r"fixed: \w+|DeepCache .|\d+ steps|network every 2nd|attn_kv .*residual|PiToMe 0.5",
    ),
    "sd15-fixed": partial(speedups, name="sd15_20_steps", methods=FIXED, last=" and "),
    "sd15-fixed-zh": partial(speedups, name="sd15_20_steps", methods=FIXED, last=", "),
    "sd15-tomesd": partial(speedups, name="sd15_20_steps", methods=["tomesd"], last=""),
    "demo-20": partial(listed, name="demo_20_steps", by_speed=True),
    "demo-50": partial(listed, name="demo_50_steps", by_speed=True),
    "sd15-level0": partial(listed, name="sd15_level0"),
    "sd15-level0-1-thread": partial(listed, name="sd15_level0_1_thread"),
    "sd15-forward": partial(listed, name="sd15_forward", pick="(?!ideal ).*", by_speed=True),
    "sd15-20-steps": partial(listed, name="sd15_20_steps"),
    "sdxl": partial(listed, name="sdxl"),
    "plans": partial(listed, name="sd15_level0_plans"),
    "plans-ratio-75": partial(listed, name="sd15_level0_plans_ratio_75"),
    "plans-1024": partial(listed, name="sd15_level0_plans_1024"),
    "matching": partial(listed, name="matching"),
    "matching-sentence": matching_sentence,
    "prop-attn": partial(with_weights, name="prop_attn"),
    "step-caching": partial(listed, name="step_caching"),
    "smoothness": smoothness,
    "run-continuity": continuity,
    "tolerance": tolerance,
    "operations": operations,
    "distance-budget": distance_budget,
    "attention-cpu": partial(attention, name="cpu_attention"),
    "gpu-attention": if_measured(partial(attention, name="gpu_attention"), "gpu_attention"),
    "gpu-networks": if_measured(gpu_networks, "gpu_networks"),
    "gpu-caching": if_measured(gpu_caching, "gpu_caching"),
    "gpu-frontier": if_measured(
        partial(listed, name="gpu_frontier", by_speed=True), "gpu_frontier"
    ),
    "vit-correlation": vit_correlation,
    "vit-quality-224": partial(vit_quality, size=224),
    "vit-quality-518": partial(vit_quality, size=518),
    **{
        f"merging-{group.replace(',', '').replace(' ', '-')}": partial(
            with_weights, name="merging", group=group
        )
        for group in _GROUPS
    },
}


def replace_table(page: str | Path, name: str, text: str) -> None:
    """Put a text between the markers of a Markdown page and change nothing else of it.

    Args:
        page: The file; has ``<!-- figure: NAME -->...<!-- /figure -->`` once.
        name: Of the figure.
        text: Tables and images are put on lines of their own, other text within its line.

    Raises:
        SystemExit: The page does not have the markers once.
    """
    page = Path(page)
    old = page.read_text(encoding="utf-8")
    begin, end = f"<!-- figure: {name} -->", "<!-- /figure -->"
    before, found, rest = old.partition(begin)
    between, ended, after = rest.partition(end)
    if not found or not ended or begin in rest or "<!-- figure:" in between:
        raise SystemExit(f"{page} needs {begin} and, behind it, {end}, once")
    new = f"\n{text}\n" if "\n" in text or text.startswith("!") else text
    if new != between:
        page.write_text(before + begin + new + end + after, encoding="utf-8")


def write(root: Path) -> list[Path]:
    """Write all figures into the pages below a folder.

    Returns:
        The pages that have any.
    """
    pages = []
    for page in sorted(page for pattern in PAGES for page in root.glob(pattern)):
        names = MARKER.findall(page.read_text(encoding="utf-8"))
        for name in names:
            if name not in FIGURES:
                raise SystemExit(f"{page}: there is no figure {name}; known: {', '.join(FIGURES)}")
            replace_table(page, name, FIGURES[name](page))
        pages += [page] if names else []
    return pages


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    for path in write(parser.parse_args().root):
        print(path)
