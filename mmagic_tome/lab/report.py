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

import pandas as pd
from jinja2 import Environment, PackageLoader
from PIL import Image

from . import plots
from .environment import environment
from .files import write_text
from .metrics.base import Metric
from .results import RunFolder
from .scores import image_rows
from .table import metrics_of, speedup_text, table

# Of the page: pixels of a side, and prompts.
LARGEST_SIDE, MOST_IMAGES = 512, 12


def write_report(folder: RunFolder) -> Path:
    """Write ``table.md``, ``results.csv``, ``results.json``, plots and ``report.html`` of a run, as
    far as it is; return the page, which needs no other file and no network."""
    frame, manifest = table(folder), folder.manifest
    metrics = metrics_of(manifest)
    columns = _columns(frame, metrics)
    cells = [[column[place] for column in columns.values()] for place in range(len(frame))]
    settings, notes = _settings(manifest), [row["text"] for row in folder.find(kind="note")]
    about = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
    command = _command()

    frame.insert(0, "model", settings["model"])
    frame.to_csv(folder.path / "results.csv", index=False)
    save_record(folder.path / "results.json", settings, _rows(folder, frame), manifest)
    lines = [about, "", markdown(list(columns), cells), ""]
    lines += [*(f"- {note}" for note in notes), f"- `{command}`", ""]
    write_text(folder.path / "table.md", "\n".join(lines))
    drawn = _draw(folder, frame, metrics)

    images = _images(folder, metrics)
    where = dict(manifest.get("environment") or environment())
    versions = ", ".join(f"{name} {number}" for name, number in where.pop("versions").items())
    template = Environment(loader=PackageLoader(__package__), autoescape=True)
    html = template.get_template("report.html.j2").render(
        title=f"{settings['model']}: methods compared",
        about=about,
        heads=list(columns),
        rows=cells,
        notes=notes,
        plots={path.stem: data_uri(path) for path in drawn},
        images=images,
        shown=dict.fromkeys(name for image in images for name in image["methods"]),
        environment={**where, "versions": versions, "date": time.strftime("%Y-%m-%d")},
        command=command,
    )
    write_text(folder.path / "report.html", html)
    return folder.path / "report.html"


# --- tables ---------------------------------------------------------------------------------------


def _columns(frame: pd.DataFrame, metrics: Mapping[str, Metric]) -> dict[str, list[str]]:
    """Head -> text of each method; only of what was measured."""
    found = {"method": list(frame["method"])}
    if "speedup" in frame:
        found["times as fast"] = [speedup_text(row) for row in frame.to_dict("records")]
    of = " / image" if "images" in frame else ""
    shown = {f"s{of}": ("seconds", "{:.4g}".format)}
    predicted = {"predicted latent error ↓": ("predicted_error", "{:#.4g}".format)}
    for name, metric in metrics.items():
        arrow = "↑" if metric.higher_is_better else "↓"
        shown[f"{metric.label} {arrow}"] = (name, metric.text)
        if name == "latent_error":
            shown |= predicted
        if name in ("psnr", "latent_error"):  # a mean hides the images that came out badly
            shown[f"{metric.label}, worst 5 % {arrow}"] = (f"{name}_p5", metric.text)
            shown[f"{metric.label}, worst {arrow}"] = (f"{name}_worst", metric.text)
    shown |= predicted
    shown[f"memory{of}, MiB"] = ("memory", lambda value: f"{value / 2**20:.1f}")
    shown[f"TFLOP{of}"] = ("flops", lambda value: f"{value / 1e12:.4g}")
    shown["error"] = ("relative_error", "{:.3g}".format)
    for head, (key, text) in shown.items():
        if key in frame:
            found[head] = ["" if math.isnan(one) else text(one) for one in frame[key]]
    return found


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown: the first column to the left, the others to the right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


# --- records --------------------------------------------------------------------------------------


def save_record(
    path: str | Path,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    manifest: Mapping[str, Any] | None = None,
) -> None:
    """Write measured values with the command, the date, the machine and the versions as JSON, each
    row a line; infinities and NaN become null. Default machine: this one."""
    where = (manifest or {}).get("environment") or environment()
    record = {
        "command": _command(),
        "date": time.strftime("%Y-%m-%d"),
        "environment": {key: where[key] for key in ("processor", "gpu", "threads", "versions")},
        "settings": dict(settings),
        "rows": "ROWS",
    }
    # JSON has no word for infinities and NaN; six digits are more than is measured.
    clean = {
        "parse_constant": lambda word: None,
        "parse_float": lambda text: float(f"{float(text):.6g}"),
    }
    lines = [json.dumps(json.loads(json.dumps(row), **clean), ensure_ascii=False) for row in rows]
    lines = ",\n".join(f"  {line}" for line in lines)
    text = json.dumps(record, indent=1, ensure_ascii=False).replace('"ROWS"', f"[\n{lines}\n ]")
    write_text(path, text + "\n")


def _rows(folder: RunFolder, frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The table's rows, with the seconds of all rounds, per image."""
    found = []
    for row in json.loads(frame.to_json(orient="records")):
        row["kind"] = _kind(folder, row["method"])
        rounds = folder.find(kind="round", method=row["method"])
        rounds = sorted(rounds, key=lambda one: one["turn"])
        row["round_seconds"] = [one["seconds"] / one["images"] for one in rounds]
        found.append({key: value for key, value in row.items() if value not in (None, [])})
    return found


def _kind(folder: RunFolder, name: str) -> str:
    """What a method looks like in plots: one of ``plots.KINDS``, or its label."""
    method = folder.manifest["methods"].get(name, {"kind": name, "label": name})
    return method["kind"] if method["kind"] == "fewer steps" else method["label"]


def _settings(manifest: Mapping[str, Any]) -> dict[str, Any]:
    found = {"model": manifest["model"], **manifest.get("request", {})}
    found |= {key: manifest.get(key) for key in ("dtype", "mode", "images_per_timed_run")}
    found["scheduler"] = manifest.get("loaded", {}).get("scheduler")
    found["size"] = "x".join(map(str, found.get("size") or ()))
    return {key: value for key, value in found.items() if value and key != "prompts"}


def _command() -> str:
    """The command line without the folder of its results, which says nothing to others."""
    words = ["python", *sys.argv]
    if words[1].endswith("__main__.py"):
        words[1:2] = ["-m", __package__.partition(".")[0]]
    return re.sub(r" --resume| --work-dir[ =]\S+", "", shlex.join(words))


# --- plots and images -----------------------------------------------------------------------------


def _draw(folder: RunFolder, frame: pd.DataFrame, metrics: Mapping[str, Metric]) -> list[Path]:
    """The plots: each metric against speed-up."""
    timed = frame[frame["speedup"].notna()] if "speedup" in frame else frame[:0]
    drawn = []
    for name in [name for name in metrics if name in frame and len(timed)]:
        metric, keys = metrics[name], ["method", "speedup", name, "speedup_low", "speedup_high"]
        points = [
            plots.Point(method, _kind(folder, method), *values)
            for method, *values in timed[keys].itertuples(index=False)
        ]
        label = f"{metric.label} ({metric.unit})" if metric.unit else metric.label
        figure = plots.fidelity({"": points}, label, metric.higher_is_better)
        drawn.append(plots.save(figure, folder.path / f"{name}.png"))
    return drawn


def _images(folder: RunFolder, metrics: Mapping[str, Metric]) -> list[dict[str, Any]]:
    """What the page's script shows: prompts evenly spread."""
    images = image_rows(folder)
    said: dict[tuple[str, int], list[str]] = {key: [] for key in images}
    for row in folder.find(kind="metric"):
        if row["metric"] in metrics and row["number"] is not None and row["value"] is not None:
            metric = metrics[row["metric"]]
            text = f"{metric.label} {metric.text(row['value'])}"
            said[row["method"], row["number"]].append(text)
    for key, row in images.items():
        if row.get("predicted_error") is not None:
            said[key].append(f"predicted latent error {row['predicted_error']:#.4g}")
    numbers = [number for method, number in images if method == "baseline"]
    found: list[dict[str, Any]] = []
    for number in numbers[:: max(1, len(numbers) // MOST_IMAGES)][:MOST_IMAGES]:
        others = {
            method: {
                "image": data_uri(folder.path / row["file"], LARGEST_SIDE),
                "values": said[method, number],
            }
            for (method, of), row in images.items()
            if of == number
        }
        row = images["baseline", number]
        base = others.pop("baseline")["image"]
        entry = {"prompt": row["prompt"], "seed": row["seed"], "baseline": base}
        found.append({**entry, "methods": others})
    return found


def data_uri(path: Path, largest: int | None = None) -> str:
    """Return a PNG or GIF as a ``data:`` URI; a PNG of more than half of ``largest`` pixels a side
    becomes a JPEG."""
    data, kind = path.read_bytes(), path.suffix[1:]
    image = Image.open(path)
    if largest and kind == "png" and max(image.size) > largest // 2:
        image.thumbnail((largest, largest))
        file, kind = io.BytesIO(), "jpeg"
        image.convert("RGB").save(file, "JPEG", quality=88)
        data = file.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
