# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Timesteps that do not lie in 0..1000: a window covers the same share of every run."""

from types import SimpleNamespace

import pytest
import torch
from denoise import denoise, denoising
from diffusers import FlowMatchEulerDiscreteScheduler
from edge_pipelines import SKIPS, TIMES, skips
from fixed_steps import FIXED
from tiny_transformers import TRANSFORMERS

from mmagic_tome import apply_cache


@pytest.mark.parametrize(
    ("shift", "steps", "dtype", "expected"),
    [
        # A shifted schedule spends few steps at low timesteps, and skips as many all the same.
        (7.0, 20, torch.float32, {6}),
        # Timesteps in half precision repeat, and a line needs two different ones: at most a step
        # or two less than with exact ones.
        (5.0, 100, torch.bfloat16, range(24, 29)),
    ],
)
def test_flow_matching(shift, steps, dtype, expected):
    network = TRANSFORMERS["Flux.1"].deeper(4).build()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    handle = apply_cache(SimpleNamespace(transformer=network, scheduler=scheduler), FIXED["both"])
    scheduler.set_timesteps(steps)
    times = (scheduler.timesteps / 1000).to(dtype)
    assert (len(times.unique()) < steps) == (dtype == torch.bfloat16)
    inputs = TRANSFORMERS["Flux.1"].inputs()
    for _ in range(2):
        handle.reset_stats()
        denoise(network, lambda time: {**inputs, "timestep": time.expand(2)}, times)
        assert skips(handle)["network"] in expected


def test_images_of_several_sizes_in_one_call():
    """Z-Image takes a list."""
    family = TRANSFORMERS["Z-Image"].deeper(4)

    def at(time):
        inputs = family.inputs(time=time)
        return {**inputs, "x": [inputs["x"][0], inputs["x"][1][..., :4]]}

    network = family.build()
    handle = apply_cache(network, FIXED["most"])
    list(denoising(network, at, TIMES))
    assert skips(handle) == SKIPS["most"]
