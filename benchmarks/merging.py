#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Where merging loses detail, and what brings it back: tables and a picture of one evaluation.

Reads the folder of ``configs/benchmarks/merging_demo.py``, whose contenders are called
``GROUP: WHAT`` with ``, proportional`` behind where keys were weighted by their size::

    python tools/evaluate.py configs/benchmarks/merging_demo.py --cost-rounds 0
    python benchmarks/merging.py outputs/evaluate/merging_demo --plot merging.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mmagic_tome.apis.files import whole_file

WEIGHTED = ", proportional"
# The groups that are drawn: where detail is lost.
DRAWN = {"level": "level (times coarser)", "block": "block of level 1", "noise": "noise"}
COLOURS = {"plain": "#3b6ea8", "weighted": "#1a7f4b"}


def groups_of(results: dict[str, Any]) -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
    """{group: {what: {'plain' | 'weighted': (PSNR in dB, relative error of the latents)}}};
    contenders without a group stand in the group '' ."""
    groups: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for row in results["contenders"]:
        psnr = row["quality"]["psnr"].get("value")
        if row["kind"] == "dense" or psnr is None:
            continue
        name = row["name"]
        kind = "weighted" if name.endswith(WEIGHTED) else "plain"
        group, _, what = name.removesuffix(WEIGHTED).rpartition(": ")
        latents = row["quality"]["latent_error"]["value"]
        groups.setdefault(group, {}).setdefault(what, {})[kind] = (psnr, latents)
    return groups


def table(group: str, rows: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Markdown of one group."""
    lines = [
        f"| {group} | PSNR, dB | latent error | PSNR, proportional | latent error |",
        "|---|---:|---:|---:|---:|",
    ]
    for what, kinds in rows.items():
        cells = []
        for kind in ("plain", "weighted"):
            psnr, latents = kinds.get(kind, (None, None))
            cells += ["", ""] if psnr is None else [f"{psnr:.1f}", f"{latents:.2g}"]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path: Path, groups: dict[str, dict[str, dict[str, tuple[float, float]]]]) -> None:
    """Bars of squared latent error, one panel per group; written whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = {group: groups[group] for group in DRAWN if group in groups}
    figure = Figure(figsize=(4.2 * len(drawn), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    for axes, (group, rows) in zip(panels, drawn.items()):
        for offset, kind, label in (
            (-0.2, "plain", "ToMe 0.5"),
            (0.2, "weighted", "with proportional attention"),
        ):
            axes.bar(
                [place + offset for place in range(len(rows))],
                [kinds[kind][1] ** 2 if kind in kinds else 0 for kinds in rows.values()],
                width=0.4,
                color=COLOURS[kind],
                label=label,
            )
        axes.set_xticks(range(len(rows)), list(rows), fontsize=9)
        axes.set_yscale("log")
        axes.set_title(DRAWN[group], fontsize=11, loc="left")
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("squared relative error of the latents")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    with whole_file(path) as part:
        figure.savefig(part, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="written by tools/evaluate.py")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the picture there")
    args = parser.parse_args()
    file = args.folder / "results.json"
    if not file.exists():
        sys.exit(
            f"{file} is not there; run tools/evaluate.py configs/benchmarks/merging_demo.py "
            f"--out {args.folder} first"
        )
    groups = groups_of(json.loads(file.read_text()))
    if args.plot is not None and not any(group in groups for group in DRAWN):
        sys.exit(f"{file} has none of the groups that are drawn: {', '.join(DRAWN)}")
    for group, rows in groups.items():
        print(table(group, rows) + "\n")
    if args.plot is not None:
        draw(args.plot, groups)
        print(f"written to {args.plot}")


if __name__ == "__main__":
    main()
