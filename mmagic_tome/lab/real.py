# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Real images: a folder of files, brought to the size of the generated ones."""

from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..errors import ToMeError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class RealImages:
    """The real images below a folder.

    Args:
        folder: With the images, or sub-folders of them.
        per_class: Take the first so many of every sub-folder by name, as of ImageNet's validation
            set with a sub-folder per class. Default: None, all.

    Attributes:
        files: The images, in the order of their paths.

    Raises:
        ToMeError: The folder is not there or has too few images.
    """

    def __init__(self, folder: str | Path, per_class: int | None = None) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise ToMeError(f"real images: {folder} is not a folder")
        found = (path for path in self.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        classes: dict[Path, list[Path]] = {}
        for path in sorted(found):
            classes.setdefault(path.parent, []).append(path)
        if not classes:
            raise ToMeError(f"real images: {folder} has no {', '.join(SUFFIXES)} files")
        for path, files in classes.items():
            if per_class is not None and len(files) < per_class:
                raise ToMeError(
                    f"real images: {path} has {len(files)} images, and real_per_class={per_class}"
                )
        self.files = [path for files in classes.values() for path in files[:per_class]]

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
        from torchvision.transforms import functional as F

        try:
            image = Image.open(self.files[number]).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise ToMeError(f"real image {self.files[number]} cannot be read: {error}") from None
        scale = max(size[0] / image.height, size[1] / image.width)
        covering = [
            max(size[0], round(image.height * scale)),
            max(size[1], round(image.width * scale)),
        ]
        image = F.resize(image, covering, F.InterpolationMode.BICUBIC, antialias=True)
        return F.pil_to_tensor(F.center_crop(image, list(size)))[None]
