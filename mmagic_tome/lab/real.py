# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Real images: a folder of files, brought to the size of the generated ones."""

from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor

from ..errors import ToMeError
from .runners.media import load_image, to_tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class RealImages:
    """The real images below a folder, ``files`` in the order of their paths; ToMeError if it is not
    there or has none."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise ToMeError(f"real images: {folder} is not a folder")
        paths = sorted(self.folder.rglob("*"))
        self.files = [path for path in paths if path.suffix.lower() in SUFFIXES]
        if not self.files:
            raise ToMeError(f"real images: {folder} has no {', '.join(SUFFIXES)} files")

    def __len__(self) -> int:
        return len(self.files)

    def digest(self) -> str:
        """A hash of the names and the sizes of the files."""
        named = [(str(p.relative_to(self.folder)), p.stat().st_size) for p in self.files]
        return hashlib.sha256(repr(named).encode()).hexdigest()[:16]

    def read(self, number: int, size: tuple[int, int]) -> Tensor:
        """An image as (1, 3, H, W) uint8: its largest centred part of that shape, resized.

        Raises:
            ToMeError: It cannot be read.
        """
        image = load_image(self.files[number])
        return to_tensor([ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)])
