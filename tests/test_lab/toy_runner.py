# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A runner of a random UNet without text encoder and VAE: 64 x 64 images in milliseconds; and
evaluations of it."""

import hashlib
import time

import numpy as np
import torch
from PIL import Image
from tiny import tiny_unet

from mmagic_tome.lab.evaluate import evaluate
from mmagic_tome.lab.measure import StepMarks
from mmagic_tome.lab.methods import Method, parse_method
from mmagic_tome.lab.request import Request
from mmagic_tome.lab.runners.base import Output, Runner, Source
from mmagic_tome.settings import Setting

SIDE = 64
HALF = Method.from_dict(dict(name="half", tome_cfg=dict(ratio=0.5)))
CACHED = Method.from_dict(dict(name="Cached!", cache_cfg=dict(region="network")))
FEWER = Method("3 steps", steps=3)
TOLERANT = parse_method("tolerance:0.5")
METHODS = [HALF, CACHED, FEWER]
METRICS = ["psnr", "ssim", "latent_error"]


def toy_request(**changes):
    """Five images in batches of two."""
    prompts = ["a cat", "a dog", "a bird", "a fish", "a fox"]
    return Request(**{"prompts": prompts, "steps": 6, "batch_size": 2, **changes})


class ToySource(Source):
    """See the module.

    Args:
        bad: Numbers of images whose latents become NaN.
        video: Whether an image is a clip of three frames.
    """

    name, class_name, path = "toy", "Toy", "toy"

    def __init__(self, bad=(), video=False):
        self.setting, self.defaults, self.evaluation = Setting(), {}, {}
        self.bad, self.video = bad, video

    def check(self, request):
        """Everything fits."""

    def load(self, request, device="cpu", dtype=None):
        return ToyRunner(self, request)


class ToyRunner(Runner):
    """See the module."""

    def __init__(self, source, request):
        self.source, self.request, self.video = source, request, source.video
        self.model = self.network = tiny_unet()
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.steps, self.guidance, self.size = request.steps or 6, 1.0, (SIDE, SIDE)
        self.fps, self.scheduler = 8, "Euler"
        self.runs = []

    @torch.no_grad()
    def run(self, numbers, steps=None, on_step=None):
        steps = steps or self.steps
        self.runs.append((tuple(numbers), steps))
        start = time.perf_counter()
        latents, text = [], []
        for number in numbers:
            generator = torch.Generator().manual_seed(self.request.seed_of(number))
            latents.append(torch.randn(1, 4, 16, 16, generator=generator))
            digest = hashlib.sha256(self.request.prompts[number].encode()).digest()
            generator.manual_seed(int.from_bytes(digest[:4], "big"))
            text.append(torch.randn(1, 7, 16, generator=generator))
        latents, text = torch.cat(latents), torch.cat(text)
        with StepMarks(self.network, self.device, on_step) as marks:
            for timestep in torch.linspace(999, 0, steps).long():
                noise = self.network(latents, timestep, encoder_hidden_states=text).sample
                latents = latents - noise / steps
        for place, number in enumerate(numbers):
            if number in self.source.bad:
                latents[place] = float("nan")
        images = [self._image(one) for one in latents]
        return Output(images, latents, time.perf_counter() - start, sum(marks.seconds()))

    def _image(self, latents):
        pixels = torch.nn.functional.interpolate(latents[None, :3], size=SIDE, mode="bilinear")[0]
        pixels = ((pixels.nan_to_num() / 3 + 0.5).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
        frames = [Image.fromarray(np.roll(pixels, shift, axis=1)) for shift in range(3)]
        return frames if self.video else frames[0]


def run(folder, methods=METHODS, metrics=METRICS, rounds=0, source=None, **options):
    """Evaluate; return the table."""
    request = options.pop("request", None) or toy_request()
    source = source or ToySource()
    return evaluate(source, request, methods, metrics, rounds, folder, progress=False, **options)
