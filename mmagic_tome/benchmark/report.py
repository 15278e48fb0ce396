# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The figures as a Markdown table and as JSON."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..apis.files import whole_file
from .statistics import LEVEL, Interval, duels, summarise

NOISE = "within noise"


def case_table(measured: dict[str, Any], batch: int = 1) -> str:
    """Markdown table of one case, with a line for everything that it does not show.

    Args:
        measured: see :func:`.rounds.run_case`.
        batch: entries in one forward.
    """
    results, missing, counts = (measured[key] for key in ("results", "missing", "counts"))
    rows = summarise(results)
    rounds = len(results["dense"]["seconds"])
    sure = rows[0]["speedup"].coverage
    what = "forward" if measured.get("steps", 1) == 1 else "run"
    lines = [
        f"| {rounds} rounds | s / {what} (min - max) |{f' {counts} / s |' if counts else ''} "
        f"x dense ({sure:.0%} interval) | eta | peak MiB | change |",
        "|---|---|---|---|---|---|" + ("---|" if counts else ""),
    ]
    for row in rows:
        rate = f" {batch / row['seconds']:.4g} |" if counts else ""
        lines.append(
            f"| {row['contender']} | {row['seconds']:.3f} "
            f"({row['seconds_min']:.3f} - {row['seconds_max']:.3f}) |{rate} "
            f"{ratio_text(row['speedup'], row['clear'])} | {_eta_text(row)} "
            f"| {_mib(row['peak_bytes'])} | {row['error']:.2g} |"
        )
    notes = []
    unclear = [row["contender"] for row in rows if row["clear"] is False]
    if unclear:
        notes.append(
            f"{NOISE} ({', '.join(unclear)}): the ratio to dense may be on either side of 1, so "
            "these rounds say nothing about speed; use more --rounds or a quieter machine"
        )
    for duel in duels(results):
        ratio = ratio_text(duel["ratio"], duel["clear"], " times as fast")
        notes.append(f"{duel['ours']} against {duel['other']}: {ratio}")
    if sure < LEVEL:
        notes.append(
            f"{rounds} rounds give {sure:.0%} certainty at most; 95 % takes --rounds 6 or more"
        )
    ideals = [row for row in rows if results[row["contender"]]["kind"] == "ideal"]
    if any(row["eta"] is None for row in ideals):
        notes.append("no eta: not even the ideal is clearly faster than dense here")
    notes += [f"{name} does not take part: {reason}" for name, reason in missing.items()]
    carried = [name for name, result in results.items() if _carries(result["config"])]
    if carried and measured.get("steps", 1) == 1:
        notes.append(
            f"{', '.join(carried)}: state kept between steps shows in whole runs only; a single "
            "forward computes everything; write --steps 20"
        )
    notes += _memory_notes(rows)
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]).rstrip()


def ratio_text(ratio: Interval, clear: bool | None, unit: str = "") -> str:
    """``'1.374 (1.268 - 1.409)'``, marked if 1 is in its interval; None: it is 1 by definition."""
    if clear is None:
        return "1"
    text = f"{ratio.median:.3f}{unit} ({ratio.low:.3f} - {ratio.high:.3f})"
    return text if clear else f"{text} {NOISE}"


def _carries(config: dict[str, Any] | None) -> bool:
    """Whether a config keeps state between steps."""
    keys = ("plan_interval", "residual", "cache")
    return any((config or {}).get(key) not in (None, False, 1) for key in keys)


def _eta_text(row: dict[str, Any]) -> str:
    eta = row["eta"]
    if eta is None:
        return "-"
    return "1" if eta.low == eta.high == 1 else f"{eta.median:.2f} ({eta.low:.2f} - {eta.high:.2f})"


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"


def _memory_notes(rows: list[dict[str, Any]]) -> list[str]:
    base = rows[0]["peak_bytes"]
    if base is None:
        return []
    places = {row["peak_in"] for row in rows if row["peak_in"]}
    notes = []
    if places:
        notes.append(f"the peak of memory is reached in {', '.join(sorted(places))}")
    for row in rows[1:]:
        over = row["peak_bytes"] - base
        if over > 0:
            notes.append(
                f"{row['contender']} needs {_size(over)} more than dense at its peak "
                f"({over / base:+.2%})"
            )
    return notes


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 / 10 else f"{count / 2**10:.1f} KiB"


def environment(device: str) -> dict[str, Any]:
    """Where and with what the figures were measured; JSON-able."""
    from ..apis.infer import environment as common

    found = common(torch.device(device))
    with suppress(metadata.PackageNotFoundError):
        found["versions"]["tomesd"] = metadata.version("tomesd")
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
    with suppress(OSError, subprocess.SubprocessError):
        found["commit"] = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout.strip()
    return found


def environment_text(found: dict[str, Any]) -> str:
    """The environment in two lines."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    load = found["load_average_1min"]
    return (
        f"{found['gpu'] or found['processor']}, {found['torch_threads']} threads of "
        f"{found['cpus']} cores, load {'unknown' if load is None else format(load, '.1f')}\n"
        f"{versions}"
    )


def case_json(case: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """One case for the JSON file: every round, and what the table says about them."""
    summary = []
    for row in summarise(measured["results"]):
        row = dict(row, speedup=row["speedup"].to_dict())
        row["eta"] = row["eta"] and row["eta"].to_dict()
        if measured["counts"]:
            row[f"{measured['counts']}_per_second"] = case["batch"] / row["seconds"]
        summary.append(row)
    against = [dict(duel, ratio=duel["ratio"].to_dict()) for duel in duels(measured["results"])]
    return dict(case=case, summary=summary, duels=against, **measured)


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write JSON under a temporary name first; an infinity or NaN in it is an error."""
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
