# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Files that a run leaves: PNGs that say how they were made, JSON, the sheet.

Every file is written under a temporary name and then renamed, so that what
has its final name is whole, whatever interrupts the program.
"""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from .files import whole_file

# The sheet, in pixels. Pictures smaller than CELL are enlarged by a whole factor.
CELL = 256
MARGIN = 16
LINE = 24
FONT_SIZE = 15
# Differences of this many of 255 levels, and above, get the brightest colour.
FULL_SCALE = 64


# Keys of an image in a result.json whose values are names of files.
IMAGE_FILES = ("file", "dense_file", "merge_sheet", "merge_gif", "error_map")


class ResultFolder:
    """A folder of results, made when the first file is written.

    Args:
        path: The folder.
        overwrite: Remove the files of the run that its ``result.json`` tells
            of, before the first file is written.
    """

    def __init__(self, path, overwrite=False):
        self.path = Path(path)
        self._remove_old = overwrite

    @contextmanager
    def new_file(self, name):
        """Yield a temporary path; rename it to ``name`` when all went well."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self._remove_old:
            self._remove_old = False
            self._remove_results()
        with whole_file(self.path / name) as part:
            yield part

    def _remove_results(self):
        """Remove what an earlier run wrote, and nothing else."""
        record = self.path / "result.json"
        try:
            images = json.loads(record.read_text(encoding="utf-8"))["images"]
            names = [image.get(key) for image in images for key in IMAGE_FILES]
        except (OSError, ValueError, LookupError, AttributeError, TypeError):
            return
        for name in [*names, "compare.png", "cost.png", "result.json"]:
            if isinstance(name, str) and name and Path(name).name == name:
                (self.path / name).unlink(missing_ok=True)

    def save_png(self, name, image, text):
        """Write a PIL image with text chunks ``text`` (a dict of strings, any Unicode)."""
        info = PngInfo()
        for key, value in text.items():
            info.add_itxt(key, value)
        with self.new_file(name) as path:
            image.save(path, format="PNG", pnginfo=info)

    def save_json(self, name, value):
        """Write a JSON file; NaN and infinities are errors, not invalid JSON."""
        with self.new_file(name) as path:
            dumped = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
            path.write_text(dumped + "\n", encoding="utf-8")


def file_stem(number, prompt):
    """Return a file name for an image: its number and the start of its prompt."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].rstrip("-")
    return f"{number:04d}_{slug}" if slug else f"{number:04d}"


def picture_difference(dense, merged):
    """Return how far two PIL images of one size are apart.

    Returns:
        ``psnr_db`` (None if they are identical: infinity is not JSON), ``ssim``
        and ``mean_abs_difference`` in levels of 255.
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    a, b = np.asarray(dense.convert("RGB")), np.asarray(merged.convert("RGB"))
    same = np.array_equal(a, b)
    # skimage's window is 7 pixels wide; smaller pictures have no such figure.
    small = min(a.shape[:2]) < 7
    return {
        "psnr_db": None if same else round(float(peak_signal_noise_ratio(a, b)), 3),
        "ssim": None if small else round(float(structural_similarity(a, b, channel_axis=2)), 4),
        "mean_abs_difference": round(float(np.abs(a.astype(int) - b).mean()), 3),
    }


def difference_map(dense, merged):
    """Return the mean absolute difference over RGB as a PIL image in false colour."""
    a, b = (np.asarray(image.convert("RGB")).astype(int) for image in (dense, merged))
    return _colour(np.abs(a - b).mean(axis=2))


def _colour(levels):
    """Return an RGB image of levels (h, w): 0 is black, FULL_SCALE and above pale yellow."""
    from matplotlib import colormaps

    scaled = np.clip(levels / FULL_SCALE, 0, 1)
    return Image.fromarray((colormaps["inferno"](scaled)[..., :3] * 255).round().astype(np.uint8))


@cache
def _font(size=FONT_SIZE):
    """Return DejaVu Sans, which matplotlib brings: Pillow's own font is Latin only."""
    from matplotlib import get_data_path

    path = Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size) if path.is_file() else ImageFont.load_default(size)


def _fitting(text, width, size=FONT_SIZE):
    """Return ``text``, shortened with an ellipsis until it fits ``width`` pixels."""
    font = _font(size)
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def sheet_layout(size, rows):
    """Return how a comparison sheet is laid out.

    Args:
        size: Width and height of the pictures.
        rows: Number of pairs.

    Returns:
        The factor that pictures are enlarged by, and width and height of the
        sheet, all in pixels.
    """
    factor = max(1, -(-CELL // size[0]))
    width = 3 * size[0] * factor + 4 * MARGIN
    height = 2 * MARGIN + 3 * LINE + rows * (size[1] * factor + LINE + MARGIN)
    return factor, width, height


def compare_sheet(title, heads, rows):
    """Draw dense, merged and difference side by side, one row per prompt.

    Args:
        title: First line of the sheet.
        heads: Two lines each over the dense and the merged column.
        rows: ``(caption, dense image, merged image)``, all images of one size.

    Returns:
        A PIL image of the size that :func:`sheet_layout` gives.
    """
    factor, width, height = sheet_layout(rows[0][1].size, len(rows))
    cell = tuple(side * factor for side in rows[0][1].size)
    columns = [MARGIN + i * (cell[0] + MARGIN) for i in range(3)]
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)

    def write(position, text, room, size=FONT_SIZE, fill="black"):
        draw.text(position, _fitting(text, room, size), font=_font(size), fill=fill)

    y = MARGIN
    write((MARGIN, y), title, width - 2 * MARGIN, FONT_SIZE + 2)
    y += LINE
    for x, head in zip(columns, [*heads, ("difference (RGB mean)", "")]):
        for line, text in enumerate(head):
            write((x, y + line * LINE), text, cell[0])
    _draw_scale(sheet, write, columns[2], y + LINE, cell[0])
    y += 2 * LINE
    for caption, dense, merged in rows:
        pictures = (dense.convert("RGB"), merged.convert("RGB"), difference_map(dense, merged))
        for x, picture in zip(columns, pictures):
            sheet.paste(picture.resize(cell, Image.Resampling.NEAREST), (x, y))
        y += cell[1]
        write((MARGIN, y + 3), caption, width - 2 * MARGIN, fill="#404040")
        y += LINE + MARGIN
    return sheet


def _draw_scale(sheet, write, x, y, width):
    """Draw the colour scale of the difference column in one line of text."""
    bar = width // 2
    ramp = np.linspace(0, FULL_SCALE, bar)[None].repeat(LINE - 10, axis=0)
    write((x, y), "0", 12)
    sheet.paste(_colour(ramp), (x + 16, y + 3))
    write((x + 16 + bar + 6, y), f"{FULL_SCALE}+ of 255", width - bar - 22)
