# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Draws what merging does to images: merged tokens, differences, the cost of each block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..errors import ToMeError
from . import plots
from .environment import environment
from .infer import WARM_UP_STEPS, difference_sheet, fidelity, fidelity_text, file_stem, save_results
from .maps import (
    Record,
    Recorder,
    enlarged,
    merge_map,
    merged_blocks,
    short_name,
    spread,
)
from .measure import interleaved
from .methods import BASELINE, Method
from .progress import progress_bar
from .request import Request
from .runners import Output, Runner, Source, save_media

MOST_BLOCKS = 8
# Steps per second of a GIF.
_FPS = 2


def check(source: Source, request: Request, method: Method) -> None:
    """Fail if nothing can be drawn; nothing is loaded.

    Raises:
        ToMeError: The model makes clips; the method merges no tokens, or has other steps than the
            baseline; the model cannot serve the request.
    """
    if source.video:
        raise ToMeError(
            f"visualize draws images, and {source.class_name} makes clips; use infer --compare"
        )
    tome = getattr(method.setting, "tome", None)
    if tome is None or tome.merges_nothing:
        raise ToMeError(
            f"{method.name!r} merges no tokens, so there is nothing to draw (step caching has no "
            "merge maps); pass --ratio 0.5"
        )
    if method.steps is not None:
        raise ToMeError("visualize compares step by step; leave steps out of --method")
    source.check(request)


def visualize(
    source: Source,
    request: Request,
    method: Method,
    *,
    folder: str | Path,
    columns: int = 4,
    blocks: Sequence[str] = (),
    rounds: int = 3,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Draw merge maps and error maps of every image, and the time of each block at each step.

    Args:
        source: What is run: no model of clips.
        request: What to generate.
        method: Merges tokens.
        folder: Where files go: per image ``.png``, ``_baseline.png``, ``_merge.png`` (a row per
            block, a column per step), ``_merge.gif`` (all steps), ``_error.png``; and once
            ``cost.png`` and ``results.json``.
        columns: Steps on a sheet of merge maps, evenly spread.
        blocks: Draw blocks with one of these texts in their name. Default: all, at most eight of
            them, evenly spread.
        rounds: Interleaved runs of the baseline and the method, of which times are the medians.
        device: Where to run.
        dtype: Of the whole model. Default: None, the source's.
        progress: Whether to show a bar.

    Returns:
        dict: What is in ``results.json``.

    Raises:
        ToMeError: See :func:`check`; no block has such a name; nothing was merged.
    """
    check(source, request, method)
    folder = Path(folder)
    runner = source.load(request, device, dtype)
    with method.on(runner.model) as handles:
        chosen = _chosen(merged_blocks(handles.tome), blocks)
    where, images = environment(runner.device), []
    steps = 2 * runner.steps * (rounds + len(request))
    with progress_bar(steps, "visualizing", show=progress) as bar:
        cost = _measure_cost(runner, method, chosen, rounds, bar.update)
        for number in range(len(request)):
            base, _ = _run(runner, BASELINE, number, chosen, bar.update)
            output, recorder = _run(runner, method, number, chosen, bar.update)
            if not recorder.records:
                raise ToMeError(
                    "nothing was merged in this run, so there is nothing to draw: grids are too "
                    "small or the options merge nothing; pass a larger --size or --ratio"
                )
            prompt = request.prompts[number]
            row = {"prompt": prompt, "seed": request.seed_of(number), **fidelity(base, output, 0)}
            stem = folder / file_stem(number, prompt)
            images.append({**row, **_draw(stem, row, base, output, recorder.records, columns)})
    # In milliseconds, over the number of the step.
    series = {
        name: {short_name(block): (range(1, len(s) + 1), 1000 * s) for block, s in found.items()}
        for name, found in cost.items()
    }
    plots.save(plots.lines(series, "step", "milliseconds per block"), folder / "cost.png")
    result = {
        "method": method.to_dict(),
        "images": images,
        "cost_seconds": {
            name: {block: seconds.tolist() for block, seconds in found.items()}
            for name, found in cost.items()
        },
        "environment": where,
    }
    save_results(folder, result)
    print(f"Maps of {len(images)} images, cost.png and results.json: {folder}")
    for row in images:
        print(f"  {row['merge_sheet']}  {row['merge_gif']}  {row['error_map']}")
    return result


def _chosen(merged: dict[str, nn.Module], wanted: Sequence[str]) -> dict[str, nn.Module]:
    """The blocks to draw, of those in which tokens are merged."""
    if not wanted:
        names = list(merged)
        return {names[place]: merged[names[place]] for place in spread(len(names), MOST_BLOCKS)}
    chosen = {name: one for name, one in merged.items() if any(text in name for text in wanted)}
    if not chosen:
        known = ", ".join(merged)
        raise ToMeError(f"no merged block has {' or '.join(wanted)} in its name; there are {known}")
    return chosen


def _run(
    runner: Runner,
    method: Method,
    number: int,
    blocks: dict[str, nn.Module],
    on_step: Callable[[], object],
    plans: bool = True,
) -> tuple[Output, Recorder]:
    """Generate an image, and what was recorded meanwhile."""
    recorder = Recorder(blocks, runner.device, plans)
    with method.on(runner.model), recorder:
        output = runner.run([number], on_step=lambda: (recorder.next_step(), on_step()))
    return output, recorder


def _measure_cost(
    runner: Runner,
    method: Method,
    blocks: dict[str, nn.Module],
    rounds: int,
    on_step: Callable[[], object],
) -> dict[str, dict[str, np.ndarray]]:
    """Name of the method -> block -> (steps,) seconds, the median over rounds."""
    both = {one.name: one for one in (BASELINE, method)}
    for one in both.values():  # a first run is slow
        with one.on(runner.model):
            runner.run([0], min(WARM_UP_STEPS, runner.steps))
    found: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in both}
    calls = {
        name: partial(_run, runner, one, 0, blocks, on_step, False) for name, one in both.items()
    }
    for _, name, (_, recorder) in interleaved(calls, range(rounds)):
        found[name].append(recorder.seconds(runner.steps))
    return {
        name: {block: np.median([one[block] for one in runs], axis=0) for block in blocks}
        for name, runs in found.items()
    }


def _draw(
    stem: Path,
    row: dict[str, Any],
    base: Output,
    output: Output,
    records: list[Record],
    columns: int,
) -> dict[str, str]:
    """Write all files of an image; return their names."""
    prompt, (baseline,), (image,) = row["prompt"], base.images, output.images
    text = {"prompt": prompt, "seed": row["seed"]}
    pair = (fidelity_text(row), [baseline, image])
    files = {
        "file": ("", image),
        "baseline_file": ("_baseline", baseline),
        "merge_sheet": ("_merge", merge_sheet(prompt, records, image, columns)),
        "merge_gif": ("_merge", step_frames(prompt, records, image)),
        "error_map": ("_error", difference_sheet(prompt, ["baseline", "merged"], [pair])),
    }
    return {
        key: save_media(stem.with_name(stem.name + ending), drawn, _FPS, text).name
        for key, (ending, drawn) in files.items()
    }


def merge_sheet(
    title: str, records: Sequence[Record], image: Image.Image, columns: int
) -> Image.Image:
    """Draw merge maps over an image: a row per block, a column per step.

    Args:
        title: First line.
        records: Of a run.
        image: PIL image.
        columns: Steps at most, evenly spread.
    """
    steps = sorted({record.step for record in records})
    steps = [steps[place] for place in spread(len(steps), columns)]
    maps = _Maps(records, image)
    rows = []
    for block in maps.blocks:
        own = [record for record in records if record.block == block]
        low, high = min(one.kept for one in own), max(one.kept for one in own)
        kept = low if low == high else f"{low}-{high}"
        caption = f"{short_name(block)}: {own[0].slot.size} to {kept} tokens"
        rows.append((caption, [maps(block, step) for step in steps]))
    return plots.contact_sheet(title, [f"step {step + 1}" for step in steps], rows)


def step_frames(title: str, records: Sequence[Record], image: Image.Image) -> list[Image.Image]:
    """Draw a frame per step, with the merge maps of all blocks side by side."""
    maps = _Maps(records, image)
    heads = [short_name(block) for block in maps.blocks]
    return [
        plots.contact_sheet(
            title, heads, [(f"step {step + 1}", [maps(block, step) for block in maps.blocks])]
        )
        for step in sorted({record.step for record in records})
    ]


class _Maps:
    """Merge maps of a run by block and step, all of one size."""

    def __init__(self, records: Sequence[Record], image: Image.Image) -> None:
        self.blocks = list(dict.fromkeys(record.block for record in records))
        self.found = {(record.block, record.step): record for record in records}
        self.image = enlarged(image, max(record.grid for record in records))

    def __call__(self, block: str, step: int) -> Image.Image:
        """The image itself where nothing was merged."""
        record = self.found.get((block, step))
        return self.image if record is None else merge_map(record.slot, record.grid, self.image)
