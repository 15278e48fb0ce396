# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""``ToMePromptDataset``: prompts, and perhaps a real image for each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import DATASETS
from torch.utils.data import Dataset

from ...errors import ToMeError
from ...lab.prompts import read_prompts
from ...lab.real import RealImages
from ...lab.runners.media import load_image, to_tensor


@DATASETS.register_module()
class ToMePromptDataset(Dataset):
    """Samples like those of MMagic's data sets: ``inputs`` and a ``DataSample``.

    Args:
        prompts: One for each image to generate: a list, or what
            :func:`mmagic_tome.lab.prompts.read_prompts` reads, such as ``'prompts.txt'``.
        images: Folder of real images, one for each prompt in the order of their names. Default:
            None. They are ``gt_img`` of the samples, for metrics with ``against='real'``.
            All of a batch must have one size.

    Raises:
        ToMeError: No prompts; another number of images; an image that cannot be read.
    """

    def __init__(
        self,
        prompts: str | Sequence[str],
        images: str | os.PathLike | None = None,
    ) -> None:
        self.prompts = [prompt.text for prompt in read_prompts(prompts)]
        self.files: list[Path] = []
        if images is not None:
            self.files = RealImages(images).files
            if len(self.files) != len(self.prompts):
                raise ToMeError(
                    f"images of ToMePromptDataset: {images} has {len(self.files)} images for "
                    f"{len(self.prompts)} prompts; give one for each"
                )

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, number: int) -> dict[str, Any]:
        from mmagic.structures import DataSample

        sample = DataSample(prompt=self.prompts[number])
        if not self.files:
            # MMagic collates an input, needed or not.
            return {"inputs": torch.zeros(3, 8, 8), "data_samples": sample}
        sample.gt_img = to_tensor([load_image(self.files[number])])[0].flip(0)  # BGR, as MMagic's
        return {"inputs": sample.gt_img, "data_samples": sample}
