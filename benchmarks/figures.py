#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Writes every table and plot of measured values in the pages, from the files in ``data/``.

A page has a pair of markers where a figure belongs::

    <!-- figure: NAME --><!-- /figure -->

Files in ``data/`` are the ``results.json`` of a run's folder, or written by a script beside this
one; they hold the command that measured them. To measure again, run that command and copy the file;
then ``make figures`` (``python benchmarks/figures.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmagic_tome.lab import plots
from mmagic_tome.lab.measure import Interval, interval, ratios
from mmagic_tome.lab.report import markdown, replace_table

PAGES = ("*.md", "docs/**/*.md", "benchmarks/*.md", "configs/*/README.md")
MARKER = re.compile(r"<!-- figure: (\S+) -->")
# What README's plot names: the rest is drawn without a name.
NAMED = ("quality", "balanced", "fast", "tomesd 0.5", "ToMe 0.5", "DeepCache 2", "DeepCache 3")
PRESETS = ("quality", "balanced", "fast")
Row = dict[str, Any]


class Data:
    """A file of ``data/``.

    Args:
        page: The page that the figure is for.
        name: Of the file, without its suffix.
    """

    def __init__(self, page: Path, name: str) -> None:
        root = next(folder for folder in page.parents if (folder / "benchmarks/data").is_dir())
        self.page, self.root = page, root
        self.path = root / "benchmarks/data" / f"{name}.json"
        self.record = json.loads(self.path.read_text(encoding="utf-8"))
        self.rows: list[Row] = self.record["rows"]

    def __getitem__(self, method: str) -> Row:
        return next(row for row in self.rows if row["method"] == method)

    def speedup(self, method: str) -> Interval:
        """How many times as fast as the baseline."""
        return interval(ratios(self["baseline"]["seconds"], self[method]["seconds"]))

    def link(self, path: Path, text: str) -> str:
        """A link from the page."""
        return f"[{text}]({Path(os.path.relpath(path, self.page.parent)).as_posix()})"

    def source(self) -> str:
        """One line: how the values were measured, and where they are."""
        settings, where = self.record["settings"], self.record["environment"]
        said = [settings["model"], settings["size"]]
        said += [f"{settings[key]} {key}" for key in ("images", "steps") if key in settings]
        if "scheduler" in settings:
            said.append(f"{settings['scheduler']}, guidance {settings['guidance']:g}")
        said += [f"batch {settings['batch_size']}"] if "batch_size" in settings else []
        said += [settings["dtype"]] if "dtype" in settings else []
        timed = [row for row in self.rows if "seconds" in row]
        if timed:
            rounds = len(timed[0]["seconds"])
            clock = "CPU seconds, " if settings["clock"] == "cpu" else ""
            sure = interval(timed[0]["seconds"]).coverage
            said.append(f"{clock}{rounds} rounds ({settings['order']} order), {sure:.0%} intervals")
            threads = where["threads"]
            said.append(f"{where['gpu'] or where['processor']}, {threads} thread{'s'[: threads > 1]}")
        versions = where["versions"]
        said += [f"{key} {versions[key]}" for key in ("torch", "diffusers") if key in versions]
        data = self.link(self.path, "data and command")
        return f"<sub>{', '.join(said)}; {self.record['date']}; {data}.</sub>"

    def plot(self, name: str, figure: plots.Figure, alt: str) -> str:
        """Write a plot; return what shows it in the page."""
        path = plots.save(figure, self.root / "docs/images" / f"{name}.png")
        return "!" + self.link(path, alt)


# --- times --------------------------------------------------------------------------------------


def timing(name: str, page: Path, methods: Sequence[str] = ()) -> str:
    """Seconds and speed-up of every method, or of those that are named."""
    data = Data(page, name)
    what = "forward" if data.record["settings"]["steps"] == 1 else "run"
    memory = "memory" in data["baseline"]
    heads = ["", f"s / {what}, median (min - max)", "times as fast"]
    heads += ["peak memory, MiB"] if memory else []
    cells = []
    for row in data.rows:
        if row["method"] not in (methods or [one["method"] for one in data.rows]):
            continue
        seconds = row["seconds"]
        spread = f"{statistics.median(seconds):.4g} ({min(seconds):.4g} - {max(seconds):.4g})"
        line = [row["method"], spread, data.speedup(row["method"]).text()]
        cells.append(line + ([f"{row['memory'] / 2**20:.1f}"] if memory else []))
    return f"{markdown(heads, cells)}\n\n{data.source()}"


def sd15_sentence(page: Path, between: str = ", ", last: str = " and ") -> str:
    """The named settings on the shape of Stable Diffusion 1.5, within a sentence."""
    data = Data(page, "sd15_20_steps")
    said = [data.speedup(name).text() for name in PRESETS]
    return between.join(said[:-1]) + last + said[-1]


# --- fidelity against time ----------------------------------------------------------------------


def preset_table(page: Path, heads: Sequence[str], does: Sequence[str], steps: str) -> str:
    """The named settings and, for each, the number of fewer steps that is nearest in time."""
    both = [Data(page, f"demo_{steps}_steps") for steps in (20, 50)]
    cells = []
    for name, text in zip(PRESETS, does):
        line = [f"`{name}`", text]
        for data in both:
            speed = data.speedup(name)
            fewer = [row["method"] for row in data.rows if row["kind"] == "fewer steps"]
            nearest = min(fewer, key=lambda one: abs(data.speedup(one).median - speed.median))
            line.append(f"{speed.text()}, **{data[name]['psnr']:.1f} dB**")
            other = f"{data.speedup(nearest).text()}, {data[nearest]['psnr']:.1f} dB"
            line.append(f"{steps.format(nearest.split()[0])}{other}")
        cells.append(line)
    return f"{markdown(heads, cells)}\n\n{both[0].source()}"


def points(data: Data, named: Iterable[str] | None = None) -> list[plots.Point]:
    """Methods as :func:`plots.fidelity` takes them."""
    found = []
    for row in data.rows:
        if "psnr" in row:
            speed = data.speedup(row["method"])
            shown = named is None or row["kind"] == "fewer steps" or row["method"] in named
            found.append(
                plots.Point(
                    row["method"], row["kind"], speed.median, row["psnr"], speed.low, speed.high,
                    None if shown else "",
                )
            )  # fmt: skip
    return found


def pareto(name: str, page: Path, steps: Sequence[int], alt: str) -> str:
    """PSNR against speed-up on the demo model."""
    both = [Data(page, f"demo_{number}_steps") for number in steps]
    panels = {
        f"{number} steps": points(data, NAMED) for number, data in zip(steps, both)
    }  # fmt: skip
    return both[0].plot(name, plots.fidelity(panels, "PSNR to the baseline images (dB)"), alt)
