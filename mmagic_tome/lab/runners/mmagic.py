# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Runs MMagic's Stable Diffusion classes, from a config or a model that is there already."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from ...models import find_adapter
from ...timeline import scheduler_name
from ..measure import StepMarks, timed
from ..request import Request
from .base import Output, Runner, first_arguments, flat, joined
from .media import load_image
from .mmagic_source import MMagicSource, call_of, check_request

_LANCZOS = Image.Resampling.LANCZOS
# Images of subjects, which their models resize; MMagic resizes no others.
_OWN_SIZES = ("image_reference", "reference_subject_images")


class MMagicRunner(Runner):
    """A model of MMagic's Stable Diffusion family with a request; ToMeError if it is of another
    class, or cannot serve the request.

    Two draws of MMagic's own are on the model's device, so that they differ between devices: of the
    encoded reference of ViCo, and of the noise on the references of attention injection.
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
        network = find_adapter(model)[1]
        # MMagic's wrapper of a network may call it twice in a step.
        wraps_it = any(module is network for module in model.unet.modules())
        self.network = model.unet if wraps_it else network
        self._scheduler = getattr(model, self.call.scheduler)
        self.scheduler = scheduler_name(self._scheduler)
        usual = {name: one.default for name, one in self.parameters.items()}
        self.steps = request.steps or usual["num_inference_steps"]
        self.guidance = usual["guidance_scale"] if request.guidance is None else request.guidance
        factor = model.vae_scale_factor
        self.size = request.size or (model.unet_sample_size * factor,) * 2
        # (1, C, h, w); of clips (1, C, frames, h, w)
        self.noise_shape = (1, getattr(model.vae, "config", model.vae).latent_channels)
        self.frames = None
        if self.video:
            self.frames = request.frames or usual["video_length"]
            self.noise_shape += (self.frames,)
        self.noise_shape += (self.size[0] // factor, self.size[1] // factor)

    def run(
        self,
        numbers: Sequence[int],
        steps: int | None = None,
        on_step: Callable[[], object] | None = None,
    ) -> Output:
        parts = [[one] for one in numbers] if self._one_by_one(numbers) else [list(numbers)]
        calls = [(part, self._arguments(part, steps or self.steps)) for part in parts]
        ended = itertools.count(1)

        def on_step_of_part() -> None:
            # With one call per image there are steps of each, and on_step is for those of all.
            if on_step is not None and next(ended) % len(parts) == 0:
                on_step()

        marks = StepMarks(self.network, self.device, on_step_of_part, self.call.network_calls)
        # A NaN in latents becomes a black pixel and can no longer be told from a black one.
        with _quiet(self.model), first_arguments(self.model, "decode_latents") as latents, marks:
            seconds, samples = timed(lambda: [self._infer(*call) for call in calls], self.device)
        return Output(
            images=[image for one in samples for image in (_clips(one) if self.video else one)],
            latents=joined(latents, len(numbers)),
            seconds=seconds,
            network_seconds=sum(marks.seconds()),
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
            mode = "L" if kind == "masks" else "RGB"
            images = [load_image(one, mode) for one in flat(request.inputs(kind, numbers))]
            if name not in _OWN_SIZES:
                images = [one.resize(self.size[::-1], _LANCZOS) for one in images]
            if images:
                given[name] = images
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
        texts = [self.request.prompts[one] for one in numbers]
        for name in ("tokenizer", "tokenizer_one", "tokenizer_two"):
            tokenizer = getattr(self.model, name, None)
            most = getattr(tokenizer, "model_max_length", None)
            if most and any(len(tokenizer(text).input_ids) > most for text in texts):
                return True
        return False


def _clips(samples: Any) -> list[list[Image.Image]]:
    """The frames of each clip of (B, 3, frames, H, W) from 0 to 1."""
    pixels = (np.asarray(samples).transpose(0, 2, 3, 4, 1) * 255).round().astype(np.uint8)
    return [[Image.fromarray(frame) for frame in clip] for clip in pixels]


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
