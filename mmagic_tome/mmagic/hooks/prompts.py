# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``ToMePromptDataset``: prompts, and perhaps a real picture for each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.registry import DATASETS
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from ...errors import ToMeError

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@DATASETS.register_module()
class ToMePromptDataset(Dataset):
    """Samples as MMagic's data sets give them: ``inputs`` and a ``DataSample``.

    Args:
        prompts: one for each picture to generate.
        images: folder of real pictures, in the order of their names one for each prompt; FID
            and KID compare with them. Default: none.
        size: (height, width) in pixels that the real pictures are resized to (bicubic).
            Default: as they are; then all must have one size to share a batch.

    Raises:
        ToMeError: no prompts, another number of pictures, a picture that cannot be read.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        images: str | os.PathLike | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise ToMeError(f"prompts of ToMePromptDataset: write a list of them, got {prompts!r}")
        self.prompts = list(prompts)
        self.size = size
        self.files: list[Path] = []
        if images is not None:
            folder = Path(images).expanduser()
            if not folder.is_dir():
                raise ToMeError(f"images of ToMePromptDataset: there is no folder {images}")
            self.files = sorted(f for f in folder.iterdir() if f.suffix.lower() in _ENDINGS)
            if len(self.files) != len(self.prompts):
                raise ToMeError(
                    f"{images} has {len(self.files)} pictures for {len(self.prompts)} prompts; "
                    "ToMePromptDataset wants one for each"
                )

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, number: int) -> dict[str, Any]:
        from mmagic.structures import DataSample

        sample = DataSample(prompt=self.prompts[number])
        if not self.files:
            # MMagic collates and preprocesses an input, needed or not.
            return {"inputs": torch.zeros(3, 8, 8), "data_samples": sample}
        file = self.files[number]
        try:
            with Image.open(file) as image:
                image = image.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise ToMeError(f"{file} cannot be read as a picture: {error}") from error
        if self.size is not None:
            image = image.resize((self.size[1], self.size[0]), Image.Resampling.BICUBIC)
        picture = torch.from_numpy(np.array(image)).permute(2, 0, 1).flip(0)  # BGR, as MMagic's
        sample.gt_img = picture
        return {"inputs": picture, "data_samples": sample}
