# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Runs MMagic's Stable Diffusion classes, from a config or a model that is there already."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from ...models import find_adapter
from ...schedulers import scheduler_name
from ..measure.clock import Clock, StepMarks
from ..request import Request
from .base import Output, Runner
from .mmagic_source import MMagicSource, call_of, check_request, flat

__all__ = ["MMagicRunner", "MMagicSource"]


class MMagicRunner(Runner):
    """A model of MMagic's Stable Diffusion family with a request.

    Two draws of MMagic's own are on the model's device, so that they differ between devices: of the
    encoded reference of ViCo, and of the noise on the references of attention injection.

    Args:
        model: The model, with or without weights of a checkpoint, on its device.
        request: What to generate.
        source: Where the model is from. Default: None, somewhere else.

    Raises:
        ToMeError: The model is of another class, or cannot serve the request.
    """

    fps = 8

    def __init__(
        self, model: nn.Module, request: Request, source: MMagicSource | None = None
    ) -> None:
        check_request(type(model), request)
        self.model, self.request, self.source = model, request, source
        self.call = call_of(type(model))
        self.video = self.call.video
        self.parameters = inspect.signature(model.infer).parameters
        weights = next(model.unet.parameters())
        self.device, self.dtype = weights.device, weights.dtype
        self.network = _step_module(model)
        self._scheduler = getattr(model, self.call.scheduler)
        self.scheduler = scheduler_name(self._scheduler)
        self.steps = request.steps or self.parameters["num_inference_steps"].default
        self.guidance = request.guidance
        if self.guidance is None:
            self.guidance = self.parameters["guidance_scale"].default
        factor = model.vae_scale_factor
        self.size = request.size or (model.unet_sample_size * factor,) * 2
        # (1, C, h, w); of clips (1, C, frames, h, w)
        self.noise_shape = (1, getattr(model.vae, "config", model.vae).latent_channels)
        self.frames = None
        if self.video:
            self.frames = request.frames or self.parameters["video_length"].default
            self.noise_shape += (self.frames,)
        self.noise_shape += (self.size[0] // factor, self.size[1] // factor)

    def run(
        self,
        numbers: Sequence[int],
        steps: int | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> Output:
        """See :meth:`Runner.run`.

        Where the class, its scheduler or the prompts allow no batch, the model is called once per
        image: ``step_seconds`` are those of all calls in order, and ``on_step`` is called
        ``steps`` times all the same.
        """
        parts = [[one] for one in numbers] if self._one_by_one(numbers) else [list(numbers)]
        calls = [(part, self._arguments(part, steps or self.steps)) for part in parts]
        together = self.call.network_calls
        on_call = on_step and _every(together * len(parts), on_step)
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        marks = StepMarks(self.network, self.device, on_call)
        with _quiet(self.model), _watch_latents(self.model) as latents, marks:
            seconds, samples = Clock(self.device)(lambda: [self._infer(*call) for call in calls])
        step_seconds = marks.seconds()
        return Output(
            images=[image for one in samples for image in (_clips(one) if self.video else one)],
            latents=torch.cat([one.float().cpu() for one in latents]) if latents else None,
            seconds=seconds,
            step_seconds=[
                sum(step_seconds[first : first + together])
                for first in range(0, len(step_seconds), together)
            ],
            peak_memory=torch.cuda.max_memory_allocated(self.device) if cuda else None,
        )

    def _infer(self, numbers: Sequence[int], arguments: Mapping[str, Any]) -> Any:
        # For noise that no argument decides, such as that on a reference.
        torch.manual_seed(self.request.seed_of(numbers[0]))
        return self.model.infer(**arguments)["samples"]

    def _arguments(self, numbers: Sequence[int], steps: int) -> dict[str, Any]:
        """Of one call of ``infer``."""
        request = self.request
        generators = [torch.Generator().manual_seed(request.seed_of(one)) for one in numbers]
        noise = [torch.randn(self.noise_shape, generator=one) for one in generators]
        given = {
            "prompt": [request.prompts[one] for one in numbers],
            # Without, SDXL fails for several prompts.
            "negative_prompt": request.negatives(numbers) or [""] * len(numbers),
            "height": self.size[0],
            "width": self.size[1],
            "num_inference_steps": steps,
            "guidance_scale": self.guidance,
            "video_length": self.frames,
            "latents": torch.cat(noise).to(self.device, self.dtype),
            # Goes on with the noise of its image; MMagic's own schedulers take no list.
            "generator": generators if len(generators) > 1 else generators[0],
            "seed": request.seed_of(numbers[0]),
            "show_progress": False,
        }
        for kind, name in self.call.inputs.items():
            images = flat(request.inputs(kind, numbers))
            if images:
                # MMagic does not resize these two; the models of subjects have sizes of their own.
                fitted = kind != "references" or name == "reference_img"
                size = self.size[::-1] if fitted else None
                given[name] = [
                    _open(image, "L" if kind == "masks" else "RGB", size) for image in images
                ]
        for name in self.call.alone:
            given[name] = given[name][0]
        given = {name: value for name, value in given.items() if name in self.parameters}
        return {**given, **request.extra}

    def _one_by_one(self, numbers: Sequence[int]) -> bool:
        """Whether these images cannot be made by one call, each as it is alone."""
        if len(numbers) == 1 or self.call.alone:
            return True
        if self.call.optional and self.request.references:
            return True  # one draw of noise on all references
        own = not hasattr(self._scheduler, "_scheduler_cls")
        if own and (self.request.extra.get("eta") or self.scheduler != "EditDDIMScheduler"):
            return True  # one draw of noise for a whole batch
        # MMagic fails for a batch in which a text is cut.
        for name in ("tokenizer", "tokenizer_one", "tokenizer_two"):
            tokenizer = getattr(self.model, name, None)
            most = getattr(tokenizer, "model_max_length", None)
            texts = [self.request.prompts[one] for one in numbers]
            if most and any(len(tokenizer(text).input_ids) > most for text in texts):
                return True
        return False


def _step_module(model: nn.Module) -> nn.Module:
    """The module whose calls are steps: MMagic's wrapper of a network, which may call it twice."""
    network = find_adapter(model)[1]
    wraps_it = any(module is network for module in model.unet.modules())
    return model.unet if wraps_it else network


def _every(count: int, function: Callable[[], object]) -> Callable[[], None]:
    """A function that calls another one at every ``count``-th call."""
    calls = itertools.count(1)

    def call() -> None:
        if next(calls) % count == 0:
            function()

    return call


def _open(image: Any, mode: str, size: tuple[int, int] | None) -> Image.Image:
    """An image or the image of a file, upright, in a mode and (width, height) of PIL."""
    if not isinstance(image, Image.Image):
        image = Image.open(Path(image).expanduser())
    image = ImageOps.exif_transpose(image).convert(mode)
    return image if size is None else image.resize(size, Image.Resampling.LANCZOS)


def _clips(samples: Any) -> list[list[Image.Image]]:
    """The frames of each clip of (B, 3, frames, H, W) from 0 to 1."""
    pixels = (np.asarray(samples).transpose(0, 2, 3, 4, 1) * 255).round().astype(np.uint8)
    return [[Image.fromarray(frame) for frame in clip] for clip in pixels]


@contextlib.contextmanager
def _watch_latents(model: nn.Module) -> Iterator[list[Tensor]]:
    """What a model decodes, one entry per call of it.

    A NaN becomes a black pixel in an image and can no longer be told from a black one.
    """
    decode, hidden = model.decode_latents, model.__dict__.get("decode_latents")
    found: list[Tensor] = []

    def watched(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(latents.detach())
        return decode(latents, *args, **kwargs)

    # On the instance, where it hides the method of the class, or what hid that before.
    model.__dict__["decode_latents"] = watched
    try:
        yield found
    finally:
        del model.__dict__["decode_latents"]
        if hidden is not None:
            model.__dict__["decode_latents"] = hidden


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """No progress bars and messages of MMagic's; those of AnimateDiff have no switch."""
    names = vars(sys.modules[type(model).decode_latents.__module__])
    silent = {"tqdm": partial(tqdm, disable=True), "print_log": lambda *args, **kwargs: None}
    hidden = {name: names[name] for name in silent if name in names}
    names.update({name: silent[name] for name in hidden})
    try:
        yield
    finally:
        names.update(hidden)
