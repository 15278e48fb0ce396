# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Nothing of one image ever reaches another, however the calls of runs follow each other."""

import random

import pytest
import torch
from diffusers import DDIMScheduler
from edge_pipelines import KEEPERS, skips
from fixed_steps import FIXED
from tiny import error, tiny_unet

from mmagic_tome import apply_cache

each = pytest.mark.parametrize("name", KEEPERS)


class Image:
    """A denoising run that is stepped by hand, with DDIM.

    Args:
        texts (int): how many predictions guide it, without and with prompts.
        change (float): what makes the texts those of another prompt.
        together (bool): in one batch. False: in as many calls.
    """

    def __init__(self, network, seed=0, steps=12, start=0, texts=2, change=0.0, together=True):
        generator = torch.Generator().manual_seed(seed)
        self.network, self.together = network, together
        self.scheduler = DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        )
        self.scheduler.set_timesteps(steps)
        self.times = list(self.scheduler.timesteps[start:])
        self.latents = torch.randn(1, 4, 16, 16, generator=generator)
        self.texts = torch.randn(texts, 7, 16, generator=generator) + change
        self.outputs = []  # of each step: (texts, 4, 16, 16)

    @property
    def done(self):
        return len(self.outputs) == len(self.times)

    @torch.no_grad()
    def predict(self, network, time, texts):
        batch = self.latents.expand(len(texts), -1, -1, -1)
        return network(batch.clone(), time, encoder_hidden_states=texts).sample.clone()

    def step(self):
        time = self.times[len(self.outputs)]
        parts = [self.texts] if self.together else self.texts.split(1)
        output = torch.cat([self.predict(self.network, time, texts) for texts in parts])
        self.outputs.append(output)
        guess = output.mean(0, keepdim=True) + 2 * (output[-1:] - output[:1])
        self.latents = self.scheduler.step(guess, time, self.latents).prev_sample
        return output

    def finish(self):
        while not self.done:
            self.step()
        return self.outputs


def alone(name, *args, **options):
    """What an image's calls return when nothing else runs."""
    network = tiny_unet()
    KEEPERS[name](network)
    return Image(network, *args, **options).finish()


def equal(outputs, expected):
    return all(torch.equal(a, b) for a, b in zip(outputs, expected))


@pytest.mark.parametrize(
    "images",
    [
        [dict(seed=seed) for seed in range(3)],  # views of one image
        # Two prompts with one seed: their inputs begin as the same tensors, and stay near.
        [dict(seed=1, change=change) for change in (0.0, 0.1)],
        [dict(seed=1, change=change, texts=1) for change in (0.0, 0.1)],
    ],
    ids=["views", "prompts", "unguided prompts"],
)
@each
def test_images_that_take_turns(name, images):
    network = tiny_unet()
    handle = KEEPERS[name](network)
    runs = [Image(network, **options) for options in images]
    for _ in runs[0].times:
        for run in runs:
            run.step()
    for run, options in zip(runs, images):
        assert equal(run.outputs, alone(name, **options))
    if name == "both":  # and skipping goes on
        assert sum(skips(handle).values()) >= 3 * len(runs)


@each
def test_random_interleavings(name):
    """Runs of other lengths and starts, with and without guidance, some stopped in the middle."""
    draw = random.Random(0)
    network = tiny_unet()
    KEEPERS[name](network)
    options = [
        dict(seed=seed, steps=draw.choice([6, 9, 12]), start=draw.choice([0, 0, 2]), texts=texts)
        for seed, texts in enumerate(draw.choices([1, 2], [3, 7], k=4))
    ]
    images = [Image(network, **one) for one in options]
    waiting = list(images)
    while waiting:
        image = draw.choice(waiting)
        for _ in range(draw.randint(1, 3)):
            if not image.done:
                image.step()
        if image.done or draw.random() < 0.05:
            waiting.remove(image)
    for image, one in zip(images, options):
        # As wrong as alone, or less: a step is computed where the run was not recognised.
        baseline = Image(tiny_unet(), **one).finish()
        spread = max(map(error, alone(name, **one), baseline))
        assert max(map(error, image.outputs, baseline)) <= 2 * spread + 1e-6


@pytest.mark.parametrize(
    ("texts", "late"),
    [
        (2, slice(None)),
        # From the middle of the run on only one of the calls is made.
        (2, slice(1)),
        (2, slice(1, None)),
        (6, slice(None)),  # as regional prompting by hand
    ],
)
def test_calls_on_one_latent_are_extrapolated_apart(texts, late):
    network, baseline = tiny_unet(), tiny_unet()
    handle = apply_cache(network, FIXED["most"])
    image = Image(network, steps=20, texts=texts, together=False)
    every, own = image.texts, []
    for step, time in enumerate(image.times):
        exact = torch.cat([image.predict(baseline, time, text) for text in every.split(1)])
        if step == 10:
            image.texts = every[late]
        for output, text in zip(image.step(), image.texts):
            nearest = min(range(texts), key=lambda i: error(output, exact[i]))
            own.append(torch.equal(every[nearest], text))
    assert sum(own) == len(own) if texts == 2 else sum(own) > 0.9 * len(own)
    calls = 10 * texts + 10 * len(every[late])
    assert skips(handle)["network"] >= 0.45 * calls - texts
