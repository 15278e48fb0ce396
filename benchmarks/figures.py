#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Writes every table and plot of measured values in the pages, from the files in ``data/``.

A page has a pair of markers where a figure belongs::

    <!-- figure: NAME --><!-- /figure -->

Files in ``data/`` are the ``results.json`` of a run's folder, or of a script beside this one; they
hold the command that measured them. To measure again, run it and copy the file here; then
``make figures``.

What a figure is made of is in ``figure_parts/``, by subject; tolerances are here.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from figure_parts import caching, frontiers, networks
from figure_parts.data import PSNR, Data, Row, if_measured, listed
from rows import advantage, fewer_at, is_fewer_steps, paired, saved, speedup

from mmagic_tome.cache import PRESETS
from mmagic_tome.lab import plots

PAGES = ("*.md", "docs/**/*.md", "benchmarks/*.md", "configs/*/README.md")
MARKER = re.compile(r"<!-- figure: (\S+) -->")
# Rows of tolerances -> the named setting that it is.
NAMED = {f"tolerance {one[0].tolerance:g}": name for name, one in PRESETS.items()}


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


def tolerance_advantages(page: Path) -> str:
    """How much further from the baseline fewer steps are than tolerances, within a sentence: in the
    same time, and with as many operations; and in how many settings even the 5th percentile of a
    tolerance's images is above the mean of fewer steps in the same time."""
    data = Data(page, "tolerance")
    said, even_low = [], []
    for by, what in ((speedup, "in the same time"), (saved, "with as many operations")):
        found = []
        for rows in _by_place(data).values():
            for row in filter(lambda row: row["method"].startswith("tolerance"), rows):
                better = advantage(rows, row, by)
                if better is not None:
                    found.append(better)
                    other = statistics.mean(row["psnr"]) - better
                    even_low += [np.quantile(row["psnr"], 0.05) >= other] if by is speedup else []
        said.append(
            f"{min(found):.1f} to {max(found):.1f} dB, {statistics.mean(found):.1f} dB on average, "
            f"{what} ({len(found)} settings)"
        )
    low = f"even the 5th percentile of images is closer in {sum(even_low)} of {len(even_low)}"
    return f"{said[0]}; {said[1]}; in the same time {low}"


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


FIGURES: Mapping[str, Callable[[Path], str]] = {
    # Step caching.
    "presets": partial(presets, what="{}, guidance {:g}, {} steps", fewer="fewer steps:"),
    "presets-zh": partial(presets, what="{}，引导 {:g}，{} 步", fewer="减少步数："),
    "pareto": tolerance_pareto,
    "tolerance": tolerance,
    "tolerance-advantages": tolerance_advantages,
    "calibration": caching.calibration,
    "calibration_table": caching.calibration_table,
    "peers": caching.peers,
    "smoothness": caching.smoothness,
    "run-continuity": caching.continuity,
    # Time on published shapes.
    "sd15-level0": partial(listed, name="sd15_level0"),
    "sd15-level0-1-thread": partial(listed, name="sd15_level0_1_thread"),
    "sd15-forward": partial(listed, name="sd15_forward", pick="(?!ideal ).*", by_speed=True),
    "plans": if_measured(partial(listed, name="sd15_plans"), "sd15_plans"),
    "sdxl": if_measured(partial(listed, name="sdxl_forward"), "sdxl_forward"),
    "matching": partial(listed, name="matching"),
    "matching-sentence": networks.matching_sentence,
    "operations": networks.operations,
    "attention-cpu": partial(networks.attention, name="cpu_attention"),
    "gpu-attention": if_measured(
        partial(networks.attention, name="gpu_attention"), "gpu_attention"
    ),
    "gpu-networks": if_measured(networks.gpu_networks, "gpu_networks"),
    "gpu-caching": if_measured(networks.gpu_caching, "gpu_caching"),
    "gpu-frontier": if_measured(
        partial(listed, name="gpu_frontier", by_speed=True), "gpu_frontier"
    ),
    # Merging.
    "distance-budget": networks.distance_budget,
    "vit-correlation": networks.vit_correlation,
    "vit-quality-224": partial(networks.vit_quality, size=224),
    "vit-quality-518": partial(networks.vit_quality, size=518),
    **frontiers.merging_figures(),
    **frontiers.transformer_figures(),
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
