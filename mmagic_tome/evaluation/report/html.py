# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The page of an evaluation: one file that needs no network, with pictures in it."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...apis.assets import asset_path
from ...apis.pictures import FULL_SCALE, difference_map
from ..contenders import DENSE
from ..metrics import max_error_picture
from ..scores import _tensor
from . import plots
from .table import NONE, caption, footnotes_of, heads_and_cells

MOST_PICTURES = 12
MOST_CONTENDERS = 16
# Of all pictures in the page, as base64. Browsers and mail take pages of this size.
MOST_BYTES = 14_000_000
LARGEST_SIDE = 512
# Small pictures are exact; larger ones would make the page heavy.
PNG_SIDE = 256


def page(results: dict[str, Any], folder, measurer, size: tuple[int, int]) -> str:
    """Return the page.

    Args:
        results: Of ``results_of``.
        folder: The ``RunFolder`` with the pictures.
        measurer: The ``Measurer``, for the values of single pictures.
        size: (height, width) of the pictures in pixels.
    """
    data = picture_data(results, folder, measurer)
    parts = {
        "title": _text(f"Token merging in {Path(results['config']).stem}"),
        "caption": _text(caption(results)),
        "summary": _summary(results),
        "table": _table(results),
        "notes": _list(footnotes_of(results)),
        "plots": _plots(results),
        "pictures": _pictures(data, results, size),
        "environment": _environment(results),
        "footer": _text(f"Made by mmagic_tome, {results['finished']}."),
        # Any "</script>" in a prompt would end the element.
        "data": json.dumps(data, allow_nan=False).replace("</", "<\\/"),
        "css": _asset("report.css"),
        "js": _asset("report.js"),
    }
    # One pass: what is filled in is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("report.html"))


def _asset(name: str) -> str:
    return Path(asset_path(f"report/{name}")).read_text(encoding="utf-8")


def _text(value: object) -> str:
    return html.escape(str(value))


def _list(notes: list[str]) -> str:
    if not notes:
        return ""
    return '<ul class="notes">' + "".join(f"<li>{_text(note)}</li>" for note in notes) + "</ul>"


def _summary(results: dict[str, Any]) -> str:
    """One sentence: the fastest setting of this package whose speed-up is beyond doubt."""
    if results["cost_measured"] is None:
        return ""
    rows = [row for row in results["contenders"] if row["kind"] == "tome"]
    sure = [r for r in rows if r["cost"]["certain"] and r["cost"]["speedup"]["median"] > 1]
    if not sure:
        return (
            "<p>No setting of token merging is faster than dense here beyond the spread of its "
            "times.</p>"
        )
    best = max(sure, key=lambda row: row["cost"]["speedup"]["median"])
    paired = [k for k, m in best["quality"].items() if m["kind"] == "paired" and "text" in m]
    return (
        f"<p>Fastest setting of token merging: <strong>{_text(best['name'])}</strong>, "
        f"<strong>{best['cost']['speedup']['median']:.2f}x</strong>"
        f"{_quality(best, paired[0], ' to the dense pictures') if paired else ''}. "
        f"{_against_steps(results, best, paired[0]) if paired else ''}</p>"
    )


def _quality(row: dict[str, Any], metric: str, to: str = "") -> str:
    found = row["quality"][metric]
    return _text(f", at {found['label']} {found['text']}{to}")


def _against_steps(results, best, metric: str) -> str:
    """A sentence: whether fewer steps are as fast and as near to dense as the best merging."""
    sign = 1 if best["quality"][metric]["higher_is_better"] else -1

    def goodness(row) -> float:
        value = row["quality"][metric].get("value")
        return math.inf if value is None else sign * value  # None: identical

    better = [
        row
        for row in results["contenders"]
        if row["kind"] == "steps"
        and row["cost"]["speedup"]["median"] >= best["cost"]["speedup"]["median"]
        and "text" in row["quality"][metric]
        and goodness(row) >= goodness(best)
    ]
    if not better:
        return "No number of fewer steps that was tried is as fast and as near to dense."
    row = max(better, key=goodness)
    return (
        f"Fewer steps do better than that here: {_text(row['name'])}, "
        f"{row['cost']['speedup']['median']:.2f}x{_quality(row, metric)}."
    )


def _table(results: dict[str, Any]) -> str:
    heads, cells = heads_and_cells(results)
    lines = ["<table>", "<tr>" + "".join(f"<th>{_text(head)}</th>" for head in heads) + "</tr>"]
    for row, line in zip(results["contenders"], cells):
        dot = f'<span class="dot" style="background: var(--{row["kind"]})"></span>'
        first = f"<td>{dot}{_text(line[0])}</td>"
        skipped = [metric.get("skipped", "") for metric in row["quality"].values()]
        title = f' title="{_text("; ".join(filter(None, skipped)))}"' if any(skipped) else ""
        rest = "".join(
            f"<td{title if cell == NONE else ''}>{_text(cell)}</td>" for cell in line[1:]
        )
        lines.append(f"<tr>{first}{rest}</tr>")
    return "\n".join([*lines, "</table>"])


def _plots(results: dict[str, Any]) -> str:
    if results["cost_measured"] is None:
        return ""
    names = list(results["contenders"][0]["quality"])
    drawn = [svg for svg in (plots.pareto(results, name) for name in names) if svg]
    parts = ["<h2>Quality against time</h2>", '<p class="soft">Up and to the left is better.</p>']
    parts += ['<div class="plots">', *(f'<div class="card">{svg}</div>' for svg in drawn), "</div>"]
    inside = [plots.steps_plot(results), plots.layers_plot(results)]
    parts += [
        "<h2>Where the time goes</h2>",
        '<p class="soft">Left: the network\'s forward, step by step. Right: its transformer '
        "blocks, summed by place (and how many times coarser than the latent), with what merging "
        "does there: medians of a few steps of one contender after the other, so only large "
        "differences count.</p>",
        '<div class="plots">',
        *(f'<div class="card">{svg}</div>' for svg in inside if svg),
        "</div>",
    ]
    return "\n".join(parts)


def _pictures(data: dict[str, Any], results: dict[str, Any], size) -> str:
    if not data["pictures"]:
        return ""
    total = results["prompts"]["pictures"]
    shown = len(data["pictures"])
    scaled = "" if max(size) <= LARGEST_SIDE else f", shown at {LARGEST_SIDE} pixels"
    # In the sheet all columns are to be seen at once, as far as they can be.
    columns = len(data["contenders"]) + 1
    return f"""\
<h2>Pictures</h2>
<p class="soft">{shown} of {total} prompts, evenly spread{scaled}. Drag over a picture to uncover
the dense one from the left. Differences: mean over RGB, black is 0, pale yellow {FULL_SCALE} of
255 and above.</p>
<div class="choose">
<label for="choice">Compare dense with</label><select id="choice"></select>
</div>
<div class="pairs" id="pairs"></div>
{_worst(data)}
<h2>Contact sheet</h2>
<p class="soft">Click a picture to see it against the dense one.</p>
<div class="card scroll"><table class="sheet" id="sheet" style="--columns: {columns}"></table>
</div>"""


def _worst(data: dict[str, Any]) -> str:
    """The picture of each contender that is furthest from the dense one."""
    if not data["worst"]:
        return ""
    figures = []
    for one in data["worst"]:
        pictures = [(one["dense"], "dense"), (one["picture"], one["name"]), (one["error"], "error")]
        cells = "".join(
            f'<div class="difference"><img src="{uri}" alt="{_text(word)}: {_text(one["prompt"])}">'
            f'<span class="tag left">{_text(word)}</span></div>'
            for uri, word in pictures
        )
        says = " · ".join([f"seed {one['seed']}", *one["values"]])
        figures.append(
            f'<figure class="card pair"><div class="three">{cells}</div><figcaption>'
            f"<strong>{_text(one['name'])}</strong>: {_text(one['prompt'])}"
            f'<div class="soft">{_text(says)}</div></figcaption></figure>'
        )
    return f"""\
<h2>Worst pictures</h2>
<p class="soft">Of each contender the one of all its pictures that is furthest from the dense one by
{_text(data["worst_by"])}. Errors: largest over RGB, white is the largest of the picture, in the
red ring.</p>
<div class="pairs">{"".join(figures)}</div>"""


def _environment(results: dict[str, Any]) -> str:
    environment = results["environment"]
    items = {
        "command": shlex.join(results["command"]),
        "processor": f"{environment['processor']}, {environment['cpus']} CPUs, "
        f"{environment['threads']} thread{'s' * (environment['threads'] > 1)}",
        "GPU": environment["gpu"] or "none",
        "system": environment["platform"],
        "versions": ", ".join(f"{k} {v}" for k, v in environment["versions"].items()),
        "processes": results["processes"],
        "weights": results["settings"]["weights"],
        "prompts": results["prompts"]["digest"],
    }
    measured = results["cost_measured"]
    if measured is not None:
        load = [f"{value:.1f}" for value in measured["load_average_1min"] if value is not None]
        items["load while timing"] = f"{', then '.join(load) or 'unknown'} (1-minute average)"
    rows = [f"<dt>{_text(k)}</dt><dd><code>{_text(v)}</code></dd>" for k, v in items.items()]
    return "\n".join(rows)


# --- pictures ------------------------------------------------------------------------------------


def picture_data(results: dict[str, Any], folder, measurer) -> dict[str, Any]:
    """Return what the page's script shows: pictures as data URIs, with their values.

    Pictures are added prompt by prompt until :data:`MOST_PICTURES` or :data:`MOST_BYTES`.
    """
    others = [c for c in measurer.contenders if c.kind != DENSE]
    if len(others) > MOST_CONTENDERS:
        others = [others[i * len(others) // MOST_CONTENDERS] for i in range(MOST_CONTENDERS)]
    values = {c.name: _values(results, measurer, c) for c in others}
    good = measurer.good(DENSE)
    chosen = [good[i * len(good) // MOST_PICTURES] for i in range(MOST_PICTURES)] if good else []
    pictures, used = [], 0
    for number in dict.fromkeys(chosen):
        dense = folder.picture(DENSE, number)
        entry: dict[str, Any] = {
            "prompt": measurer.prompts[number],
            "seed": measurer.records[DENSE, number]["seed"],
            "dense": data_uri(dense),
            "others": {},
        }
        for contender in others:
            if number not in measurer.good(contender.folder):
                continue
            other = folder.picture(contender.folder, number)
            entry["others"][contender.name] = {
                "picture": data_uri(other),
                "difference": data_uri(difference_map(dense, other), colours=64),
                "values": values[contender.name].get(number, []),
            }
        used += len(json.dumps(entry))
        if pictures and used > MOST_BYTES:
            break
        pictures.append(entry)
    names = [contender.name for contender in others]
    worst, by = _worst_data(folder, measurer, others, values)
    return {
        "contenders": names,
        "first": _first(others),
        "pictures": pictures,
        "worst": worst,
        "worst_by": by,
    }


def _worst_data(folder, measurer, others, values) -> tuple[list[dict[str, Any]], str]:
    """Of each contender the picture that is furthest from dense, and the metric that says so."""
    paired = {n: m for n, m in measurer.metrics.named.items() if n not in measurer.metrics.sets()}
    if not paired:
        return [], ""
    name, metric = next(iter(paired.items()))
    worst = []
    for contender in others:
        numbers, found = measurer.values(name, contender.folder)
        if not numbers:
            continue
        place = int(found.argmin() if metric.higher_is_better else found.argmax())
        number = numbers[place]
        dense, other = (folder.picture(f, number) for f in (DENSE, contender.folder))
        error, where = max_error_picture(*(_tensor(np.asarray(p)) for p in (dense, other)))
        worst.append(
            {
                "name": contender.name,
                "prompt": measurer.prompts[number],
                "seed": measurer.records[DENSE, number]["seed"],
                "values": [*values[contender.name][number], f"max error {where['max_error']}"],
                "dense": data_uri(dense),
                "picture": data_uri(other),
                # Without its strip of words, which are in the caption.
                "error": data_uri(error.crop((0, 0, *dense.size)), colours=64),
            }
        )
    return worst, metric.label


def _first(others) -> str | None:
    """The contender that is shown first: this package's merging nearest to ratio 0.5."""
    merged = [c for c in others if c.kind == "tome"] or list(others)
    if not merged:
        return None
    return min(merged, key=lambda c: abs((c.ratio or 0.0) - 0.5)).name


def _values(results, measurer, contender) -> dict[int, list[str]]:
    """Number of a picture -> its first two paired values as text."""
    texts: dict[int, list[str]] = {}
    names = [n for n in measurer.metrics.named if n not in measurer.metrics.sets()][:2]
    for name in names:
        metric = measurer.metrics.named[name]
        numbers, found = measurer.values(name, contender.folder)
        for number, value in zip(numbers, found.tolist()):
            texts.setdefault(number, []).append(f"{metric.label} {metric.text(value)}")
    return texts


def data_uri(image: Image.Image, colours: int | None = None) -> str:
    """Return a picture as a ``data:`` URI.

    PNG up to :data:`PNG_SIDE` pixels and for few colours, else JPEG; at most
    :data:`LARGEST_SIDE` pixels a side.

    Args:
        image: PIL image.
        colours: Reduce it to so many colours, for maps in false colour.
    """
    image = image.convert("RGB")
    if max(image.size) > LARGEST_SIDE:
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if colours is not None:
        image.quantize(colours, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        kind = "png"
    elif max(image.size) <= PNG_SIDE:
        Image.fromarray(np.asarray(image)).save(file, "PNG", optimize=True)
        kind = "png"
    else:
        image.save(file, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
