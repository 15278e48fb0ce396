# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Loops that evaluate a text-to-image model: a picture for each prompt, for every metric.

MMagic's own loops run its Stable Diffusion models with 50 steps whatever the config says, give
FID and Inception Score a sampler without prompts, and leave out what PSNR and SSIM look for.
These take steps, guidance and seed from the config, and hand every metric what it reads.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.registry import LOOPS
from mmengine.runner.base_loop import BaseLoop
from torch import Tensor

from ...errors import ToMeError
from ...settings import Handles
from .subject import model_of, request_of, undisturbed


class _PictureLoop(BaseLoop):
    """Generates a picture for each sample of a data set with prompts, and judges them.

    Args:
        runner: mmengine's runner, with a text-to-image model of MMagic.
        dataloader: of samples with a ``prompt``, not shuffled; as MMagic's, or
            ``ToMePromptDataset``. A sample may have a real picture, ``gt_img``.
        evaluator: metrics: MMagic's, this package's (``ToMePSNR`` ...), or both.
        steps, guidance, size, negative_prompt, seed: of generating; picture i has the seed
            ``seed + i``, whatever the batch size and the number of devices. Default: those of
            ``infer_cfg`` of the config, else those of :class:`mmagic_tome.apis.text2image.Request`.
        dense: whether to make each picture of the baseline too, for paired metrics. Default:
            True; where nothing is applied to the model there is only the one.

    What metrics find in a sample, pictures being (3, H, W) in 0 ... 255, and BGR as MMagic's are:

    - ``fake_img``, and the same as ``output.pred_img``: the picture;
    - ``dense_img``: the picture of the baseline;
    - ``latents`` and ``dense_latents``: (C, h, w), what they were decoded from;
    - ``gt_img``: the real picture, if the data set has one;
    - ``prompt``.

    So MMagic's PSNR against the dense model is ``dict(type='PSNR', gt_key='dense_img')``.

    Raises:
        ToMeError: no text-to-image model, samples without a prompt, a metric that asks for more
            pictures than there are or for a real picture where there is none.
    """

    mode: str

    def __init__(
        self,
        runner,
        dataloader,
        evaluator,
        steps: int | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
        negative_prompt: str | None = None,
        seed: int | None = None,
        dense: bool = True,
    ) -> None:
        super().__init__(runner, dataloader)
        self.evaluator = _evaluator(runner, evaluator)
        self.dense = dense
        count = len(self.dataloader.dataset)
        self.request = request_of(
            runner,
            [""] * count,  # filled in as samples come
            steps=steps,
            guidance=guidance,
            size=size,
            negative_prompt=negative_prompt,
            seed=seed,
        )
        for metric in self.evaluator.metrics or ():
            _check_number(metric, count)

    def run(self) -> dict[str, Any]:
        """Generate everything, judge it; returns what the metrics found."""
        runner, mode = self.runner, self.mode
        model = model_of(runner, type(self).__name__, generates=True)
        runner.call_hook(f"before_{mode}")
        runner.call_hook(f"before_{mode}_epoch")
        if mode == "test":
            runner.model.eval()
        # In between of training: its weights, modes and random numbers are not validation's.
        with undisturbed(model) if mode == "val" else nullcontext():
            metrics = self._evaluate(model)
        runner.call_hook(f"after_{mode}_epoch", metrics=metrics)
        runner.call_hook(f"after_{mode}")
        return metrics

    def _evaluate(self, model) -> dict[str, Any]:
        """Generate all pictures, judge each as it comes and in the end all together."""
        runner, mode = self.runner, self.mode
        # MMagic's evaluator prepares metrics (FID looks at the real pictures) and groups them.
        of_mmagic = hasattr(self.evaluator, "prepare_metrics")
        if of_mmagic:
            self.evaluator.prepare_metrics(model, self.dataloader)
        for index, batch in enumerate(self.dataloader):
            runner.call_hook(f"before_{mode}_iter", batch_idx=index, data_batch=batch)
            outputs = self._generate(model, index, batch)
            if of_mmagic:
                # All metrics at once, not by their samplers, some of which have no prompts.
                self.evaluator.process(outputs, batch, self.evaluator.metrics)
            else:
                self.evaluator.process(data_samples=outputs, data_batch=batch)
            runner.call_hook(
                f"after_{mode}_iter", batch_idx=index, data_batch=batch, outputs=outputs
            )
        size = () if of_mmagic else (len(self.dataloader.dataset),)
        return self.evaluator.evaluate(*size)

    @torch.no_grad()
    def _generate(self, model, index: int, batch: Any) -> list:
        """Data samples of a batch, with the pictures."""
        from mmagic.structures import DataSample

        from ...apis.text2image import Generator
        from .evaluate import dense_and_merged, generate

        samples = batch["data_samples"]
        # As mmengine's DefaultSampler deals them out; a last round that it fills up repeats.
        first = index * self.dataloader.batch_size
        total = len(self.request.prompts)
        numbers = [
            ((first + i) * get_world_size() + get_rank()) % total for i in range(len(samples))
        ]
        for number, sample in zip(numbers, samples):
            prompt = sample.get("prompt")
            if not isinstance(prompt, str):
                raise ToMeError(
                    f"{type(self).__name__}: sample {number} has no prompt; use "
                    "dict(type='ToMePromptDataset', prompts=[...]) or another set of prompts"
                )
            self.request.prompts[number] = prompt
        handles = Handles.of(model)
        if self.dense and handles:
            dense, merged = dense_and_merged(model, handles, self.request, numbers)
        else:
            dense, merged = None, generate(Generator(model, self.request), numbers)
        outputs = []
        for i, sample in enumerate(samples):
            picture = _bgr(merged.pictures[i])
            output = DataSample(
                fake_img=picture,
                output=DataSample(pred_img=picture),
                prompt=sample.get("prompt"),
            )
            if merged.latents is not None:
                output.latents = merged.latents[i]
            if dense is not None:
                output.dense_img = _bgr(dense.pictures[i])
                if dense.latents is not None:
                    output.dense_latents = dense.latents[i]
            real = sample.get("gt_img")
            if real is not None:
                output.gt_img = _real(real, sample)
            self._check_keys(output)
            outputs.append(output)
        return outputs

    def _check_keys(self, output) -> None:
        for metric in self.evaluator.metrics or ():
            key = getattr(metric, "gt_key", None)
            if key is not None and key not in output:
                name = type(metric).__name__
                raise ToMeError(
                    f"{name} compares with {key}, which the samples do not have; write "
                    f"dict(type='{name}', gt_key='dense_img') to compare with the dense model"
                    + ("" if key == "gt_img" else ", in a config with tome_cfg or cache_cfg")
                )


@LOOPS.register_module()
class ToMeTestLoop(_PictureLoop):
    __doc__ = _PictureLoop.__doc__
    mode = "test"


@LOOPS.register_module()
class ToMeValLoop(_PictureLoop):
    __doc__ = _PictureLoop.__doc__
    mode = "val"


def _evaluator(runner, evaluator):
    """An evaluator of a config: MMagic's by default: mmengine's cannot run its metrics."""
    if isinstance(evaluator, dict) and "metrics" not in evaluator:
        evaluator = [evaluator]
    if isinstance(evaluator, list):
        evaluator = {"metrics": evaluator}
    if isinstance(evaluator, dict):
        evaluator = runner.build_evaluator({"type": "mmagic.Evaluator", **evaluator})
    return evaluator


def _check_number(metric, count: int) -> None:
    """Of MMagic's metrics: they would stop short, or never start, without a word."""
    name = type(metric).__name__
    wanted = getattr(metric, "fake_nums", None)
    if wanted is None:
        return
    if wanted < 1:
        raise ToMeError(f"{name} has fake_nums={wanted}, which looks at no picture; write {count}")
    if wanted > count:
        raise ToMeError(f"{name} wants fake_nums={wanted} pictures, and there are {count} prompts")


def _bgr(picture: Tensor) -> Tensor:
    return picture.flip(0).float()


def _real(picture: Tensor, sample) -> Tensor:
    """A real picture of the data set as BGR; MMagic's reader says if it read another order."""
    order = sample.get("gt_channel_order") or "bgr"
    return _bgr(picture) if str(order).lower() == "rgb" else picture.float()
