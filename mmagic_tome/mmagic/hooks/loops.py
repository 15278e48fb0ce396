# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Loops that generate the same prompts by several methods and judge the images.

MMagic's own loops run its Stable Diffusion models with 50 steps whatever the config says, pass
samplers without prompts to FID and Inception Score, and lack what PSNR and SSIM read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size, is_main_process
from mmengine.registry import LOOPS
from mmengine.runner.base_loop import BaseLoop
from PIL import Image
from torch import Tensor

from ...errors import ToMeError
from ...lab.methods import BASELINE, Method, check_names
from ...lab.request import Request, make_request
from ...lab.runners import Output
from ...settings import Handles, Setting
from .metrics import BASELINE_KEYS
from .profile import Profile
from .subject import generate, iteration_of, model_of, undisturbed

# For how many samples the visualizer gets a sheet of all images.
_SHEETS = 16


class _ImageLoop(BaseLoop):
    """Generates an image, or a clip, by each method for each sample of a data set with prompts.

    Methods are the baseline (nothing applied) and what the config applies, named 'merging',
    'caching' or 'merging and caching'; or the baseline and ``methods``. Results are named by
    method, as in ``merging/psnr``; the baseline has those that are not relative to it.

    Args:
        runner: mmengine's runner, with a diffusion model.
        dataloader: Of samples with a ``prompt``, not shuffled, such as ``ToMePromptDataset``. A
            sample may have a real image, ``gt_img``.
        evaluator: Metrics of MMagic, of this package (``ToMeMetric``), or both.
        methods: Dicts as of :meth:`mmagic_tome.lab.methods.Method.from_dict`, in a config without
            ``tome_cfg`` and ``cache_cfg``. Default: none.
        profile: Whether to log the time of the network, its blocks and its targets by method, and
            to write it to ``profile.json`` in the log folder. A compiled model's blocks cannot be
            observed. Default: False.
        **request: Fields of :class:`mmagic_tome.lab.request.Request`, such as ``steps``,
            ``guidance``, ``seed`` and ``controls``. Default: those of ``infer_cfg``. Image i has
            the seed ``seed + i`` at any batch size and number of processes.

    Metrics find in a sample, images being (3, H, W), clips (frames, 3, H, W), in 0 ... 255 and BGR
    as in MMagic: ``fake_img`` (also as ``output.pred_img``), ``baseline_img``, ``gt_img``, the
    final latents ``latents`` and ``baseline_latents``, ``prompt``, ``seconds``, and ``warm``,
    which is False in the first batch.

    Raises:
        ToMeError: No diffusion model; ``methods`` next to a ``tome_cfg`` or ``cache_cfg``; samples
            without a prompt; a metric that needs other images, or more, than there are.
    """

    mode: str

    def __init__(
        self,
        runner,
        dataloader,
        evaluator,
        methods: Sequence[Mapping[str, Any]] = (),
        profile: bool = False,
        **request: Any,
    ) -> None:
        super().__init__(runner, dataloader)
        self.model = model_of(runner, type(self).__name__)
        self.methods = [Method.from_dict(method) for method in methods]
        check_names([BASELINE, *self.methods])
        # Prompts come with the samples; those of ``infer_cfg`` are for other commands.
        defaults = {**(runner.cfg.get("infer_cfg") or {}), "prompts": None}
        prompts = ["-"] * len(self.dataloader.dataset)
        self.request = make_request(SimpleNamespace(defaults=defaults), prompts=prompts, **request)
        self._evaluator = evaluator
        self._evaluators: dict[str, Any] = {}
        self._profile = Profile(self.model) if profile else None

    def run(self) -> dict[str, Any]:
        """Generate and judge everything, and call the hooks; return the results of all metrics."""
        runner, mode = self.runner, self.mode
        if self.methods and Handles.of(self.model):
            raise ToMeError(
                "the config applies tome_cfg or cache_cfg and its loop has methods; write all of "
                "them into methods, or none"
            )
        runner.call_hook(f"before_{mode}")
        runner.call_hook(f"before_{mode}_epoch")
        if mode == "test":
            runner.model.eval()
        # A validation must not disturb the training around it.
        with undisturbed(self.model) if mode == "val" else torch.no_grad():
            for index, batch in enumerate(self.dataloader):
                self._run_iter(index, batch)
            metrics = {
                f"{method}/{key.removeprefix('tome/')}": value
                for method, evaluator in self._evaluators.items()
                if evaluator.metrics
                for key, value in evaluator.evaluate().items()
            }
        if self._profile is not None and is_main_process():
            table = self._profile.write(Path(runner.log_dir, "profile.json"))
            runner.logger.info(f"profile: median milliseconds of a call\n{table}")
        runner.call_hook(f"after_{mode}_epoch", metrics=metrics)
        runner.call_hook(f"after_{mode}")
        return metrics

    def _run_iter(self, index: int, batch: Any) -> None:
        runner, step = self.runner, iteration_of(self.runner)
        runner.call_hook(f"before_{self.mode}_iter", batch_idx=index, data_batch=batch)
        numbers, made = self._generate(index, batch)
        for i, number in enumerate(numbers):
            if len(made) > 1 and number < _SHEETS:
                images = {method: one.images[i] for method, one in made.items()}
                image = sheet(batch["data_samples"][i].prompt, images)
                runner.visualizer.add_image(f"{self.mode}_{number:03d}", image, step=step)
        outputs = self._judge(batch, made, index > 0)
        runner.call_hook(
            f"after_{self.mode}_iter", batch_idx=index, data_batch=batch, outputs=outputs
        )

    def _generate(self, index: int, batch: Any) -> tuple[list[int], dict[str, Output]]:
        """Numbers of a batch's images, and the images by method, the baseline's first."""
        prompts = [sample.get("prompt") for sample in batch["data_samples"]]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ToMeError(
                f"{type(self).__name__} got a sample without a prompt; use "
                "dict(type='ToMePromptDataset', prompts=[...]) or another set of prompts"
            )
        # As mmengine's DefaultSampler deals them out; a last round that it fills up repeats.
        first = index * self.dataloader.batch_size
        places = [(first + i) * get_world_size() + get_rank() for i in range(len(prompts))]
        numbers = [place % len(self.request) for place in places]
        request = replace(self.request.part(numbers), prompts=prompts)
        model, handles = self.model, Handles.of(self.model)
        with handles.disabled():
            made = {BASELINE.name: self._timed(BASELINE.name, request)}
        if handles:
            configs = (one and one.config for one in (handles.tome, handles.cache))
            name = Method("applied", Setting(*configs)).label
            made[name] = self._timed(name, request)
        for method in self.methods:
            with method.on(model) as applied:
                made[method.name] = self._timed(method.name, request, method.steps)
                for handle in applied if index == 0 else ():
                    self.runner.logger.info(f"{method.name}: {handle.summary()}")
        return numbers, made

    def _timed(self, method: str, request: Request, steps: int | None = None) -> Output:
        with self._profile.of(method) if self._profile is not None else nullcontext():
            return generate(self.model, request, steps)

    def _judge(self, batch: Any, made: Mapping[str, Output], warm: bool) -> list:
        """Pass the samples of each method to its metrics; return the last method's samples."""
        outputs: list = []
        baseline = made[BASELINE.name]
        for name, one in made.items():
            compared = None if one is baseline else baseline
            outputs = [
                _output(sample, one, compared, i, warm)
                for i, sample in enumerate(batch["data_samples"])
            ]
            evaluator = self._evaluator_of(name)
            _check(evaluator.metrics, outputs[0])
            # To all metrics at once, without the samplers of MMagic's evaluator.
            evaluator.process(outputs, batch, evaluator.metrics)
        return outputs

    def _evaluator_of(self, name: str) -> Any:
        """The evaluator of a method, MMagic's: mmengine's cannot run its metrics."""
        if name not in self._evaluators:
            given = copy.deepcopy(self._evaluator)
            given = given if isinstance(given, dict) and "metrics" in given else {"metrics": given}
            evaluator = self.runner.build_evaluator({**given, "type": "mmagic.Evaluator"})
            if name == BASELINE.name:
                evaluator.metrics = [one for one in evaluator.metrics if not _is_relative(one)]
            evaluator.prepare_metrics(self.model, self.dataloader)  # FID reads the real images
            self._evaluators[name] = evaluator
        return self._evaluators[name]


@LOOPS.register_module()
class ToMeTestLoop(_ImageLoop):
    mode = "test"


@LOOPS.register_module()
class ToMeValLoop(_ImageLoop):
    mode = "val"


def _output(sample, made: Output, baseline: Output | None, i: int, warm: bool):
    """The sample that metrics read: number ``i`` of a batch, by one method."""
    from mmagic.structures import DataSample

    image = _bgr(made.images[i])
    output = DataSample(fake_img=image, output=DataSample(pred_img=image), prompt=sample.prompt)
    output.set_data({"seconds": made.seconds, "warm": warm})
    if made.latents is not None:
        output.latents = made.latents[i]
    if baseline is not None:
        output.baseline_img = _bgr(baseline.images[i])
        if baseline.latents is not None:
            output.baseline_latents = baseline.latents[i]
    real = sample.get("gt_img")
    if real is not None:
        # MMagic's reader of images notes if it read another order.
        rgb = str(sample.get("gt_channel_order") or "bgr").lower() == "rgb"
        output.gt_img = _bgr(real) if rgb else real.float()
    return output


def _is_relative(metric) -> bool:
    """Whether a metric compares with the baseline."""
    return getattr(metric, "gt_key", getattr(metric, "reference", "")) in BASELINE_KEYS


def _check(metrics: Sequence[Any], sample) -> None:
    """Metrics of MMagic would fail without saying what to write."""
    for metric in metrics:
        name, key = type(metric).__name__, getattr(metric, "gt_key", None)
        if key is not None and key not in sample:
            raise ToMeError(
                f"{name} compares with {key}, which the samples do not have; write "
                f"dict(type='{name}', gt_key='baseline_img') to compare with the baseline"
            )


def _bgr(images: Tensor) -> Tensor:
    """(..., 3, H, W) RGB <-> BGR."""
    return images.flip(-3).float()


def sheet(prompt: str, images: Mapping[str, Tensor]) -> np.ndarray:
    """(height, width, 3) uint8: images of one prompt, (3, H, W) uint8 by method, or (frames, 3, H,
    W), of which the first is shown, side by side over their differences to the first."""
    from ...lab.plots import contact_sheet, difference_map

    frames = [one if one.ndim == 3 else one[0] for one in images.values()]
    row = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in frames]
    differences = [difference_map(row[0], one) for one in row]
    rows = [("", row), ("differences to the first", differences)]
    return np.asarray(contact_sheet(prompt, list(images), rows))
