# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The images of a run's folder: written whole or not at all, read as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ToMeError
from .files import whole_file
from .results import RunFolder
from .runners.media import save_media


def save_image(
    folder: RunFolder,
    slug: str,
    number: int,
    image: Any,
    latents: Tensor | None = None,
    fps: int = 8,
    text: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write an image or a clip below ``images/<slug>``.

    Args:
        folder: Where to.
        slug: The method's name for folders.
        number: Of the image.
        image: A PIL image, or a list of them: the frames of a clip.
        latents: Its final latents. Default: None, not known or not needed.
        fps: Frames per second of a clip.
        text: Text chunks of the PNG.

    Returns:
        dict: What the image's row has to say, paths relative to the folder: ``file`` to look at;
        of a clip also ``strip``, a PNG with the frames below each other, and the number of
        ``frames``; ``latents``.
    """
    stem, text = folder.path / "images" / slug / f"{number:06d}", dict(text or {})

    def relative(path: Path) -> str:
        return path.relative_to(folder.path).as_posix()

    row = {"file": relative(save_media(stem, image, fps=fps, text=text))}
    if isinstance(image, (list, tuple)):
        # GIF has 256 colours and MP4 loses detail; metrics need the pixels.
        frames = np.concatenate([np.asarray(frame.convert("RGB")) for frame in image])
        strip = save_media(stem, Image.fromarray(frames), text=text)
        row.update(strip=relative(strip), frames=len(image))
    if latents is not None:
        # Not in half precision: the error of rounding would be as large as that of caching.
        with whole_file(stem.with_suffix(".pt")) as path:
            torch.save(latents.clone(), path)
        row["latents"] = relative(stem.with_suffix(".pt"))
    return row


def read_image(folder: RunFolder, row: Mapping[str, Any]) -> Tensor:
    """The image of a row, (1, 3, H, W) uint8; of a clip (frames, 3, H, W).

    Raises:
        ToMeError: It is not there or cannot be read.
    """
    path = folder.path / row.get("strip", row["file"])
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, ValueError) as error:
        raise ToMeError(f"cannot read {path}: {error}; start without --resume") from None
    frames = row.get("frames", 1)
    pixels = np.array(image).reshape(frames, image.height // frames, image.width, 3)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def read_latents(folder: RunFolder, row: Mapping[str, Any]) -> Tensor | None:
    """The final latents (1, ...) of an image; None if there are none."""
    if "latents" not in row:
        return None
    return torch.load(folder.path / row["latents"], weights_only=True)[None]
