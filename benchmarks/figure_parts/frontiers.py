# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Figures of frontiers: whole runs by many methods, beside fewer steps.

There are too many methods for a page: of a case it shows the best ones, those of other packages,
and fewer steps. All are in the data.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
from rows import advantage, is_fewer_steps, paired, speedup

from mmagic_tome.lab import plots

from .data import NETWORKS, NOT_MEASURED, PSNR, Data, Row, if_measured

BEST = 10  # methods of this package per case
# Rows of other packages and of the method closest to them, which are always shown.
ALWAYS = re.compile(r"tomesd .*|todo .*|diffusers .*|cache-dit .*")
IDENTICAL = 100  # dB and more; the data write 120 for images that are equal
_CASE = ("model", "size", "scheduler", "guidance", "steps")


def best(rows: Sequence[Row], count: int = BEST) -> list[Row]:
    """What of a case is shown: the best methods, the fastest first, with all that is always shown.

    The best are those on the Pareto front of time and PSNR, then those with the highest advantage
    over fewer steps in the same time.

    Args:
        rows: Of one case; those that failed are not shown.
        count: Of the methods that are not always shown.
    """
    runs = [row for row in rows if "failed" not in row]
    others = [
        row for row in runs if not is_fewer_steps(row) and not ALWAYS.fullmatch(row["method"])
    ]
    front = {point.name for point in plots.pareto_front([point_of(row) for row in runs])}

    def rank(row: Row) -> tuple[bool, float]:
        faster = speedup(row) > 1  # the baseline dominates all that are not
        better = advantage(runs, row)
        return faster and row["method"] in front, -math.inf if better is None else better

    shown = {row["method"] for row in sorted(others, key=rank, reverse=True)[:count]}
    kept = [row for row in runs if row not in others or row["method"] in shown]
    return sorted(kept, key=speedup, reverse=True)


def kind_of(method: str) -> str:
    """What a method looks like in plots."""
    if is_fewer_steps({"method": method}):
        return "fewer steps"
    if method.startswith("tomesd "):
        return "tomesd"
    if method.startswith(("diffusers ", "cache-dit ")):
        return "diffusers, cache-dit"
    cached = method.startswith(("tolerance ", "network,", "inner,"))
    if cached and " and ToMe" in method:
        return "merging and caching"
    return "caching" if cached else "merging"


def point_of(row: Row) -> plots.Point:
    """A method that runs, in a plot."""
    speed, psnr = paired(row), mean(row["psnr"])
    psnr = psnr if psnr < IDENTICAL else math.inf
    name = row["method"]
    return plots.Point(name, kind_of(name), speed.median, psnr, speed.low, speed.high)


def _rows(data: Data, **case: object) -> list[Row]:
    """Rows of a case, judged on captions that no setting was chosen on."""
    wanted = {**case, "captions": "judge"}
    return [row for row in data.rows if all(row[key] == wanted[key] for key in wanted)]


def _about(rows: Sequence[Row], *, without: str = "") -> str:
    """What all rows of a table have in common, and how many images there are."""
    row = next(row for row in rows if "psnr" in row)
    said = {
        "model": NETWORKS[row["model"]],
        "size": f"{row['size']}x{row['size']}",
        "scheduler": {"flow": "flow matching, Euler"}.get(row["scheduler"], row["scheduler"]),
        "guidance": f"guidance {row['guidance']:g}",
        "steps": f"{row['steps']} steps",
    }
    images = max(len(row["psnr"]) for row in rows if "psnr" in row)
    return ", ".join([*(said[key] for key in _CASE if key != without), f"{images} images"])


def _decibels(values: Sequence[float]) -> str:
    return "identical" if mean(values) >= IDENTICAL else f"{mean(values):.1f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f}"


def _memory(rows: Sequence[Row]) -> str:
    """The largest peak, relative to the baseline's; empty if it was not measured."""
    found = [row["memory"] for row in rows if "memory" in row]
    return f"{max(found):.2f}" if found else ""


def frontier(page: Path, name: str, **case: object) -> str:
    """Whole runs of one case, the fastest first.

    Args:
        page: Where the table goes.
        name: Of the data.
        case: ``model``, ``size``, ``scheduler``, ``guidance`` and ``steps``.
    """
    data = Data(page, name)
    rows = _rows(data, **case)
    runs = [row for row in rows if "failed" not in row]
    if not runs:
        return NOT_MEASURED
    cells = []
    for row in best(rows):
        psnr = row["psnr"]
        low = "" if mean(psnr) >= IDENTICAL else f" ({np.percentile(psnr, 5):.1f}, {min(psnr):.1f})"
        better = _signed(advantage(runs, row))
        text = paired(row).text()
        cells.append([row["method"], text, _decibels(psnr) + low, better, _memory([row])])
    cells += [[row["method"], "does not run", _reason(row), "", ""] for row in _failed(rows)]
    heads = ["", "times as fast", "PSNR, dB: mean (5 %, worst)", "over fewer steps, dB"]
    return data.table([*heads, "memory"], cells, _about(runs))


def by_steps(page: Path, name: str, **case: object) -> str:
    """Whole runs by many numbers of steps, a column each; fewer steps by their share.

    Args:
        page: Where the table goes.
        name: Of the data.
        case: ``model``, ``size``, ``scheduler`` and ``guidance``.
    """
    data = Data(page, name)
    rows = _rows(data, **case)
    cells: dict[str, dict[int, str]] = {}
    shown: dict[str, list[Row]] = {}
    numbers = sorted({row["steps"] for row in rows if "failed" not in row})
    if not numbers:
        return NOT_MEASURED
    for steps in numbers:
        runs = [row for row in rows if row["steps"] == steps and "failed" not in row]
        for row in best(runs):
            label, better = _share(row), advantage(runs, row)
            over = "" if better is None else f" ({better:+.1f})"
            text = f"{paired(row).text()}: **{_decibels(row['psnr'])}**{over}"
            cells.setdefault(label, {})[steps] = text
            shown.setdefault(label, []).append(row)
    lines = [
        [label, *(cells[label].get(steps, "") for steps in numbers), _memory(shown[label])]
        for label in sorted(shown, key=lambda label: -mean(map(speedup, shown[label])))
    ]
    for row in _failed(rows):
        lines.append([row["method"], f"does not run: {_reason(row)}", *[""] * len(numbers)])
    heads = ["", *(f"{steps} steps" for steps in numbers), "memory"]
    runs = [row for row in rows if "failed" not in row]
    return data.table(heads, lines, _about(runs, without="steps"))


def _share(row: Row) -> str:
    """The name of a method that is the same at every number of steps."""
    if not is_fewer_steps(row):
        return row["method"]
    share = int(row["method"].split()[0]) / row["steps"]
    return f"{5 * round(20 * share)} % of the steps"


def _failed(rows: Sequence[Row]) -> list[Row]:
    """One row of each method that does not run in any case."""
    ran = {row["method"] for row in rows if "failed" not in row}
    return [*{row["method"]: row for row in rows if row["method"] not in ran}.values()]


def _reason(row: Row) -> str:
    return textwrap.shorten(row["failed"], 90, placeholder=" ...")


def pareto(page: Path, name: str, image: str, guidances: Sequence[float], **case: object) -> str:
    """PSNR against speed-up of what the tables show, a panel per guidance scale.

    Args:
        page: Where the plot goes.
        name: Of the data.
        image: File in ``docs/images``, without its ending.
        guidances: Those of which nothing is measured have no panel.
        case: ``model``, ``size``, ``scheduler`` and ``steps``.
    """
    data = Data(page, name)
    panels: dict[str, list[plots.Point]] = {}
    for guidance in guidances:
        points = [point_of(row) for row in best(_rows(data, guidance=guidance, **case))]
        points = [point for point in points if point.x > 1 or math.isfinite(point.y)]
        front = plots.pareto_front(points)
        named = {point.name for point in front} | {
            point.name for point in points if point.kind == "fewer steps"
        }
        if points:
            panels[f"guidance {guidance:g}"] = [
                replace(point, label=_label(point.name) if point.name in named else "")
                for point in points
            ]
    if not panels:
        return NOT_MEASURED
    figure = plots.fidelity(panels, PSNR, width=4.6)
    return data.plot(image, figure, f"Fidelity against speed-up of the {NETWORKS[case['model']]}")


def methods(page: Path) -> str:
    """PSNR of every merging method there was, by the fraction of tokens that merge.

    Their times are not in the data: what a method saves at most is the share of attention's
    products that remains.
    """
    data, ratios = Data(page, "merging_methods"), (0.25, 0.5, 0.75)
    found: dict[str, dict[float, dict[float, float]]] = {}
    for row in data.rows:
        name, ratio, variant = re.fullmatch(r"(.*?) ([0-9.]+)(|, .*)", row["method"]).groups()
        by_guidance = found.setdefault(name + variant, {}).setdefault(float(ratio), {})
        by_guidance[row["guidance"]] = mean(row["psnr"])
    shown = [name for name in found if not name.endswith(", unweighed") or name.startswith("ToMe")]
    cells = []
    for name in sorted(shown, key=lambda name: -found[name].get(0.5, {}).get(7.5, 0)):
        line = [name]
        for ratio in ratios:
            by_guidance = found[name].get(ratio, {})
            line.append(" / ".join(f"{by_guidance[one]:.1f}" for one in sorted(by_guidance)))
        cells.append(line)
    heads = ["ratio", *(f"{ratio:g}" for ratio in ratios)]
    return data.table(heads, cells, "demo model, 256x256, DDIM, 20 steps, 2 captions")


def _label(method: str) -> str:
    """A method in a plot, whose legend says whether it merges and caches."""
    short = method.removeprefix("tolerance ").replace(" and ToMe 0.5, keys and values", "")
    return short.removeprefix("ToMe ").replace(", keys and values", "").replace("cells of ", "")


# --- names of figures -----------------------------------------------------------------------------


def merging_figures() -> dict[str, Callable[[Path], str]]:
    """Name in the page -> figure, of ``merging_frontier.py``."""
    made: dict[str, Callable[[Path], str]] = {}
    name, guidances = "merging_frontier", (3.0, 7.5)
    for model, scheduler in (("unet", "DDIM"), ("transformer", "flow")):
        case = {"model": model, "size": 256, "scheduler": scheduler, "steps": 20}
        image = f"merging_{model}"
        made[f"merging-{model}"] = partial(
            pareto, name=name, image=image, guidances=guidances, **case
        )
        for guidance in guidances:
            key = f"merging-{model}-{guidance:g}"
            made[key] = partial(frontier, name=name, guidance=guidance, **case)
    made = {key: if_measured(figure, name) for key, figure in made.items()}
    return {**made, "merging-methods": methods}


def transformer_figures() -> dict[str, Callable[[Path], str]]:
    """Name in the page -> figure, of ``diffusion_transformer.py``."""
    name, guidances = "diffusion_transformer", (1.0, 3.0, 7.5)
    case = {"model": "transformer", "size": 256, "scheduler": "flow"}
    made: dict[str, Callable[[Path], str]] = {
        f"transformer-{guidance:g}": partial(by_steps, name=name, guidance=guidance, **case)
        for guidance in guidances
    }
    made["transformer"] = partial(
        pareto, name=name, image="diffusion_transformer", guidances=guidances, steps=28, **case
    )
    return {key: if_measured(figure, name) for key, figure in made.items()}
