# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Real pictures: a folder of files, brought to the size of the generated ones."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import ToMeError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass
class RealPictures:
    """The real pictures of a folder.

    Args:
        files: Those that can be read, in the order of their paths.
        size: (height, width) in pixels that they are brought to.
        digest: Hash of the files' contents.
        notes: What was skipped, one sentence each.
    """

    files: list[Path]
    size: tuple[int, int]
    digest: str
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.files)

    def picture(self, number: int) -> np.ndarray:
        """Return a picture as uint8 (height, width, 3); see :func:`fit`."""
        with Image.open(self.files[number]) as image:
            return np.asarray(fit(image, self.size))


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return an RGB image of a size: the largest centred part of that shape, resampled.

    Args:
        image: Any PIL image; transparent parts are put on white.
        size: (height, width) in pixels.
    """
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    image = image.convert("RGB")
    height, width = size
    scale = min(image.width / width, image.height / height)
    left = (image.width - width * scale) / 2
    top = (image.height - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def find_real(folder, size: tuple[int, int], per_class: int | None = None) -> RealPictures:
    """Return the real pictures of a folder and its sub-folders.

    Args:
        folder: The folder.
        size: (height, width) in pixels to bring them to.
        per_class: Take the first this many files of every sub-folder by name, as in a folder
            of ImageNet's validation set with one sub-folder per class; None for all.

    Raises:
        ToMeError: The folder is not there or has no picture that can be read. Single files
            that cannot be read are skipped, counted and noted.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ToMeError(f"real pictures: {folder} is not a folder")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if per_class is not None:
        by_class: dict[Path, list[Path]] = {}
        for path in files:
            by_class.setdefault(path.parent, []).append(path)
        short = [p.name for p, found in by_class.items() if len(found) < per_class]
        if short:
            raise ToMeError(
                f"real pictures: {per_class} per class are wanted, and {len(short)} of "
                f"{len(by_class)} sub-folders of {folder} have fewer, such as {short[0]}"
            )
        files = sorted(p for found in by_class.values() for p in found[:per_class])
    digest, good, bad = hashlib.blake2b(digest_size=20), [], []
    for path in files:
        try:
            content = path.read_bytes()
            with Image.open(path) as image:
                image.load()
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError):
            bad.append(path)
            continue
        digest.update(hashlib.blake2b(content).digest())
        good.append(path)
    if not good:
        found = f"{len(bad)} files that cannot be read" if bad else "no pictures"
        raise ToMeError(
            f"real pictures: {folder} has {found}; expected {', '.join(SUFFIXES)} files"
        )
    notes = []
    if bad:
        names = ", ".join(str(p.relative_to(folder)) for p in bad[:3])
        more = ", ..." if len(bad) > 3 else ""
        notes.append(f"{len(bad)} of {len(files)} real pictures cannot be read: {names}{more}")
    return RealPictures(good, tuple(size), digest.hexdigest(), notes)
