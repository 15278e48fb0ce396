# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Timesteps that do not lie in 0..1000: a window covers the same share of every run."""

from types import SimpleNamespace

import pytest
import torch
from denoise import denoise, denoising
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from edge_pipelines import SKIPS, TIMES, generate, sd15_pipeline, skips
from fixed_steps import FIXED
from tiny_transformers import TRANSFORMERS
from tiny_unets import video_inputs, video_unet
from warned import silent

from mmagic_tome import apply_cache


@pytest.mark.parametrize("alone", [False, True])
def test_stable_video_diffusion(alone):
    """It is called with ln(sigma) / 4. Without its scheduler the share is read off the run: sigma
    falls by Karras' schedule."""
    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        sigma_min=0.002,
        sigma_max=700.0,
        use_karras_sigmas=True,
    )
    scheduler.set_timesteps(20)
    network, inputs = video_unet(), video_inputs()
    model = network if alone else SimpleNamespace(unet=network, scheduler=scheduler)
    handle = apply_cache(model, FIXED["both"])
    for _ in range(2):
        handle.reset_stats()
        denoise(network, lambda time: {**inputs, "timestep": time}, scheduler.timesteps)
        assert skips(handle) == SKIPS["both"]


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("EulerDiscrete", dict(timestep_spacing="trailing")),
        ("EulerDiscrete", dict(use_karras_sigmas=True)),
        *((name, {}) for name in ("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep")),
        ("LMSDiscrete", {}),
    ],
    ids=str,
)
def test_schedulers_share_their_windows(scheduler, options):
    case, pipeline = sd15_pipeline(scheduler=(f"{scheduler}Scheduler", options))
    # Of LMS a warning says that it amplifies what error feedback adds.
    without = dict(error_feedback=0.0) if scheduler == "LMSDiscrete" else {}
    with silent():
        handle = apply_cache(pipeline, [one | without for one in FIXED["both"]])
        for seed in range(2):
            handle.reset_stats()
            generate(case, pipeline, seed)
            assert skips(handle) == SKIPS["both"]


@pytest.mark.parametrize(
    ("shift", "steps", "dtype", "expected"),
    [
        # A shifted schedule spends few steps at low timesteps, and skips as many all the same.
        *((shift, 20, torch.float32, {6}) for shift in (1.0, 3.0, 7.0)),
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


def test_timesteps_per_token():
    """As Wan gives them for a clip whose first frame is known: 0 for its tokens."""
    family = TRANSFORMERS["Wan 2.1, 2.2 (video)"].deeper(4)
    network, inputs = family.build(), family.inputs()
    frame = family.tokens() // inputs["hidden_states"].shape[2]

    def at(time):
        times = torch.full((2, family.tokens()), float(time))
        times[:, :frame] = 0
        return {**inputs, "timestep": times}

    handle = apply_cache(network, FIXED["both"])
    denoise(network, at, TIMES)
    assert skips(handle) == SKIPS["both"]


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
