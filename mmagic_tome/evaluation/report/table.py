# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The table of an evaluation, in the layout of the tomesd paper (arXiv 2303.17604, table 2).

Ratio, the metric of a set under its own name, seconds and memory per image with their factors;
the paired metrics follow.
"""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...apis.pictures import ResultFolder
from ...errors import ToMeError

BEGIN = "<!-- evaluation table: begin -->"
END = "<!-- evaluation table: end -->"
NONE = "–"
# Figures of the cost that are one number each.
SINGLE = (
    "images_per_second",
    "memory_per_image",
    "unet_memory_per_image",
    "process_peak_bytes",
    "joules_per_image",
    "tflop_per_image",
    "unet_tflop_per_image",
)


def heads_and_cells(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the heads of the columns and the cells of each contender, as plain text."""
    rows = results["contenders"]
    metrics = list(rows[0]["quality"])
    kinds = {name: rows[0]["quality"][name]["kind"] for name in metrics}
    sets = [name for name in metrics if kinds[name] == "set"]
    paired = [name for name in metrics if kinds[name] == "paired"]
    timed = results["cost_measured"] is not None
    energy = timed and all(row["cost"]["joules_per_image"] is not None for row in rows)

    heads = ["", "r (%)", "steps", *(_head(rows, name) for name in sets)]
    heads += ["s/img ↓", "x"] if timed else []
    heads += ["GB/img ↓", "x", "network: GB/img ↓"] if timed else []
    heads += ["J/img ↓"] if energy else []
    heads += [_head(rows, name) for name in paired]
    cells = []
    for row in rows:
        line = [row["name"], _ratio(row), str(row["steps"])]
        line += [_metric(row["quality"][name]) for name in sets]
        if timed:
            seconds = _three_digits(row["cost"]["seconds_per_image"]["median"])
            line += [seconds, speedup_text(row)]
            run, network = (
                (_three_digits(row["cost"][f"{key}_per_image"] / 1e9), row["cost"][f"{key}_factor"])
                for key in ("memory", "unet_memory")
            )
            line += [run[0], f"{run[1]:.2f}", f"{network[0]} ({network[1]:.2f}x)"]
        if energy:
            line.append(_three_digits(row["cost"]["joules_per_image"]))
        line += [_metric(row["quality"][name]) for name in paired]
        cells.append(line)
    return heads, cells


def _ratio(row: dict[str, Any]) -> str:
    """Per cent; and what is done besides, lest 0 be read as dense."""
    text = NONE if row["ratio"] is None else f"{100 * row['ratio']:g}"
    cached = row["kind"] == "deepcache" or (row["options"] or {}).get("cache") is not None
    return f"{text} + cache" if cached else text


def _head(rows, name) -> str:
    metric = rows[0]["quality"][name]
    arrow = "↑" if metric["higher_is_better"] else "↓"
    against = f" to the {metric['reference']}" if metric["kind"] == "set" else ""
    if metric["reference"] is None:
        against = ""
    return f"{metric['label']}{against} {arrow}"


def _metric(result: dict[str, Any]) -> str:
    return NONE if "skipped" in result else result["text"]


def speedup_text(row: dict[str, Any]) -> str:
    """Return a factor with the range of its rounds; ~ where that range reaches across 1."""
    if row["kind"] == "dense":
        return "1"
    spread = row["cost"]["speedup"]
    doubt = "" if row["cost"]["certain"] else "~"
    return f"{doubt}{spread['median']:.2f} ({spread['p10']:.2f}–{spread['p90']:.2f})"


def _rounds(count: int) -> str:
    return f"{count} round{'s' * (count != 1)}"


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def markdown_table(results: dict[str, Any]) -> str:
    """Return the table with the settings above and the notes below it, as Markdown."""
    heads, cells = heads_and_cells(results)
    heads = [heads[0] or "contender", *heads[1:]]
    lines = [caption(results), ""]
    lines.append("| " + " | ".join(heads) + " |")
    lines.append("|---|" + "---:|" * (len(heads) - 1))
    lines += ["| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in cells]
    lines += ["", *(f"- {note}" for note in [*footnotes_of(results), _made_by(results)])]
    return "\n".join(lines)


def _made_by(results: dict[str, Any]) -> str:
    """What a reader needs to make the table again."""
    environment = results["environment"]
    versions = environment["versions"]
    known = [f"{k} {versions[k]}" for k in ("mmagic_tome", "torch", "diffusers") if k in versions]
    return (
        f"`{shlex.join(_without_out(results['command']))}`, {results['finished'][:10]}, "
        f"{environment['gpu'] or environment['processor']}, {', '.join(known)}"
    )


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def caption(results: dict[str, Any]) -> str:
    """Return one line that says what was run."""
    settings, environment = results["settings"], results["environment"]
    height, width = settings["size"]
    threads = environment["threads"]
    machine = environment["gpu"] or f"CPU, {threads} thread{'s' * (threads > 1)}"
    return (
        f"{results['prompts']['pictures']} pictures of {results['prompts']['source']}, "
        f"{height}x{width}, {settings['steps']} steps of {results['scheduler']}, "
        f"guidance {settings['guidance']:g}, {settings['dtype']}, batches of "
        f"{settings['batch_size']}, {machine}."
    )


def footnotes_of(results: dict[str, Any]) -> list[str]:
    """Return the notes that belong under the table: what was skipped, what the figures are."""
    notes = list(results["notes"])
    for row in results["contenders"]:
        for metric in row["quality"].values():
            if "skipped" in metric and row["kind"] != "dense":
                notes.append(f"{metric['label']} of {row['name']}: {metric['skipped']}")
    measured = results["cost_measured"]
    if measured is not None:
        notes.append(
            f"times: median of {_rounds(measured['rounds'])} in which all contenders took turns, "
            "factors with their 10th and 90th percentile; memory: " + measured["memory"]
        )
    return list(dict.fromkeys(notes))


def result_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one flat dict per contender: the figures of the table, unrounded."""
    rows = []
    for row in results["contenders"]:
        flat = {
            key: row[key]
            for key in ("name", "kind", "ratio", "steps", "pictures", "skipped_pictures")
        }
        flat["tokens_removed"] = row["tokens_removed"]
        for name, metric in row["quality"].items():
            flat[name] = metric.get("value")
            if metric.get("text") == "identical":
                flat[name] = "inf"
            for key, value in (metric.get("others") or {}).items():
                flat[f"{name}.{key}"] = value
        if row["cost"] is not None:
            for key in ("seconds_per_image", "unet_seconds_per_image", "speedup"):
                for part, value in row["cost"][key].items():
                    flat[f"{key}.{part}"] = value
            for key in SINGLE:
                flat[key] = row["cost"][key]
        rows.append(flat)
    return rows


def csv_text(rows: list[dict[str, Any]]) -> str:
    """Return dicts as CSV; columns are all their keys in the order of their first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def replace_table(path, table: str) -> None:
    """Put a table between the two marker comments of a Markdown file, and nothing else.

    Raises:
        ToMeError: The file cannot be read, or does not have each marker once, in order.
    """
    path = Path(path)
    text = check_markers(path)
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    with ResultFolder(path.parent).new_file(path.name) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def check_markers(path) -> str:
    """Return the text of a file that a table can be written into; see :func:`replace_table`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ToMeError(f"--write-table: cannot read {path}: {error}") from None
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ToMeError(f"--write-table: {path} needs the two lines {BEGIN} and {END}, once each")
    return text


def _without_out(command: Sequence[str]) -> list[str]:
    """A command line without the folder of its results, which says nothing to anybody else."""
    kept, skip = [], False
    for word in command:
        if not skip and not word.startswith("--out="):
            skip = word == "--out"
            kept += [] if skip else [word]
        else:
            skip = False
    return kept
