# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Images and clips: read, written whole or not at all, laid out as a strip."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ...errors import ToMeError
from ..files import whole_file

_LOGGER = logging.getLogger(__name__)


def load_image(image: str | os.PathLike | Image.Image, mode: str = "RGB") -> Image.Image:
    """An image from a file or from PIL, upright, in a mode of PIL.

    Raises:
        ToMeError: There is no such file; it is no image.
    """
    try:
        with contextlib.ExitStack() as stack:
            if not isinstance(image, Image.Image):
                image = stack.enter_context(Image.open(Path(image).expanduser()))
            # Cameras turn images by a flag.
            return ImageOps.exif_transpose(image).convert(mode)
    except FileNotFoundError:
        raise ToMeError(f"image {image} does not exist") from None
    except (OSError, TypeError) as error:
        raise ToMeError(f"cannot read image {image}: {error}") from None


def save_media(
    path: str | os.PathLike,
    image: Image.Image | Sequence[Image.Image],
    fps: int = 8,
    text: Mapping[str, Any] | None = None,
) -> Path:
    """Write an image as PNG, or a clip, a list of frames of one size, as GIF and MP4; whole or not
    at all. MP4 needs the package imageio-ffmpeg; without it a note says once that there is none.

    Args:
        path: Without a suffix.
        fps: Frames per second of a clip. A GIF counts hundredths of a second.
        text: What to note in the file, such as prompt and seed: text chunks of a PNG, a comment in
            JSON of a GIF.

    Returns:
        Path: Of the PNG or GIF.
    """
    text = {key: str(value) for key, value in (text or {}).items()}
    path = Path(path)
    if isinstance(image, Image.Image):
        info = PngInfo()
        for key, value in text.items():
            info.add_itxt(key, value)
        path = path.with_name(f"{path.name}.png")
        with whole_file(path) as part:
            image.save(part, format="PNG", pnginfo=info)
        return path
    frames = [frame.convert("RGB") for frame in image]
    if _writes_mp4():
        import imageio

        with whole_file(path.with_name(f"{path.name}.mp4")) as part:
            # Players want even sides; nothing else is resized.
            imageio.mimwrite(part, list(map(np.asarray, frames)), fps=fps, macro_block_size=2)
    options = dict(duration=round(1000 / fps), loop=0, comment=json.dumps(text).encode())
    path = path.with_name(f"{path.name}.gif")
    with whole_file(path) as part:
        frames[0].save(part, format="GIF", save_all=True, append_images=frames[1:], **options)
    return path


@functools.cache
def _writes_mp4() -> bool:
    """Whether clips can be written as MP4; notes it once if not."""
    if importlib.util.find_spec("imageio_ffmpeg") is not None:
        return True
    _LOGGER.warning("clips are written as GIF only: MP4 needs `pip install imageio-ffmpeg`")
    return False


def frame_strip(image: Image.Image | Sequence[Image.Image], count: int = 4) -> Image.Image:
    """At most ``count`` frames of a clip side by side, evenly spaced, with the first and the last;
    an image stays as it is."""
    if isinstance(image, Image.Image):
        return image
    numbers = evenly(len(image), count)
    width, height = image[0].size
    strip = Image.new("RGB", (width * len(numbers), height))
    for column, number in enumerate(numbers):
        strip.paste(image[number], (width * column, 0))
    return strip


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of the numbers below ``count``: the first, the last, and evenly between."""
    return sorted(set(np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()))


def to_tensor(images: Sequence[Any]) -> Tensor:
    """PIL images of one size -> (B, 3, H, W) uint8 RGB; lists of frames -> (B, frames, 3, H, W)."""
    if isinstance(images[0], (list, tuple)):
        return torch.stack([to_tensor(frames) for frames in images])
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
