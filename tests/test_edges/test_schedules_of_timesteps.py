# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Timesteps that do not lie in 0..1000: a window covers the same share of every run."""

from types import SimpleNamespace

import pytest
import torch
from denoise import denoise, denoising
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from edge_pipelines import SETTINGS, SKIPS, TIMES, generate, sd15_pipeline, skips
from tiny import tiny_inputs, tiny_unet
from tiny_transformers import TRANSFORMERS
from tiny_unets import video_inputs, video_unet
from warned import silent, warns_once

from mmagic_tome import apply_cache, apply_tome


def edm(unet):
    """A network and a scheduler as Stable Video Diffusion has it: called with ln(sigma) / 4."""
    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        sigma_min=0.002,
        sigma_max=700.0,
        use_karras_sigmas=True,
    )
    scheduler.set_timesteps(20)
    return SimpleNamespace(unet=unet, scheduler=scheduler)


def denoise_video(pipeline):
    inputs = video_inputs()
    times = pipeline.scheduler.timesteps
    return denoise(pipeline.unet, lambda time: {**inputs, "timestep": time}, times)


@pytest.mark.parametrize(
    ("setting", "alone"), [*((setting, False) for setting in SETTINGS), ("balanced", True)]
)
def test_stable_video_diffusion(setting, alone):
    """Without its scheduler the share is read off the run: sigma falls by Karras' schedule."""
    pipeline = edm(video_unet())
    handle = apply_cache(pipeline.unet if alone else pipeline, setting)
    for _ in range(2):
        handle.reset_stats()
        denoise_video(pipeline)
        assert skips(handle) == SKIPS[setting]


def test_merging_in_a_part_of_an_edm_run():
    pipeline = edm(video_unet())
    ratio = dict(base=0.5, timestep=dict(timestep_range=(0.5, 1)))
    handle = apply_tome(pipeline, ratio=ratio)
    denoise_video(pipeline)
    rows = handle.stats()
    assert all(row["calls"] == 20 and row["unmerged_calls"] == 10 for row in rows)


def test_an_edm_sampler_around_an_image_unet_warns_once():
    """Playground 2.5 is a UNet of Stable Diffusion XL that is called with 0.25 * ln(sigma)."""
    pipeline = edm(tiny_unet())
    handle = apply_cache(pipeline.unet, "balanced")
    with warns_once("ln(sigma)"):
        times = pipeline.scheduler.timesteps
        denoise(pipeline.unet, lambda time: {**tiny_inputs(), "timestep": time}, times)
    assert skips(handle) == SKIPS["balanced"]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    "scheduler",
    [
        ("EulerDiscreteScheduler", dict(timestep_spacing="trailing")),
        ("EulerDiscreteScheduler", dict(use_karras_sigmas=True)),
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
        "LMSDiscreteScheduler",
    ],
    ids=str,
)
def test_schedulers_share_their_windows(setting, scheduler):
    case, pipeline = sd15_pipeline(scheduler=scheduler)
    with silent():
        handle = apply_cache(pipeline, setting)
        for seed in range(2):
            handle.reset_stats()
            generate(case, pipeline, seed)
            assert skips(handle) == SKIPS[setting]


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
    handle = apply_cache(SimpleNamespace(transformer=network, scheduler=scheduler), "balanced")
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

    handle = apply_cache(network, "balanced")
    denoise(network, at, TIMES)
    assert skips(handle) == SKIPS["balanced"]


def test_images_of_several_sizes_in_one_call():
    """Z-Image takes a list."""
    family = TRANSFORMERS["Z-Image"].deeper(4)

    def at(time):
        inputs = family.inputs(time=time)
        return {**inputs, "x": [inputs["x"][0], inputs["x"][1][..., :4]]}

    network = family.build()
    handle = apply_cache(network, "fast")
    list(denoising(network, at, TIMES))
    assert skips(handle) == SKIPS["fast"]
