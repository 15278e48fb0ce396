# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Draws what merging does to images: merged tokens, differences."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ..errors import ToMeError
from . import plots
from .environment import environment
from .infer import difference_sheet, fidelity, fidelity_text, file_stem, save_results
from .maps import Record, Recorder, enlarged, merge_map, merged_blocks, short_name, spread
from .methods import BASELINE, Method
from .progress import progress_bar
from .request import Request
from .runners import Output, Source, save_media

# Of a sheet of merge maps; evenly spread.
MOST_BLOCKS, MOST_STEPS = 8, 4


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
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Draw merge maps and error maps of every image.

    Args:
        source: What is run: no model of clips.
        request: What to generate.
        method: Merges tokens.
        folder: Where files go: per image ``.png``, ``_baseline.png``, ``_merge.png`` (a row for
            each of eight blocks at most, a column for each of four steps), ``_error.png``; and
            once ``results.json``.
        device: Where to run.
        dtype: Of the whole model. Default: None, the source's.
        progress: Whether to show a bar.

    Returns:
        dict: What is in ``results.json``.

    Raises:
        ToMeError: See :func:`check`; nothing was merged.
    """
    check(source, request, method)
    folder, images = Path(folder), []
    runner = source.load(request, device, dtype)
    with progress_bar(2 * runner.steps * len(request), "visualizing", show=progress) as bar:
        for number in range(len(request)):
            with BASELINE.on(runner.model):
                base = runner.run([number], on_step=bar.update)
            with method.on(runner.model) as handles:
                merged = list(merged_blocks(handles.tome).items())
                chosen = [merged[place] for place in spread(len(merged), MOST_BLOCKS)]
                with Recorder(dict(chosen)) as recorder:
                    on_step = partial(_next_step, recorder, bar)
                    output = runner.run([number], on_step=on_step)
            if not recorder.records:
                raise ToMeError(
                    "nothing was merged in this run, so there is nothing to draw: grids are too "
                    "small or the options merge nothing; pass a larger --size or --ratio"
                )
            prompt = request.prompts[number]
            row = {"prompt": prompt, "seed": request.seed_of(number), **fidelity(base, output, 0)}
            stem = folder / file_stem(number, prompt)
            images.append({**row, **_draw(stem, row, base, output, recorder.records)})
    where = environment(runner.device)
    result = {"method": method.to_dict(), "images": images, "environment": where}
    save_results(folder, result)
    print(f"Maps of {len(images)} images and results.json: {folder}")
    for row in images:
        print(f"  {row['merge_sheet']}  {row['error_map']}")
    return result


def _next_step(recorder: Recorder, bar: tqdm) -> None:
    recorder.next_step()
    bar.update()


def _draw(
    stem: Path,
    row: dict[str, Any],
    base: Output,
    output: Output,
    records: list[Record],
) -> dict[str, str]:
    """Write all files of an image; return their names."""
    prompt, (baseline,), (image,) = row["prompt"], base.images, output.images
    text = {"prompt": prompt, "seed": row["seed"]}
    pair = (fidelity_text(row), [baseline, image])
    files = {
        "file": ("", image),
        "baseline_file": ("_baseline", baseline),
        "merge_sheet": ("_merge", merge_sheet(prompt, records, image)),
        "error_map": ("_error", difference_sheet(prompt, ["baseline", "merged"], [pair])),
    }
    return {
        key: save_media(stem.with_name(stem.name + ending), drawn, text=text).name
        for key, (ending, drawn) in files.items()
    }


def merge_sheet(title: str, records: Sequence[Record], image: Image.Image) -> Image.Image:
    """Draw merge maps over an image: a row per block, a column per step."""
    steps = sorted({record.step for record in records})
    steps = [steps[place] for place in spread(len(steps), MOST_STEPS)]
    found = {(record.block, record.step): record for record in records}
    image = enlarged(image, max(record.grid for record in records))
    rows = []
    for block in dict.fromkeys(record.block for record in records):
        own = [record for record in records if record.block == block]
        low, high = min(one.kept for one in own), max(one.kept for one in own)
        kept = low if low == high else f"{low}-{high}"
        caption = f"{short_name(block)}: {own[0].slot.size} to {kept} tokens"
        at = [found.get((block, step)) for step in steps]
        # The image itself where nothing was merged.
        maps = [image if one is None else merge_map(one.slot, one.grid, image) for one in at]
        rows.append((caption, maps))
    return plots.contact_sheet(title, [f"step {step + 1}" for step in steps], rows)
