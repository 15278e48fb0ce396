# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Error of a setting: its pictures of the search's prompts against the dense ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..apis.text2image import Generator
from ..errors import ToMeError
from ..evaluation.contenders import DENSE
from ..evaluation.generate import LatentWatch
from ..evaluation.metrics.pixels import PSNR
from ..settings import Setting
from .folder import SearchFolder, key_of
from .sampler import Trace


class Judge:
    """Makes pictures and compares them; what was made once is taken from the folder.

    Args:
        generator: of a model that is dense.
        numbers: the pictures of the search.
        folder: to look into and to write to.
    """

    def __init__(self, generator: Generator, numbers: Sequence[int], folder: SearchFolder) -> None:
        self.generator, self.numbers, self.folder = generator, numbers, folder
        self.metric = PSNR()
        self.dense: dict[int, Tensor] = {}
        self.trials = folder.kept("trials.json")
        self.made = 0

    def make_dense(self) -> dict[str, Any]:
        """Make the dense pictures; the timesteps of a run, as ``times``.

        Raises:
            ToMeError: a picture is not a number.
        """
        trace = self.folder.kept("trace.json")
        todo = [b for b in self.batches(self.numbers) if not (trace and self._has(b))]
        steps = self.generator.request.steps * len(todo)
        with tqdm(total=steps, desc="dense pictures", unit="step", dynamic_ncols=True) as bar:
            for batch in todo:
                with LatentWatch(self.generator.model) as watch, Trace(self.generator.model) as t:
                    images, _ = self.generator.run(batch, on_step=bar.update)
                if not all(watch.finite):
                    raise ToMeError(
                        "the dense model makes pictures that are not numbers; write --dtype fp32"
                    )
                trace = {"times": t.times}
                self.folder.keep("trace.json", trace)
                for number, image in zip(batch, images):
                    record = {"seed": self.generator.request.seed_of(number)}
                    self.folder.save_picture(DENSE, number, image, None, record, {})
        self.dense = {n: _tensor(self.folder.picture(DENSE, n)) for n in self.numbers}
        return trace

    def batches(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        """The numbers in batches of the request's size."""
        size = self.generator.request.batch_size
        return [numbers[at : at + size] for at in range(0, len(numbers), size)]

    def _has(self, batch: Sequence[int]) -> bool:
        return all(self.folder.has_picture(DENSE, number) for number in batch)

    def trial(
        self,
        options: dict[str, Any] | None,
        steps: int | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> dict[str, Any]:
        """Try a setting.

        Args:
            options: what :meth:`Setting.coerce` takes; None for the dense model.
            steps: other than the request's.
            on_step: called after each step that is made now.

        Returns:
            ``options``, ``steps``, ``psnr`` (one per picture, None: the same), ``mse`` (their mean
            squared error in levels of 255) and ``seconds`` that it took.
        """
        key = key_of(options or {}, steps)
        if key not in self.trials:
            start = time.perf_counter()
            values: list[float] = []
            with Setting.coerce(options).apply(self.generator.model):
                for batch in self.batches(self.numbers):
                    images, _ = self.generator.run(batch, steps, on_step=on_step)
                    values += [self.psnr(number, one) for number, one in zip(batch, images)]
            self.trials[key] = {
                "options": options,
                "steps": steps,
                "psnr": [None if math.isinf(value) else value for value in values],
                "mse": mse_of(values),
                "seconds": time.perf_counter() - start,
            }
            self.folder.keep("trials.json", self.trials)
            self.made += 1
        return self.trials[key]

    def psnr(self, number: int, image: Image.Image) -> float:
        """In dB, of a picture of the search."""
        return psnr(self.metric, self.dense[number], _tensor(image))


def psnr(metric: PSNR, dense: Tensor, other: Tensor) -> float:
    """In dB, of two pictures (1, 3, H, W); infinite for the same."""
    return float(metric(dense, other)[0])


def mse_of(values: Sequence[float]) -> float:
    """Mean squared error in levels of 255 of pictures with these PSNRs in dB."""
    return 255**2 * float(np.mean([10 ** (-value / 10) for value in values]))


def _tensor(image: Image.Image) -> Tensor:
    """(1, 3, H, W) uint8."""
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def paired(metric: PSNR, dense: Sequence[Any], other: Sequence[Any]) -> list[float]:
    """PSNR in dB of every pair of PIL pictures."""
    return [psnr(metric, _tensor(a), _tensor(b)) for a, b in zip(dense, other)]
