# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Runs a text-to-image model of MMagic: same noise everywhere, times of each run."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass

import torch

from .model_config import check_size, size_unit


@dataclass
class Request:
    """What to generate.

    Args:
        prompts: One image each, at least one.
        negative_prompt: What the images should not show; None for nothing.
        steps: Denoising steps.
        guidance: Weight of classifier-free guidance; 1 or less is none, and
            halves the work.
        size: Height and width in pixels; None for the model's own.
        seed: Seed of the first image, below 2**32; image i has ``seed_of(i)``.
        batch_size: Images per run of the model.
    """

    prompts: list[str]
    negative_prompt: str | None = None
    steps: int = 50
    guidance: float = 7.5
    size: tuple[int, int] | None = None
    seed: int = 0
    batch_size: int = 1

    def seed_of(self, number: int) -> int:
        """Return the seed of an image: after the largest of 32 bits comes 0."""
        return (self.seed + number) % 2**32

    def negatives(self, numbers) -> list[str] | None:
        """Return the negative prompts of some images, or None if they have none."""
        return None if self.negative_prompt is None else [self.negative_prompt] * len(numbers)

    def batches(self) -> list[range]:
        """Return the numbers of the images of each batch."""
        count, step = len(self.prompts), self.batch_size
        return [range(first, min(first + step, count)) for first in range(0, count, step)]


@dataclass
class Clock:
    """Times of one run of the model, in seconds; ``unet`` is a part of ``total``."""

    total: float = 0.0
    unet: float = 0.0
    peak_memory: int | None = None  # bytes, on CUDA only


class Generator:
    """Runs a text-to-image model of MMagic with noise of its own for each image.

    Args:
        model: The model, such as MMagic's ``StableDiffusion``.
        request: The :class:`Request`.

    Attributes:
        step_seconds: Time of each forward of the UNet in the last run.

    Raises:
        ToMeError: If the size does not fit the model.
    """

    def __init__(self, model, request):
        self.model = model
        self.request = request
        unet, vae = model.unet, model.vae
        self.unit = size_unit(len(vae.block_out_channels), self._unet_levels(unet))
        check_size(request.size, self.unit)
        self.factor = model.vae_scale_factor
        self.size = request.size or (unet.sample_size * self.factor,) * 2
        self.channels = unet.in_channels
        self.parameters = inspect.signature(model.infer).parameters
        self.step_seconds = []

    @staticmethod
    def _unet_levels(unet):
        config = getattr(unet, "config", None)
        blocks = getattr(config, "down_block_types", None) or getattr(unet, "down_blocks", ())
        return len(blocks)

    def noise(self, numbers):
        """Return generators and start noise (n, C, h, w) of the images ``numbers``.

        Noise is drawn on the CPU, image by image: it is the same on every
        device and at every batch size.
        """
        generators = [torch.Generator().manual_seed(self.request.seed_of(i)) for i in numbers]
        shape = (1, self.channels, self.size[0] // self.factor, self.size[1] // self.factor)
        return generators, torch.cat([torch.randn(shape, generator=g) for g in generators])

    def run(self, numbers, steps=None, on_step=None):
        """Generate the images ``numbers`` as one batch.

        Args:
            numbers: Which of the request's images, counted from 0.
            steps: Denoising steps; those of the request by default.
            on_step: Called without arguments after each step.

        Returns:
            A list of PIL images and a :class:`Clock`.
        """
        request, model = self.request, self.model
        generators, latents = self.noise(numbers)
        arguments = {
            "prompt": [request.prompts[i] for i in numbers],
            "negative_prompt": request.negatives(numbers),
            "height": self.size[0],
            "width": self.size[1],
            "num_inference_steps": steps or request.steps,
            "guidance_scale": request.guidance,
            "latents": latents,
            "seed": request.seed_of(numbers[0]),
            "show_progress": False,
        }
        if self._takes_generators():
            arguments["generator"] = generators
        arguments = {key: value for key, value in arguments.items() if key in self.parameters}

        device = next(model.parameters()).device
        watch = UNetWatch(model.unet, device, on_step)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        with watch:
            images = model.infer(**arguments)["samples"]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.step_seconds = watch.step_seconds()
        clock = Clock(time.perf_counter() - start, sum(self.step_seconds))
        if device.type == "cuda":
            clock.peak_memory = torch.cuda.max_memory_allocated(device)
        return images, clock

    def _takes_generators(self):
        """Whether the sampler draws its noise from one generator per image.

        Those of diffusers do. MMagic's own take one for the whole batch, and
        draw nothing at the ``eta`` of 0 that is used here.
        """
        return hasattr(self.model.test_scheduler, "_scheduler_cls")


class UNetWatch:
    """Sees each forward of a UNet while it is entered: times it, reports it."""

    def __init__(self, unet, device, on_step):
        self.unet, self.device, self.on_step = unet, device, on_step
        self.marks = []

    def _mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        # Events instead of clocks: waiting for the GPU here would slow it down.
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _before(self, *_):
        self.marks.append([self._mark()])

    def _after(self, *_):
        self.marks[-1].append(self._mark())
        if self.on_step is not None:
            self.on_step()

    def __enter__(self):
        self.hooks = [
            self.unet.register_forward_pre_hook(self._before),
            self.unet.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def step_seconds(self):
        """Return the time of each forward; on CUDA, after a synchronisation."""
        if self.device.type == "cuda":
            return [a.elapsed_time(b) / 1000 for a, b in self.marks]
        return [b - a for a, b in self.marks]
