# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Generates images or clips; with ``compare`` also the baseline's, and measures both; with ``maps``
also draws which tokens were merged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image

from ..errors import ToMeError
from ..validate import check_integer
from . import plots
from .cost import default_rounds
from .evaluate import evaluate_runner, make_images, manifest_of
from .maps import draw_maps
from .methods import BASELINE, Method
from .metrics import paired
from .request import Request
from .results import RunFolder
from .runners import Runner, Source
from .runners.media import frame_strip, save_media
from .scores import image_rows, read_frames
from .table import speedup_text

# Images that are listed and drawn side by side.
MOST_IMAGES = 16
METRICS = ("psnr", "latent_error")


def check(
    source: Source, request: Request, method: Method, compare: bool = False, maps: bool = False
) -> None:
    """Raise ToMeError if :func:`infer` cannot work: the model cannot serve the request; there is
    nothing to compare or to draw. Nothing is loaded."""
    tome = getattr(method.setting, "tome", None)
    if maps and (tome is None or tome.merges_nothing):
        raise ToMeError(
            f"{method.name!r} merges no tokens, so there is nothing to draw (step caching has no "
            "merge maps); pass --ratio 0.5"
        )
    if compare and method.kind == "baseline":
        raise ToMeError(
            "nothing to compare: neither tokens are merged nor steps skipped; pass --cache "
            "balanced or --ratio 0.5"
        )
    source.check(request)
    if maps and source.video:
        raise ToMeError(
            f"visualize draws images, and {source.class_name} makes clips; use infer --compare"
        )


def infer(
    source: Source,
    request: Request,
    method: Method,
    *,
    compare: bool = False,
    maps: bool = False,
    rounds: int | None = None,
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> pd.DataFrame | None:
    """Generate images or clips into a folder, and print what was done.

    Args:
        source, request, device: What is run, on what, where.
        method: What is applied.
        compare: Also run the baseline; measure the speed-up, and how close images and latents are
            to the baseline's; write ``compare.png``.
        maps: Compare images, without times, and write the merge maps of each, see
            :func:`~.maps.draw_maps`.
        rounds: Interleaved pairs of runs with ``compare``. Default: None, five or more, with which
            a speed-up can be certain.
        folder: Where files go, see :mod:`.results`.
        dtype: Of the whole model. Default: None, the source's.

    Returns:
        pandas.DataFrame: With ``compare``, see :func:`~.table.table`; else None.

    Raises:
        ToMeError: See :func:`check`; the model cannot be loaded, or the method not be applied.
    """
    check(source, request, method, compare, maps)
    if rounds is not None:
        check_integer("", "rounds", rounds, 1)
    runner, run = source.load(request, device, dtype), RunFolder(folder)
    frame = None
    if compare or maps:
        rounds = 0 if maps else rounds or default_rounds(request)
        how = {"memory": False, "command": "infer"}
        frame = evaluate_runner(runner, [method], METRICS, rounds, run, **how)
        save_media(run.path / "compare", _sheet(runner, method, run))
    else:
        with run.writing(manifest_of(runner, [method], "infer")):
            make_images(runner, [method], run, show=True)
    if maps:
        draw_maps(runner, method, run)
    print(report(run, method, frame))
    return frame


def _sheet(runner: Runner, method: Method, run: RunFolder) -> Image.Image:
    """Images of the baseline and of the method, and their differences."""
    images, rows = image_rows(run), []
    for number, prompt in enumerate(runner.request.prompts[:MOST_IMAGES]):
        both = [images[one.name, number] for one in (BASELINE, method)]
        pair = [frame_strip(read_frames(run, row)) for row in both]
        caption = f"{prompt}  ({_fidelity(run, both[1])})"
        rows.append((caption, [*pair, plots.difference_map(*pair)]))
    heads = [BASELINE.name, method.name, f"difference, up to {plots.FULL_SCALE} of 255"]
    title = "{class_name}, {steps} steps, {size}, {device} {dtype}".format(**runner.settings)
    return plots.contact_sheet(title, heads, rows)


def _fidelity(run: RunFolder, image: Mapping[str, Any]) -> str:
    """How close an image is to the baseline's, in words."""
    words = []
    for name in METRICS:
        keys = {"method": image["method"], "number": image["number"], "metric": name}
        for row in run.find(kind="metric", **keys):
            metric = paired(name)
            value = "not finite" if row["value"] is None else metric.text(row["value"])
            words.append(f"{metric.label} {value}")
    if image["predicted_error"] is not None:
        words.append(f"predicted {image['predicted_error']:.4f}")
    return ", ".join(words)


def report(run: RunFolder, method: Method, frame: pd.DataFrame | None) -> str:
    """Where files are, what was applied, how long it took and how close it is, as text to print."""
    images = run.find(kind="image", method=method.name)
    lines = [f"{len(images)} generated: {run.path}"]
    for row in images[:MOST_IMAGES]:
        words = [row["file"], row["prompt"], _fidelity(run, row)]
        lines.append("  " + "  ".join(word for word in words if word))
    lines += [f"  ... and {len(images) - MOST_IMAGES} more"] if len(images) > MOST_IMAGES else []
    if frame is not None:
        lines.append(f"Side by side: {run.path / 'compare.png'}")
    lines += ["", *(row["summary"] for row in run.find(kind="applied", method=method.name))]
    if frame is None or "speedup" not in frame:
        return "\n".join(lines)
    rows = {row["method"]: row for row in frame.to_dict("records")}
    lines += ["", "Seconds per image [network alone], medians of interleaved runs:"]
    for name in (BASELINE.name, method.name):
        lines.append("  {method}: {seconds:.2f} [{network_seconds:.2f}]".format(**rows[name]))
    other = rows[method.name]
    pairs = f", pairs: {other['rounds']:.0f}; ~: not certain" if other["rounds"] > 1 else ""
    lines.append(f"  speed-up: {speedup_text(other)}{pairs}")
    return "\n".join(lines)
