# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""A denoising loop for tests: every latent follows from the last latent and the last output, as
those of a sampler do. So its calls are one run (``mmagic_tome/runs.py``)."""

from typing import Any, NamedTuple

import torch
from tiny import tiny_inputs

STEPS = tuple(range(900, 0, -100))
_LATENTS = ("sample", "hidden_states", "x")


class Step(NamedTuple):
    """A step that was computed: its timestep, the latent that went in, the output."""

    time: float
    latent: Any
    output: Any


@torch.no_grad()
def denoising(network, inputs, steps=STEPS):
    """Denoise step by step; yields a :class:`Step` after each call.

    Args:
        network (nn.Module): called once per step, by keywords.
        inputs (dict | Callable): keyword arguments of a call, ``timestep`` aside; or timestep ->
            keyword arguments, for networks that take it in another form. The latent in them is
            that of the first step.
        steps (sequence): timesteps.
    """
    latent = None
    for time in steps:
        call = inputs_at(inputs, time, latent)
        name = next(name for name in _LATENTS if name in call)
        output = network(**call)[0]
        yield Step(time, call[name], output)
        latent = _next(call[name], output)


def denoise(network, inputs, steps=STEPS):
    """The outputs of all steps of :func:`denoising`, stacked."""
    return torch.stack([step.output for step in denoising(network, inputs, steps)])


@torch.no_grad()
def outputs_at(network, inputs, steps):
    """What a network returns for the latents of ``steps``, each a :class:`Step`; stacked."""
    return torch.stack([network(**inputs_at(inputs, s.time, s.latent))[0] for s in steps])


@torch.no_grad()
def denoised(pipeline, steps=20, edit=None, **inputs):
    """The final latents of a pipeline's UNet by its scheduler; ``edit`` (number of a step) adds
    noise after it, ``inputs`` are arguments of the call."""
    unet, scheduler = pipeline.unet, pipeline.scheduler
    scheduler.set_timesteps(steps)
    inputs = {**tiny_inputs(size=16), **inputs}
    x = inputs["sample"]
    for i, time in enumerate(scheduler.timesteps):
        given = scheduler.scale_model_input(x, time)
        output = unet(**{**inputs, "sample": given, "timestep": time}).sample
        x = scheduler.step(output, time, x).prev_sample
        if i == edit:
            x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    return x


def inputs_at(inputs, time, latent=None):
    """Keyword arguments of a call at a timestep; with another latent unless it is None."""
    call = inputs(time) if callable(inputs) else {**inputs, "timestep": torch.tensor(time)}
    if latent is not None:
        call[next(name for name in _LATENTS if name in call)] = latent
    return call


def _next(latent, output):
    if isinstance(latent, list):
        return [_next(x, y) for x, y in zip(latent, output)]
    if not isinstance(output, torch.Tensor):  # a ControlNet: other networks make the latent
        return 1.02 * latent
    for dim, size in enumerate(latent.shape):  # with the variance
        output = output.narrow(dim, 0, min(size, output.shape[dim]))
    return 1.02 * latent - 0.1 * output if output.shape == latent.shape else 1.02 * latent
