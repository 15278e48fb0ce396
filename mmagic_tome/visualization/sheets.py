# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Many pictures as one: a labelled grid of cells, and a GIF."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from ..apis.pictures import FONT_SIZE, LINE, MARGIN, _fitting, _font
from .cost_plot import short_name
from .merge_map import merge_map

# Under the title of merge maps.
HOW_TO_READ = "flat patches are tokens that became one, also where they lie apart"


def grid_sheet(
    title: str,
    columns: list[str],
    rows: list[tuple[str, list[Image.Image | None]]],
    note: str = "",
) -> Image.Image:
    """A sheet of pictures with a name over every column and beside every row.

    Args:
        title: first line.
        columns: a text over each column.
        rows: (text, pictures) of each; all pictures have the size of the first, None leaves a gap.
            The text may have several lines.
        note: second line, in grey. Default: none.

    Returns:
        PIL image in RGB.
    """
    first = next(picture for _, pictures in rows for picture in pictures if picture is not None)
    width, height = first.size
    font = _font(FONT_SIZE)
    lines = [line for text, _ in rows for line in text.split("\n")]
    left = MARGIN + max(int(font.getlength(line)) for line in lines) + MARGIN
    top = MARGIN // 2 + LINE * (2 if note else 1)
    size = (
        max(left + len(columns) * (width + MARGIN // 2) + MARGIN // 2, 320),
        top + LINE + 3 * MARGIN // 2 + len(rows) * (height + MARGIN // 2),
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN // 2), _fitting(title, size[0] - 2 * MARGIN), "black", font)
    if note:
        note = _fitting(note, size[0] - 2 * MARGIN)
        draw.text((MARGIN, MARGIN // 2 + LINE), note, "#808080", font)
    places = [left + index * (width + MARGIN // 2) for index in range(len(columns))]
    for x, text in zip(places, columns):
        draw.text((x, top), _fitting(text, width), "#404040", font)
    y = top + LINE + MARGIN // 2
    for text, pictures in rows:
        above = LINE * (text.count("\n") + 1) // 2
        draw.text((MARGIN, y + height // 2 - above), text, "#404040", font)
        for x, picture in zip(places, pictures):
            if picture is not None:
                sheet.paste(picture, (x, y))
        y += height + MARGIN // 2
    return sheet


def merge_sheet(
    title: str, records: list, picture: Image.Image, columns: int, entry: int = -1
) -> Image.Image:
    """Merge maps of a run over a picture: a row per block, a column per step.

    Args:
        title: first line.
        records: :class:`.recorder.Record` of a run.
        picture: PIL image.
        columns: number of steps shown at most, evenly spread.
        entry: of the batch.
    """
    steps = spread_steps(records, columns)
    blocks = list(dict.fromkeys(record.block for record in records))
    found = {(record.block, record.step): record for record in records}
    maps = {
        key: merge_map(record.slot[entry], record.grid, picture)
        for key, record in found.items()
        if key[1] in steps
    }
    size = max(painted.size for painted in maps.values())
    rows = [
        (
            f"{short_name(block)}\n{_counts(records, block)}",
            [
                # Coarser grids give smaller maps.
                maps[block, step].resize(size, Image.Resampling.NEAREST)
                if (block, step) in maps
                else None
                for step in steps
            ],
        )
        for block in blocks
    ]
    return grid_sheet(title, [f"step {step + 1}" for step in steps], rows, HOW_TO_READ)


def _counts(records: list, block: str) -> str:
    """``'1024 to 512'``: tokens of a block before and after; a range where they change."""
    shown = [record for record in records if record.block == block]
    kept = sorted({record.kept for record in shown})
    after = f"{kept[0]}" if len(kept) == 1 else f"{kept[0]}-{kept[-1]}"
    return f"{shown[0].slot.shape[1]} to {after}"


def spread_steps(records: list, count: int) -> list[int]:
    """At most ``count`` of the steps in the records: the first, the last, and between."""
    steps = sorted({record.step for record in records})
    if len(steps) <= count:
        return steps
    places = np.linspace(0, len(steps) - 1, count).round().astype(int)
    return [steps[place] for place in places]


def save_gif(path, frames: list[Image.Image], milliseconds: int = 400) -> None:
    """Write frames of one size as a GIF that runs forever.

    Args:
        path: file, or an open one.
        frames: PIL images in RGB.
        milliseconds: how long each is shown; the last three times as long.
    """
    # One palette for all frames: colours that change from frame to frame would flicker.
    strip = Image.new("RGB", (frames[0].width, frames[0].height * len(frames)))
    for index, frame in enumerate(frames):
        strip.paste(frame, (0, index * frame.height))
    palette = strip.quantize(128)
    quantised = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    quantised[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=quantised[1:],
        duration=[milliseconds] * (len(frames) - 1) + [3 * milliseconds],
        loop=0,
    )


def step_frames(
    title: str, records: list, picture: Image.Image, entry: int = -1
) -> list[Image.Image]:
    """A frame per step, with the merge maps of all blocks side by side.

    Args: as :func:`merge_sheet`.
    """
    frames = []
    steps = spread_steps(records, len(records))
    for step in steps:
        shown = [record for record in records if record.step == step]
        maps = [merge_map(record.slot[entry], record.grid, picture) for record in shown]
        size = max(painted.size for painted in maps)
        maps = [painted.resize(size, Image.Resampling.NEAREST) for painted in maps]
        heads = [short_name(record.block) for record in shown]
        frames.append(
            grid_sheet(
                f"{title}, step {step + 1} of {steps[-1] + 1}", heads, [("", maps)], HOW_TO_READ
            )
        )
    return frames
