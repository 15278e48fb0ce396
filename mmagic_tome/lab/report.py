# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What a reader gets of a run: a table, plots, a page with images; all from the folder's rows."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader
from PIL import Image

from ..errors import ToMeError
from . import plots
from .environment import environment
from .files import whole_file
from .measure import Interval
from .metrics.base import Metric
from .results import RunFolder
from .table import table

# In the page: images at most this wide, and so many bytes of them, which mail and browsers take.
LARGEST_SIDE, MOST_BYTES = 512, 12_000_000
MOST_IMAGES, MOST_METHODS = 12, 16
Cell = tuple[str, Any]


def write_report(folder: RunFolder) -> Path:
    """Write ``table.md``, ``results.csv``, ``results.json``, plots and ``report.html``.

    Args:
        folder: Of a run that is finished, or as far as it is.

    Returns:
        The page, which needs no other file and no network.
    """
    frame, manifest = table(folder), folder.manifest
    columns = _columns(frame, manifest.get("metrics", {}))
    heads = list(columns)
    cells = [[column[place] for column in columns.values()] for place in range(len(frame))]
    notes = [row["text"] for row in folder.find(kind="note")]
    settings, command = _settings(manifest), _command()
    caption = ", ".join(f"{name} {value}" for name, value in settings.items())

    frame.to_csv(folder.path / "results.csv", index=False)
    save_record(folder.path / "results.json", settings, _rows(folder, frame), manifest)
    text = [[text for text, _ in line] for line in cells]
    lines = [caption, "", markdown(heads, text), "", *(f"- {note}" for note in notes)]
    with whole_file(folder.path / "table.md") as path:
        path.write_text("\n".join([*lines, f"- `{command}`", ""]), encoding="utf-8")
    drawn = {path.stem: data_uri(path) for path in _draw(folder, frame)}

    images = _images(folder)
    page = Environment(loader=PackageLoader(__package__), autoescape=True)
    with whole_file(folder.path / "report.html") as path:
        html = page.get_template("report.html.j2").render(
            title=f"{manifest.get('name', folder.path.name)}: methods compared",
            caption=caption,
            heads=heads,
            rows=[[{"text": text, "value": value} for text, value in line] for line in cells],
            notes=notes,
            plots=drawn,
            images=images,
            shown=list(dict.fromkeys(name for image in images for name in image["methods"])),
            environment={**_where(manifest), "date": time.strftime("%Y-%m-%d")},
            command=command,
        )
        path.write_text(html, encoding="utf-8")
    return folder.path / "report.html"


# --- tables -------------------------------------------------------------------------------------


def _columns(frame: pd.DataFrame, metrics: Mapping[str, Any]) -> dict[str, list[Cell]]:
    """Head -> for each method the text and the value to sort by."""
    found = {"method": [(name, name) for name in frame["method"]]}

    def add(head: str, key: str, text: Any) -> None:
        if key in frame:
            values = frame[key].astype(object).where(frame[key].notna(), None)
            found[head] = [("", "") if v is None else (text(v), v) for v in values]

    if "speedup" in frame:
        keys = ["speedup", "speedup_low", "speedup_high", "rounds"]
        found["times as fast"] = [
            (Interval(median, low, high, 0.95, int(rounds)).text(), median)
            for median, low, high, rounds in frame[keys].fillna(0).itertuples(index=False)
        ]
    add("s / image", "seconds", "{:.4g}".format)
    for name, about in metrics.items():
        metric = Metric(name, about["label"], function=None, unit=about["unit"])
        add(f"{about['label']} {'↑' if about['higher_is_better'] else '↓'}", name, metric.text)
    add("memory / image, MiB", "memory", lambda value: f"{value / 2**20:.1f}")
    add("TFLOP / image", "flops", lambda value: f"{value / 1e12:.4g}")
    return found


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown: the first column to the left, the others to the right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(
        f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |"
        for line in lines
    )


def replace_table(page: str | Path, name: str, text: str) -> None:
    """Put a text between the markers of a Markdown page and change nothing else of it.

    Args:
        page: The file; has ``<!-- figure: NAME -->...<!-- /figure -->`` once.
        name: Of the figure.
        text: Several lines are put on lines of their own, a single one within its line.

    Raises:
        ToMeError: The page does not have the markers once.
    """
    page = Path(page)
    old = page.read_text(encoding="utf-8")
    parts = re.split(rf"(?s)(?<=<!-- figure: {re.escape(name)} -->)(.*?)(?=<!-- /figure -->)", old)
    if len(parts) != 3:
        raise ToMeError(
            f"{page} needs <!-- figure: {name} --> and <!-- /figure --> once, and has them "
            f"{len(parts) // 2} times"
        )
    new = f"{parts[0]}\n{text}\n{parts[2]}" if "\n" in text else f"{parts[0]}{text}{parts[2]}"
    if new != old:
        with whole_file(page) as path:
            path.write_text(new, encoding="utf-8")


# --- records ------------------------------------------------------------------------------------


def save_record(
    path: str | Path,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    manifest: Mapping[str, Any] | None = None,
) -> None:
    """Write measured values with what they were measured with: command, date, machine, versions.

    Args:
        path: A JSON file, a line for each row.
        settings: What was measured.
        rows: JSON-able; numbers are rounded to six digits.
        manifest: Of the run's folder, which knows the machine. Default: None, this one.
    """
    where = (manifest or {}).get("environment") or environment()
    record = {
        "command": _command(),
        "date": time.strftime("%Y-%m-%d"),
        "environment": {key: where[key] for key in ("processor", "gpu", "threads", "versions")},
        "settings": dict(settings),
        "rows": "ROWS",
    }
    lines = ",\n".join(f"  {json.dumps(_rounded(row), ensure_ascii=False)}" for row in rows)
    text = json.dumps(record, indent=1, ensure_ascii=False).replace('"ROWS"', f"[\n{lines}\n ]")
    with whole_file(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    if isinstance(value, float):  # JSON has no word for infinities and NaN
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def kind_of(method: Mapping[str, Any]) -> str:
    """What a method of a manifest looks like in plots: one of ``plots.KINDS``, or its label."""
    return method["kind"] if method["kind"] == "fewer steps" else method["label"]


def _rows(folder: RunFolder, frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The table's rows, with the times of all rounds."""
    found = []
    for row in frame.to_dict("records"):
        rounds = folder.find(kind="round", method=row["method"])
        row["kind"] = kind_of(folder.manifest["methods"][row["method"]])
        row["round_seconds"] = [one["seconds"] for one in sorted(rounds, key=lambda r: r["turn"])]
        found.append({key: value for key, value in row.items() if not _missing(value)})
    return found


def _missing(value: Any) -> bool:
    return value is None or value == [] or value != value


def _settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    request = manifest.get("request", {})
    found = {"model": manifest.get("name"), **request, "dtype": manifest.get("dtype")}
    found["scheduler"] = manifest.get("model", {}).get("scheduler")
    found["size"] = "x".join(map(str, request.get("size") or ()))
    found = {key: value for key, value in found.items() if value and key != "prompts"}
    return found


def _command() -> str:
    """The command line, without the folder of its results, which says nothing to others."""
    words = ["python", *sys.argv]
    if words[1].endswith("__main__.py"):
        words[1:2] = ["-m", __package__.partition(".")[0]]
    text = shlex.join(words)
    return re.sub(r" --resume| --work-dir[ =]\S+", "", text)


def _where(manifest: Mapping[str, Any]) -> dict[str, Any]:
    where = dict(manifest.get("environment") or environment())
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    return {key: value for key, value in where.items() if value} | {"versions": versions}


# --- plots and images ---------------------------------------------------------------------------


def _draw(folder: RunFolder, frame: pd.DataFrame) -> list[Path]:
    """Write the plots: each metric against speed-up, speed-ups, times by step."""
    if "speedup" not in frame:
        return []
    methods, found = folder.manifest["methods"], {}
    kinds = {name: kind_of(method) for name, method in methods.items()}
    timed = [row for row in frame.to_dict("records") if not _missing(row["speedup"])]

    def points(key: str | None = None) -> list[plots.Point]:
        return [
            plots.Point(
                row["method"],
                kinds[row["method"]],
                row["speedup"],
                row[key] if key else math.nan,
                row["speedup_low"],
                row["speedup_high"],
            )
            for row in timed
            if key is None or not _missing(row[key])
        ]

    for name, about in folder.manifest.get("metrics", {}).items():
        if name in frame and len(points(name)) > 1:
            label = f"{about['label']} ({about['unit']})" if about["unit"] else about["label"]
            panels = {"": points(name)}
            found[name] = plots.fidelity(panels, label, about["higher_is_better"])
    found["speedup"] = plots.bars({"": points()}, "times as fast as the baseline")
    return [plots.save(figure, folder.path / f"{name}.png") for name, figure in found.items()]


def data_uri(path: Path) -> str:
    """Return an image as a ``data:`` URI: as it is up to 256 pixels a side, else as a JPEG."""
    data, image = path.read_bytes(), Image.open(path)
    kind = image.format.lower()
    if kind == "png" and max(image.size) > 256 and path.parent.parent.name == "images":
        image = image.convert("RGB")
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        file, kind = io.BytesIO(), "jpeg"
        image.save(file, "JPEG", quality=88)
        data = file.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _images(folder: RunFolder) -> list[dict[str, Any]]:
    """What the page's script shows: prompt by prompt, evenly spread, until it is too much."""
    metrics = folder.manifest.get("metrics", {})
    images = {(row["method"], row["number"]): row for row in folder.find(kind="image")}
    numbers = [number for method, number in images if method == "baseline"]
    names = [name for name in folder.manifest.get("methods", {}) if name != "baseline"]
    values: dict[tuple[str, int], list[str]] = {}
    for row in folder.find(kind="metric"):
        about = metrics.get(row["metric"])
        if row["number"] is not None and row["value"] is not None and about:
            metric = Metric(row["metric"], about["label"], None, about["unit"])
            text = f"{metric.label} {metric.text(row['value'])}"
            values.setdefault((row["method"], row["number"]), []).append(text)
    found: list[dict[str, Any]] = []
    used = 0
    for number in numbers[:: max(1, len(numbers) // MOST_IMAGES)][:MOST_IMAGES]:
        base = images["baseline", number]
        shown = [name for name in names if (name, number) in images][:MOST_METHODS]
        entry = {
            "prompt": base["prompt"],
            "seed": base["seed"],
            "baseline": data_uri(folder.path / base["file"]),
            "methods": {
                name: {
                    "image": data_uri(folder.path / images[name, number]["file"]),
                    "values": values.get((name, number), []),
                }
                for name in shown
            },
        }
        used += len(json.dumps(entry))
        if found and used > MOST_BYTES:
            break
        found.append(entry)
    return found
