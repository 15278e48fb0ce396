# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Figures of networks: operations, times on a GPU, parts of merging, vision transformers."""

from __future__ import annotations

import statistics
from pathlib import Path

from mmagic_tome.lab.measure import interval, ratios

from .data import Data, Row


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


_BUDGET = (("ratio", 2), ("error", 4), ("psnr", 1))


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
