# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""All plots, in one style: fidelity against speed-up, contact sheets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from .files import whole_file

# Colours that colour-blind readers tell apart (Okabe and Ito), and shapes for print.
KINDS = {
    "baseline": ("#000000", "D"),
    "caching": ("#009e73", "o"),
    "merging": ("#0072b2", "s"),
    "merging and caching": ("#56b4e9", "P"),
    "fewer steps": ("#d55e00", "^"),
    "DeepCache": ("#cc79a7", "v"),
    "tomesd": ("#7f7f7f", "X"),
}
OTHER = ("#b8860b", "*")
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "text.parse_math": False,  # names and prompts may have dollar signs
}
DPI = 150
FULL_SCALE = 64  # levels of 255: differences this large and larger are brightest
CELL, MARGIN, LINE = 256, 16, 24  # of a sheet, in pixels
_LABEL = {"textcoords": "offset points", "ha": "center", "fontsize": 9}


@dataclass(frozen=True)
class Point:
    """A method in :func:`fidelity`."""

    name: str
    kind: str  #: one of :data:`KINDS`; anything else looks like no other
    x: float  #: speed-up
    y: float  #: fidelity; infinite where the output is the baseline's
    low: float | None = None  #: interval of ``x``
    high: float | None = None
    label: str | None = None  #: text beside the point; None: the name, '': none


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure, whole or not at all; the same figure is the same bytes."""
    with whole_file(path) as part:
        figure.savefig(part, dpi=DPI, metadata={"Software": None})
    return Path(path)


def panels_of(width: float, height: float, panels: int) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False, sharey=True)[0])


def legend(figure: Figure) -> None:
    """Below the axes, where it covers no point; each name once."""
    found = {}
    for axes in figure.axes:
        found |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels())}
    if len(found) > 1:
        columns = min(5, len(found))
        figure.legend(found.values(), found, loc="outside lower center", ncols=columns)


def pareto_front(points: Sequence[Point], higher_is_better: bool = True) -> list[Point]:
    """Return the points that no other one dominates in x and y, by rising x."""
    sign = 1 if higher_is_better else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.x, -sign * p.y)):
        if not front or sign * point.y > sign * front[-1].y:
            front.append(point)
    return front[::-1]


@matplotlib.rc_context(STYLE)
def fidelity(
    panels: Mapping[str, Sequence[Point]],
    ylabel: str,
    higher_is_better: bool = True,
    width: float = 6.8,
) -> Figure:
    """Draw fidelity against speed-up, a panel per title; what the Pareto front dominates is shaded.

    An infinite y, such as the PSNR of equal images, is at the upper edge, labelled 'identical'; a
    point whose y is NaN is left out. ``higher_is_better``: False turns the axis round, so that
    better is always up. ``width`` of a panel, in inches.
    """
    figure, all_axes = panels_of(1.2 + width * len(panels), 2 + width / 2, len(panels))
    known = [point.y for points in panels.values() for point in points if math.isfinite(point.y)]
    lowest, highest = (min(known), max(known)) if known else (0.0, 1.0)
    top = highest + 0.15 * ((highest - lowest) or 1)
    drawn = [
        [_at_edge(point, top) for point in points if not math.isnan(point.y)]
        for points in panels.values()
    ]
    for axes, title, points in zip(all_axes, panels, drawn):
        axes.set(title=title, xlabel="times as fast as the baseline")
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        for point in points:
            colour, shape = KINDS.get(point.kind, OTHER)
            look = {"color": colour, "fmt": shape, "markersize": 7, "elinewidth": 1, "alpha": 0.9}
            look["clip_on"] = False  # whole at the upper edge too
            if point.low is not None and point.high is not None:
                look["xerr"] = [[max(0, point.x - point.low)], [max(0, point.high - point.x)]]
            axes.errorbar(point.x, point.y, label=point.kind, **look)
            label = point.name if point.label is None else point.label
            # Other methods are compared with fewer steps, and often close above them.
            place = (0, -14 if point.kind == "fewer steps" else 6)
            axes.annotate(label, (point.x, point.y), place, **_LABEL)
        axes.margins(0.1)
        if any(point.y == top for point in points):
            axes.set_ylim(top=top)
    for axes, points in zip(all_axes, drawn):
        limits = axes.axis()
        front = pareto_front(points, higher_is_better)
        xs = [limits[0], *(point.x for point in front)]
        ys = [point.y for point in (*front[:1], *front)]
        look = dict(step="pre", color=KINDS["caching"][0], linewidth=0, zorder=0)
        if front:
            axes.fill_between(xs, ys, limits[2 if higher_is_better else 3], alpha=0.1, **look)
        axes.axis(limits)
    if not higher_is_better:
        all_axes[0].invert_yaxis()
    all_axes[0].set_ylabel(ylabel)
    where = dict(xy=(1, 1.01), xycoords="axes fraction", ha="right", va="bottom")
    all_axes[-1].annotate("higher and further right is better", color="#555555", **where)
    legend(figure)
    return figure


def _at_edge(point: Point, edge: float) -> Point:
    """A point that can be drawn: one whose output is the baseline's is at the edge."""
    if math.isfinite(point.y):
        return point
    name = point.name if point.label is None else point.label
    return replace(point, y=edge, label=f"{name}, identical" if name else "identical")


def difference_map(base: Image.Image, other: Image.Image) -> Image.Image:
    """Return the mean absolute difference over RGB of two images of one size in false colour.

    Black where there is none; brightest from :data:`FULL_SCALE` on.
    """
    a, b = (np.asarray(image.convert("RGB")).astype(int) for image in (base, other))
    scaled = np.clip(np.abs(a - b).mean(axis=2) / FULL_SCALE, 0, 1)
    colours = matplotlib.colormaps["inferno"](scaled)[..., :3]
    return Image.fromarray((255 * colours).round().astype(np.uint8))


def contact_sheet(
    title: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image]]]
) -> Image.Image:
    """Draw images of one size side by side, pixel by pixel, as an RGB image; small ones are
    enlarged by a whole factor, and texts that are too long are cut.

    Args:
        title: First line of the sheet.
        heads: Text over each column, such as a method.
        rows: Caption, and an image for each head.
    """
    first = rows[0][1][0]
    factor = max(1, -(-CELL // first.width))
    width, height = factor * first.width, factor * first.height
    room = len(heads) * (width + MARGIN) - MARGIN
    total = 2 * MARGIN + 2 * LINE + len(rows) * (height + LINE + MARGIN)
    sheet = Image.new("RGB", (room + 2 * MARGIN, total), "white")
    font = ImageFont.truetype(findfont("DejaVu Sans"), 14)

    def write(text: str, x: int, y: int, room: int) -> None:
        line = Image.new("RGB", (room, LINE), "white")
        ImageDraw.Draw(line).text((0, 2), " ".join(text.split()), "black", font)
        sheet.paste(line, (x, y))

    columns = [MARGIN + place * (width + MARGIN) for place in range(len(heads))]
    write(title, MARGIN, MARGIN, room)
    for x, head in zip(columns, heads):
        write(head, x, MARGIN + LINE, width)
    top = MARGIN + 2 * LINE
    for caption, images in rows:
        for x, image in zip(columns, images):
            size = (factor * image.width, factor * image.height)
            sheet.paste(image.convert("RGB").resize(size, Image.Resampling.NEAREST), (x, top))
        write(caption, MARGIN, top + height, room)
        top += height + LINE + MARGIN
    return sheet
