#!/usr/bin/env python
# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Measured time against error of every way to make a model faster: picture, and who beats whom.

Reads folders that ``tools/evaluate.py`` wrote, one panel each, and says for every contender that
is between ``--low`` and ``--high`` times as fast as dense whether one of ours is at least as fast
with a smaller error, and how many times smaller its squared error is::

    FRONTIER=configs/benchmarks/frontier_demo.py
    python tools/evaluate.py $FRONTIER --out outputs/frontier20
    python tools/evaluate.py ${FRONTIER%.py}_50.py --out outputs/frontier50
    python benchmarks/frontier.py outputs/frontier20 outputs/frontier50 --plot frontier.png
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmagic_tome.apis.files import whole_file

STYLES = {
    "ours: step caching": ("o", "#1a7f4b"),
    "ours: merging": ("P", "#5aa77a"),
    "cached output": ("v", "#8a5ca8"),
    "DeepCache": ("D", "#b0447a"),
    "fewer steps": ("^", "#c2571a"),
    "merging alone": ("s", "#3b6ea8"),
    "tomesd": ("X", "#9a9a9a"),
}
OURS = tuple(name for name in STYLES if name.startswith("ours"))


@dataclass(frozen=True)
class Point:
    """A contender beside dense: seconds per picture (median), speed-up (median and 10th to 90th
    percentile), and errors: PSNR in dB, SSIM, of the last latents the relative error, and the
    distance of EfficientNet-lite0's features; None where an evaluation left a metric out."""

    name: str
    family: str
    seconds: float
    speedup: float
    low: float
    high: float
    psnr: float
    ssim: float | None = None
    latent_error: float | None = None
    feature_distance: float | None = None

    @property
    def squared_error(self) -> float:
        return 10 ** (-self.psnr / 10)


def family_of(row: dict[str, Any]) -> str:
    """What kind of thing a contender is, from the options it ran with."""
    if row["kind"] in ("tomesd", "deepcache", "steps"):
        return {"tomesd": "tomesd", "deepcache": "DeepCache", "steps": "fewer steps"}[row["kind"]]
    options = row["options"]
    caches = options.get("cache")
    if caches:
        # The last output as it is: what caching was before it extrapolated.
        plain = all(cache["order"] == 0 for cache in caches)
        return "cached output" if plain else "ours: step caching"
    own = options.get("prop_attn") or options.get("residual")
    return "ours: merging" if own else "merging alone"


def points_of(results: dict[str, Any]) -> list[Point]:
    """All contenders but dense; those that changed nothing have no PSNR and are left out."""
    points = []
    for row in results["contenders"]:
        quality = {name: value.get("value") for name, value in row["quality"].items()}
        if row["kind"] == "dense" or quality["psnr"] is None:
            continue
        speedup = row["cost"]["speedup"]
        points.append(
            Point(
                row["name"],
                family_of(row),
                row["cost"]["seconds_per_image"]["median"],
                speedup["median"],
                speedup["p10"],
                speedup["p90"],
                quality["psnr"],
                quality.get("ssim"),
                quality.get("latent_error"),
                quality.get("efficientnet_lite0_distance"),
            )
        )
    return points


def beaten_by(point: Point, ours: list[Point]) -> Point | None:
    """The one of ours that is at least as fast and nearest to dense, if it is nearer than this."""
    fast = [one for one in ours if one.speedup >= point.speedup]
    best = max(fast, key=lambda one: one.psnr, default=None)
    return best if best is not None and best.psnr > point.psnr else None


def table(points: list[Point], low: float, high: float) -> str:
    """Markdown: everybody by speed-up, and who of ours is at least as fast with less error."""
    ours = [point for point in points if point.family in OURS]
    lines = [
        "| contender | kind | s / picture | x dense (10 - 90 %) | PSNR, dB | SSIM | latent error | "
        "feature distance | at least as fast, of ours | squared error, times that one's |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    for point in sorted(points, key=lambda one: one.speedup):
        speed = f"{point.speedup:.2f} ({point.low:.2f} - {point.high:.2f})"
        name, beside, times = point.name, "", ""
        if point.family in OURS:
            name = f"**{name}**"
        else:
            better = beaten_by(point, ours)
            if better is not None:
                beside = f"{better.name}: {better.speedup:.2f}, {better.psnr:.1f} dB"
                times = f"{point.squared_error / better.squared_error:.3g}"
            elif low <= point.speedup <= high:
                beside = "none"
        errors = [
            "" if value is None else f"{value:{form}}"
            for value, form in (
                (point.ssim, ".4f"),
                (point.latent_error, ".2g"),
                (point.feature_distance, ".2g"),
            )
        ]
        cells = [name, point.family, f"{point.seconds:.2f}", speed, f"{point.psnr:.1f}"]
        lines.append("| " + " | ".join([*cells, *errors, beside, times]) + " |")
    return "\n".join(lines)


def verdict(points: list[Point], low: float, high: float) -> str:
    """In a few sentences: whether ours has the lowest error at every measured speed-up of a range,
    by PSNR and by the latents, and tomesd's squared error, at any speed, beside ours."""
    ours = [point for point in points if point.family in OURS]
    others = [p for p in points if p.family not in OURS and low <= p.speedup <= high]
    unbeaten = [point.name for point in others if beaten_by(point, ours) is None]
    said = [f"{len(others)} contenders of others are {low:g} to {high:g} times as fast as dense;"]
    if unbeaten:
        said.append(f"not beaten in both: {', '.join(unbeaten)}.")
    else:
        said.append("every one of them is beaten in both by one of ours.")
    by_latents = [
        point.name
        for point in others
        if point.latent_error is not None
        and not any(
            one.speedup >= point.speedup
            and one.latent_error is not None
            and one.latent_error < point.latent_error
            for one in ours
        )
    ]
    if any(point.latent_error is not None for point in others):
        names = ", ".join(by_latents) or "none"
        said.append(f"With the error of the latents in place of PSNR, not beaten: {names}.")
    times = []
    for point in points:
        better = beaten_by(point, ours) if point.family == "tomesd" else None
        if better is not None:
            times.append(f"{point.squared_error / better.squared_error:.3g} ({point.name})")
    if times:
        said.append(f"Squared error, times that of one of ours as fast: {', '.join(times)}.")
    return " ".join(said)


def record(results: dict[str, Any], points: list[Point], cost: dict[str, Any]) -> dict[str, Any]:
    """What a panel is made of: seconds of whole runs, one entry per round, dense first."""
    seconds = {name: figures["seconds"] for name, figures in cost["contenders"].items()}
    keys = ("steps", "pictures", "guidance", "scheduler", "size", "dtype")
    return {
        **{key: results["settings"][key] for key in keys if key in results["settings"]},
        "pictures_per_timed_run": cost["pictures"],
        **{key: results["environment"][key] for key in ("processor", "threads", "versions")},
        "contenders": [
            {"name": "dense", "seconds": seconds["dense"]},
            *[{**asdict(point), "seconds": seconds[point.name]} for point in points],
        ],
    }


def strengths_of(points: list[Point]) -> dict[str, list[Point]]:
    """Points of merging alone that are one method at several strengths, the weakest first."""
    methods: dict[str, list[tuple[float, Point]]] = {}
    for point in points:
        name, _, strength = point.name.rpartition(" ")
        if point.family in ("merging alone", "tomesd") and re.fullmatch(r"\d+(\.\d+)?", strength):
            methods.setdefault(name, []).append((float(strength), point))
    return {
        name: [point for _, point in sorted(own, key=lambda pair: pair[0])]
        for name, own in methods.items()
        if len(own) > 1
    }


def labels_of(points: list[Point]) -> list[tuple[str, float, float]]:
    """(text, x, y) in the picture: one for a method at several strengths, at its weakest."""
    strengths = strengths_of(points)
    among = {id(point) for own in strengths.values() for point in own}
    labels = [(point.name, point) for point in points if id(point) not in among]
    for own in strengths.values():
        last = own[-1].name.rpartition(" ")[2]
        labels.append((f"{own[0].name} - {last}", own[0]))
    return [(text, point.speedup, point.psnr) for text, point in labels]


def draw(path: Path, panels: list[tuple[str, list[Point]]]) -> None:
    """Write the picture, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from mmagic_tome.evaluation.report.plots import place_labels

    figure = Figure(figsize=(7.5 * len(panels), 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for family, (shape, colour) in STYLES.items():
            own = [point for point in points if point.family == family]
            if own:
                axes.errorbar(
                    [point.speedup for point in own],
                    [point.psnr for point in own],
                    xerr=[
                        [max(0.0, point.speedup - point.low) for point in own],
                        [max(0.0, point.high - point.speedup) for point in own],
                    ],
                    fmt=shape,
                    color=colour,
                    markersize=6,
                    elinewidth=0.8,
                    label=family,
                )
        for own in strengths_of(points).values():
            axes.plot(
                [point.speedup for point in own],
                [point.psnr for point in own],
                color=STYLES[own[0].family][1],
                linewidth=0.6,
                alpha=0.5,
                zorder=1,
            )
        front = [
            p for p in points if not any(q.speedup > p.speedup and q.psnr > p.psnr for q in points)
        ]
        front.sort(key=lambda point: point.speedup)
        axes.plot(
            [point.speedup for point in front],
            [point.psnr for point in front],
            color="#444444",
            linewidth=1,
            alpha=0.4,
            zorder=1,
            label="nothing is better in both",
        )
        axes.axvline(1, color="#444444", linestyle=":", linewidth=1)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("times as fast as dense, measured, whole pictures")
        axes.set_ylabel("PSNR against the dense pictures (dB)")
        axes.grid(alpha=0.3)
        axes.margins(0.08)
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    # Last: names are put where everything else leaves room.
    for axes, (_, points) in zip(figure.axes, panels):
        place_labels(figure, axes, labels_of(points))
    with whole_file(path) as part:
        figure.savefig(part, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="written by tools/evaluate.py")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the picture there")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write all figures there, times of every round too",
    )
    parser.add_argument("--low", type=float, default=1.1, help="default: %(default)s")
    parser.add_argument("--high", type=float, default=2.0, help="default: %(default)s")
    args = parser.parse_args()
    panels, records = [], []
    for folder in args.folders:
        file = folder / "results.json"
        if not file.exists():
            sys.exit(f"{file} is not there; run tools/evaluate.py CONFIG --out {folder} first")
        results = json.loads(file.read_text())
        if not results["cost_measured"]:
            sys.exit(f"{folder} has no times; run the same evaluation with --cost-rounds 9")
        points, settings = points_of(results), results["settings"]
        title = f"{settings['steps']} steps, {settings['pictures']} pictures"
        panels.append((title, points))
        if args.json is not None:
            cost = json.loads((folder / "cost.json").read_text())
            records.append(record(results, points, cost))
        print(f"### {title}\n\n{table(points, args.low, args.high)}\n")
        print(verdict(points, args.low, args.high) + "\n")
    if args.plot is not None:
        draw(args.plot, panels)
        print(f"written to {args.plot}")
    if args.json is not None:
        with whole_file(args.json) as part:
            part.write_text(json.dumps(records, indent=1) + "\n")
        print(f"written to {args.json}")


if __name__ == "__main__":
    main()
