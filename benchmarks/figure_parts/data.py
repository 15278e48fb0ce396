# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A file of ``data/`` for a figure in a page, and what most figures are made of."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmagic_tome.lab import plots
from mmagic_tome.lab.measure import Interval, interval, ratios
from mmagic_tome.lab.report import markdown
from mmagic_tome.methods.base import REMOVED

# Networks of the benchmark, in full.
NETWORKS = {
    "unet": "demo model",
    "transformer": "demo transformer",
    "sd15": "Stable Diffusion 1.5, random weights",
    "sd15-level0": "finest level of Stable Diffusion 1.5, random weights",
    "sdxl": "Stable Diffusion XL, random weights",
}
NOT_MEASURED = "*Not measured yet.*"
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

    def source(self, about: str = "") -> str:
        """What was measured, how, where, when; and a link to the file.

        Args:
            about: What rows are about that have a model each. Default: their models and sizes.
        """
        settings, where = self.record["settings"], self.record["environment"]
        said = [settings[key] for key in ("model", "size", "dtype") if key in settings]
        said = [NETWORKS.get(one, str(one)) for one in said]
        of_rows = {(row["model"], row["size"]) for row in self.rows if {"model", "size"} <= {*row}}
        models = [f"{NETWORKS[model]}, {size}x{size}" for model, size in sorted(of_rows)]
        said[:0] = [about] if about else models
        for key in ("images", "steps"):
            if settings.get(key, 1) > 1:
                said.append(f"{settings[key]} {key}")
        if "guidance" in settings:
            said.append(f"{settings['scheduler']}, guidance {settings['guidance']:g}")
        batch = settings.get("images_per_timed_run", settings.get("batch_size"))
        said += [f"batch {batch}"] if batch else []
        if any("round_seconds" in row for row in self.rows):
            seconds = self["baseline"]["round_seconds"]
            said.append(f"{len(seconds)} rounds in balanced order")
            said.append(f"intervals of {interval(seconds).coverage:.0%}")
            said += ["CPU seconds"] if settings.get("clock") == "cpu" else []
        versions = where["versions"]
        said.append(f"{where['gpu'] or where['processor']}, threads: {where['threads']}")
        said += [f"{key} {versions[key]}" for key in ("torch", "diffusers")]
        said.append(self.record["date"])
        older = sum(row.get("transcribed", False) for row in self.rows)
        said += [f"{older} of {len(self.rows)} values from an earlier page"] if older else []
        return f"<sub>{', '.join(said)}. {self.link(self.path, 'Data and command')}.</sub>"

    def table(self, heads: Sequence[str], cells: Sequence[Sequence[str]], about: str = "") -> str:
        """A table without the columns that are empty, and where it comes from."""
        full = [place for place in range(len(heads)) if any(line[place] for line in cells)]
        lines = [[line[place] for place in full] for line in cells]
        return f"{markdown([heads[place] for place in full], lines)}\n\n{self.source(about)}"

    def plot(self, name: str, figure: plots.Figure, says: str) -> str:
        """Write a plot; return what shows it in the page."""
        path = plots.save(figure, self.root / f"docs/images/{name}.png")
        return f"!{self.link(path, says)}"


# --- tables of whatever was measured --------------------------------------------------------------


def _seconds(data: Data, row: Row) -> str:
    values = row["round_seconds"]
    return f"{statistics.median(values):.3g} ({min(values):.3g} - {max(values):.3g})"


# Head of a column -> its cell; a cell of which a value is missing is empty.
COLUMNS: dict[str, Callable[[Data, Row], str]] = {
    "s, median (min - max)": _seconds,
    "times as fast": lambda data, row: data.speedup(row).text(),
    "PSNR, dB": lambda data, row: f"{row['psnr']:.1f}",
    "latent error": lambda data, row: f"{row['latent_error']:.2g}",
    "peak memory, MiB": lambda data, row: f"{row['memory'] / 2**20:.1f}",
    "plan": lambda data, row: f"{row['plan']:.3g}",
    "merge": lambda data, row: f"{row['merge']:.2g}",
    "unmerge": lambda data, row: f"{row['unmerge']:.2g}",
}


def listed(page: Path, name: str, pick: str = "", by_speed: bool = False) -> str:
    """Every method with whatever was measured, without merging methods that are no longer offered.

    Args:
        page: Where the table goes.
        name: Of the data.
        pick: Regular expression of whole names. Default: all.
        by_speed: Sort by speed-up.
    """
    data = Data(page, name)
    rows = [row for row in data.rows if re.fullmatch(pick or ".*", row["method"])]
    rows = [row for row in rows if row["method"].lower() not in REMOVED]
    if by_speed:
        rows.sort(key=lambda row: data.speedup(row).median)

    def cell(function: Callable[[Data, Row], str], row: Row) -> str:
        try:
            return function(data, row)
        except KeyError:
            return ""

    cells = [[row["method"], *(cell(one, row) for one in COLUMNS.values())] for row in rows]
    return data.table(["", *COLUMNS], cells)


def if_measured(figure: Callable[[Path], str], name: str) -> Callable[[Path], str]:
    """A figure of data that may not be there yet; a note in its place as long as they are not."""

    def found(page: Path) -> str:
        here = any((root / f"benchmarks/data/{name}.json").exists() for root in page.parents)
        return figure(page) if here else NOT_MEASURED

    return found
