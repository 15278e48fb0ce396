# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Plots as SVG that takes its colours from the page, light or dark.

matplotlib draws with colours that stand for roles; they are replaced by CSS variables.
"""

from __future__ import annotations

import io
import re
import textwrap
from typing import Any

# Role -> (colour that stands for it, CSS variable). No two may be alike.
ROLES = {
    "text": ("#010101", "var(--text)"),
    "line": ("#020202", "var(--line)"),
    "dense": ("#030303", "var(--dense)"),
    "tome": ("#040404", "var(--tome)"),
    "tomesd": ("#050505", "var(--tomesd)"),
    "deepcache": ("#070707", "var(--deepcache)"),
    "steps": ("#060606", "var(--steps)"),
}
SHAPES = {"dense": "D", "tome": "o", "tomesd": "s", "deepcache": "P", "steps": "^"}
LABELS = {
    "dense": "dense",
    "tome": "mmagic_tome",
    "tomesd": "tomesd",
    "deepcache": "DeepCache",
    "steps": "fewer steps",
}
# Of one role, contenders differ by the dashes of their lines.
DASHES = ("-", "--", ":", "-.")
MOST_LINES = 8
MOST_BARS = 5


def colour(role: str) -> str:
    """Return the colour that stands for a role while matplotlib draws."""
    return ROLES[role][0]


def _figure(width: float, height: float):
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(colour("line"))
    axes.tick_params(colors=colour("text"), length=3)
    axes.grid(color=colour("line"), linewidth=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(colour("text"))
    return figure, axes


def _svg(figure, name: str) -> str:
    """Return a figure as an SVG element with the page's colours and fonts."""
    import matplotlib

    text = io.StringIO()
    # Identifiers are unique in a page, and the same whenever it is made.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for stands_for, variable in ROLES.values():
        svg = svg.replace(stands_for, variable)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    # Names of groups repeat from figure to figure.
    svg = re.sub(r'<g id="([^"]+)"', rf'<g id="{name}-\1"', svg)
    return re.sub(r"<svg ([^>]*)>", rf'<svg role="img" aria-label="{name}" \1>', svg, count=1)


def _legend(figure, columns: int) -> None:
    """Below the axes, where it hides no point."""
    legend = figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_color(colour("text"))


def pareto(results: dict[str, Any], metric: str) -> str | None:
    """Return a metric against time per image, with the front that nothing beats in both.

    Args:
        results: Of ``results_of``, with a measured cost.
        metric: Name of the metric.

    Returns:
        An SVG element, or None if fewer than two contenders have the metric.
    """
    points = []
    for row in results["contenders"]:
        value = row["quality"][metric].get("value")
        # Dense is the reference of what is measured against it: the best value there is.
        if value is not None:
            spread = row["cost"]["seconds_per_image"]
            points.append((spread, value, row))
    if len(points) < 2:
        return None
    first = points[0][2]["quality"][metric]
    figure, axes = _figure(5.2, 4.0)
    for kind in SHAPES:
        own = [p for p in points if p[2]["kind"] == kind]
        if own:
            times = [p[0]["median"] for p in own]
            low = [max(0.0, p[0]["median"] - p[0]["p10"]) for p in own]
            high = [max(0.0, p[0]["p90"] - p[0]["median"]) for p in own]
            axes.errorbar(
                times,
                [p[1] for p in own],
                xerr=[low, high],
                fmt=SHAPES[kind],
                color=colour(kind),
                markersize=6,
                elinewidth=1,
                label=LABELS[kind],
            )
    front = _front([(p[0]["median"], p[1]) for p in points], first["higher_is_better"])
    axes.plot(
        *zip(*front),
        color=colour("text"),
        alpha=0.35,
        linewidth=1.2,
        zorder=1,
        label="nothing is better in both",
    )
    if results["contenders"][0]["quality"][metric].get("value") is None:
        dense = results["contenders"][0]["cost"]["seconds_per_image"]["median"]
        axes.axvline(dense, color=colour("dense"), linewidth=1, linestyle=":", label="dense: time")
    unit = f" ({first['unit']})" if first["unit"] else ""
    better = "higher is better" if first["higher_is_better"] else "lower is better: axis turned"
    label = "\n".join([*textwrap.wrap(f"{first['label']}{unit}", 32), better])
    axes.set_ylabel(label, fontsize=9)
    axes.set_xlabel("seconds per image (median, 10th to 90th percentile)", fontsize=9)
    axes.margins(x=0.12, y=0.12)
    if not first["higher_is_better"]:
        axes.invert_yaxis()  # better is up in all of these plots
    _legend(figure, 3)
    place_labels(
        figure, axes, [(row["name"], spread["median"], value) for spread, value, row in points]
    )
    return _svg(figure, f"pareto-{metric}")


def place_labels(figure, axes, points: list[tuple[str, float, float]]) -> list[Any]:
    """Write a name beside each point where it covers neither a point nor another name.

    Args:
        figure, axes: With everything else drawn on them.
        points: Name, x and y, in data coordinates.

    Returns:
        The boxes of the names, as matplotlib's ``Bbox`` in pixels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # names fit into the axes, and these stay where they are
    room = axes.get_window_extent(renderer)
    pixel = figure.dpi / 72
    spots = axes.transData.transform([(x, y) for _, x, y in points])
    marks = [
        Bbox.from_bounds(x - 5 * pixel, y - 5 * pixel, 10 * pixel, 10 * pixel) for x, y in spots
    ]
    placed: list[Any] = []
    # From the right edge inwards: those have the fewest places to choose from.
    for place in sorted(range(len(points)), key=lambda i: -spots[i][0]):
        name, x, y = points[place]
        note = axes.annotate(
            name,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=7,
            color=colour("text"),
            arrowprops=dict(
                arrowstyle="-", color=colour("text"), alpha=0.6, linewidth=0.7, shrinkB=3
            ),
        )
        note.arrow_patch.set_visible(False)
        size = note.get_window_extent(renderer)
        best, lowest = (0.0, 0.0), float("inf")
        for dx, dy in _offsets(size.width / pixel, size.height / pixel):
            left, bottom = spots[place][0] + dx * pixel, spots[place][1] + dy * pixel
            box = Bbox.from_bounds(left, bottom, size.width, size.height)
            outside = box.width * box.height - _shared(box, room)
            cost = sum(_shared(box, other) for other in (*marks, *placed)) + 10 * outside
            cost += 0.02 * (abs(dx) + abs(dy))
            if cost < lowest:
                best, lowest = (dx, dy), cost
        note.set_position(best)
        left, bottom = spots[place][0] + best[0] * pixel, spots[place][1] + best[1] * pixel
        placed.append(Bbox.from_bounds(left, bottom, size.width, size.height))
        gap = max(best[0], -best[0] - size.width / pixel, abs(best[1]))
        note.arrow_patch.set_visible(bool(gap > 8))
    return placed


def _offsets(width: float, height: float):
    """Places of a name's lower left corner around its point, in points, the nearest first."""
    for far in range(6, 80, 4):
        for dx in (far, -far - width, -width / 2):
            for dy in (0.3 * far, -height / 2, -height - 0.3 * far, far, -height - far):
                if dx != -width / 2 or abs(dy) >= far:
                    yield dx, dy


def _shared(one, other) -> float:
    """Area that two boxes share."""
    wide = min(one.x1, other.x1) - max(one.x0, other.x0)
    high = min(one.y1, other.y1) - max(one.y0, other.y0)
    return wide * high if wide > 0 and high > 0 else 0.0


def _front(points, higher_is_better: bool) -> list[tuple[float, float]]:
    """The points that no other beats in time and value, by time."""
    front: list[tuple[float, float]] = []
    sign = 1 if higher_is_better else -1
    for time, value in sorted(points, key=lambda p: (p[0], -sign * p[1])):
        if not front or sign * value > sign * front[-1][1]:
            front.append((time, value))
    return front


def steps_plot(results: dict[str, Any]) -> str:
    """Return milliseconds of every step of every contender, as an SVG element."""
    figure, axes = _figure(5.2, 4.0)
    used: dict[str, int] = {}
    for row in _chosen(results, MOST_LINES):
        kind = row["kind"]
        dash = DASHES[used.setdefault(kind, 0) % len(DASHES)]
        used[kind] += 1
        series = row["cost"]["step_ms"]
        axes.plot(
            range(1, len(series) + 1),
            series,
            dash,
            color=colour(kind),
            linewidth=1.4,
            label=row["name"],
        )
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("ms per image, forward of the network")
    axes.set_ylim(bottom=0)
    _legend(figure, 3)
    return _svg(figure, "steps")


def layers_plot(results: dict[str, Any]) -> str | None:
    """Return milliseconds of each stack of transformer blocks, as an SVG element.

    Times of a block hold what merging does there.
    """
    blocks = results["cost_measured"]["blocks"]
    rows = _chosen(results, MOST_BARS, ("dense", "tome", "tomesd", "deepcache"))
    sums = {row["name"]: _by_stack(blocks[row["name"]]) for row in rows}
    names = list(sums[rows[0]["name"]])
    if not names:
        return None
    figure, axes = _figure(5.2, max(4.0, 1.2 + 0.34 * len(names)))
    height = 0.8 / len(rows)
    used: dict[str, int] = {}
    for place, row in enumerate(rows):
        used[row["kind"]] = used.get(row["kind"], 0) + 1
        values = [1000 * sums[row["name"]].get(name, 0.0) for name in names]
        axes.barh(
            [number + (place - (len(rows) - 1) / 2) * height for number in range(len(names))],
            values,
            height * 0.92,
            color=colour(row["kind"]),
            # Of one kind, later ones are paler.
            alpha=1 / used[row["kind"]] ** 0.7,
            label=row["name"],
        )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms per image and forward")
    _legend(figure, 3)
    return _svg(figure, "layers")


def _by_stack(blocks: list[dict[str, Any]]) -> dict[str, float]:
    """Sum the times of blocks that follow each other at one place of the network."""
    sums: dict[str, float] = {}
    for block in blocks:
        name = re.sub(r"\.?(transformer_blocks|blocks)\.\d+$", "", block["block"])
        name = name.replace("_blocks", "").replace("_block", "").replace("attentions.", "")
        label = f"{name or 'blocks'} (/{block['downsample']})"
        sums[label] = sums.get(label, 0.0) + block["seconds"]
    return sums


def _chosen(results, most: int, kinds=tuple(SHAPES)) -> list[dict[str, Any]]:
    """Dense and so many others, evenly spread over the list."""
    rows = [row for row in results["contenders"] if row["kind"] in kinds]
    others = rows[1:]
    count = min(most - 1, len(others))
    return [rows[0], *(others[i * len(others) // count] for i in range(count))]
