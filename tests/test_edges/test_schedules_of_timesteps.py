# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Timesteps that do not lie in 0..1000: a window covers the same share of every run."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from edge_pipelines import SETTINGS, SKIPS, deeper, generate, sd15_pipeline, skips
from tiny import randomise, tiny_inputs, tiny_unet

from mmagic_tome import apply_cache, apply_tome


def svd_unet():
    from diffusers import UNetSpatioTemporalConditionModel

    return randomise(
        UNetSpatioTemporalConditionModel(
            sample_size=8,
            in_channels=8,
            out_channels=4,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            block_out_channels=(32, 32),
            layers_per_block=1,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            cross_attention_dim=16,
            num_attention_heads=(2, 2),
            num_frames=3,
        )
    )


def svd_scheduler():
    """As Stable Video Diffusion has it: the network is called with 0.25 * ln(sigma)."""
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="leading",
        timestep_type="continuous",
        sigma_min=0.002,
        sigma_max=700.0,
        steps_offset=1,
        use_karras_sigmas=True,
    )


@torch.no_grad()
def svd_run(pipeline, steps=20):
    pipeline.scheduler.set_timesteps(steps)
    latents = torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    image = torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    latents = latents * pipeline.scheduler.init_noise_sigma
    for time in pipeline.scheduler.timesteps:
        given = pipeline.scheduler.scale_model_input(latents, time)
        output = pipeline.unet(
            torch.cat([given, image], dim=2),
            time,
            encoder_hidden_states=torch.ones(1, 1, 16),
            added_time_ids=torch.ones(1, 3),
        ).sample
        latents = pipeline.scheduler.step(output, time, latents).prev_sample
    return latents


@pytest.mark.parametrize("setting", SETTINGS)
def test_stable_video_diffusion(setting):
    pipeline = SimpleNamespace(unet=svd_unet(), scheduler=svd_scheduler())
    handle = apply_cache(pipeline, setting)
    for _ in range(2):
        handle.reset_stats()
        svd_run(pipeline)
        assert skips(handle) == SKIPS[setting]


def test_stable_video_diffusion_without_its_scheduler():
    """The share is read off the run itself: sigma falls by the schedule of Karras et al."""
    pipeline = SimpleNamespace(unet=svd_unet(), scheduler=svd_scheduler())
    handle = apply_cache(pipeline.unet, "balanced")
    svd_run(pipeline)
    assert skips(handle) == SKIPS["balanced"]


def test_merging_in_a_part_of_an_edm_run():
    pipeline = SimpleNamespace(unet=svd_unet(), scheduler=svd_scheduler())
    ratio = dict(base=0.5, timestep=dict(timestep_range=(0.5, 1)))
    handle = apply_tome(pipeline, ratio=ratio)
    svd_run(pipeline)
    rows = handle.stats()
    assert all(row["calls"] == 20 and row["unmerged_calls"] == 10 for row in rows)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    "name, options",
    [
        ("EulerDiscreteScheduler", dict(timestep_spacing="trailing")),
        ("EulerDiscreteScheduler", dict(use_karras_sigmas=True)),
        ("DPMSolverMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {}),
        ("DEISMultistepScheduler", {}),
        ("LMSDiscreteScheduler", {}),
    ],
)
def test_schedulers_share_their_windows(setting, name, options):
    import diffusers

    scheduler = getattr(diffusers, name)
    case, pipeline = sd15_pipeline()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        handle = apply_cache(pipeline, setting)
        for seed in range(2):
            handle.reset_stats()
            generate(case, pipeline, seed)
            assert skips(handle) == SKIPS[setting]


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
def test_flow_matching_with_shift(shift):
    """A shifted schedule spends few steps at low timesteps, and skips as many all the same."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    case = deeper("Flux.1")
    network = case.build()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipeline = SimpleNamespace(transformer=network, scheduler=scheduler)
    handle = apply_cache(pipeline, "balanced")
    for _ in range(2):
        handle.reset_stats()
        scheduler.set_timesteps(20)
        inputs = case.inputs()
        with torch.no_grad():
            for time in scheduler.timesteps:
                batch = len(inputs["hidden_states"])
                inputs["timestep"] = (time / 1000).expand(batch)
                output = network(**inputs).sample
                inputs["hidden_states"] = scheduler.step(
                    output, time, inputs["hidden_states"]
                ).prev_sample
        assert skips(handle)["network"] == 6


def test_timesteps_in_half_precision_may_repeat():
    from diffusers import FlowMatchEulerDiscreteScheduler

    case = deeper("Flux.1")
    network = case.build()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(100)
    handle = apply_cache(SimpleNamespace(transformer=network, scheduler=scheduler), "balanced")
    inputs = case.inputs()
    times = [(time / 1000).bfloat16() for time in scheduler.timesteps]
    assert len({float(time) for time in times}) < 100
    with torch.no_grad():
        for time, step in zip(times, scheduler.timesteps):
            inputs["timestep"] = time.expand(len(inputs["hidden_states"]))
            output = network(**inputs).sample
            inputs["hidden_states"] = scheduler.step(
                output, step, inputs["hidden_states"]
            ).prev_sample
    # A line needs two different timesteps: at most a step or two less than with exact ones.
    assert 24 <= skips(handle)["network"] <= 28


def test_timesteps_per_token():
    """As Wan gives them for a clip whose first frame is known: 0 for its tokens."""
    case = deeper("Wan 2.1, 2.2 (video)")
    network = case.build()
    handle = apply_cache(network, "balanced")
    inputs = case.inputs()
    batch = len(inputs["hidden_states"])
    frames, height, width = inputs["hidden_states"].shape[2:]
    tokens = frames * (height // 2) * (width // 2)
    with torch.no_grad():
        for step in range(20):
            time = torch.full((batch, tokens), 951.0 - 50 * step)
            time[:, : tokens // frames] = 0
            inputs["timestep"] = time
            output = network(**inputs).sample
            inputs["hidden_states"] = inputs["hidden_states"] - 0.05 * output
    assert skips(handle)["network"] == 6


@pytest.mark.parametrize("time", [5000.0, -40.0])
def test_timesteps_outside_of_what_is_expected_warn_once(time):
    network = tiny_unet()
    handle = apply_cache(network, "fast")
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(3):
            network(**{**tiny_inputs(), "timestep": torch.tensor(time)})
    messages = [str(one.message) for one in caught if "timestep" in str(one.message)]
    assert sum("were expected" in message for message in messages) == 1
    assert skips(handle)["network"] == 0


def test_an_edm_sampler_around_an_image_unet_warns_once():
    """Playground 2.5 is a UNet of Stable Diffusion XL that is called with 0.25 * ln(sigma)."""
    network = tiny_unet()
    handle = apply_cache(network, "balanced")
    scheduler = svd_scheduler()
    scheduler.set_timesteps(20)
    latents = tiny_inputs()["sample"]
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for time in scheduler.timesteps:
            inputs = {**tiny_inputs(), "sample": latents, "timestep": time}
            latents = latents - 0.05 * network(**inputs).sample
    assert sum("ln(sigma)" in str(one.message) for one in caught) == 1
    assert skips(handle) == SKIPS["balanced"]


def test_the_last_of_two_evaluations_at_a_timestep_is_the_last_step():
    """Heun's list names every timestep but the first twice."""
    from diffusers import HeunDiscreteScheduler

    from mmagic_tome.timeline import Timeline

    scheduler = HeunDiscreteScheduler()
    scheduler.set_timesteps(20)
    pipeline = SimpleNamespace(scheduler=scheduler)
    timeline = Timeline(pipeline, 1000.0)
    first, *_, last = scheduler.timesteps.tolist()
    assert timeline(last, first, print) == (0.0, True)
    assert timeline(first, first, print)[1] is False


def test_images_of_several_sizes_in_one_call():
    """Z-Image takes a list."""
    case = deeper("Z-Image")
    network = case.build()
    handle = apply_cache(network, "fast")
    inputs = case.inputs()
    inputs["x"] = [inputs["x"][0], inputs["x"][1][..., :4]]
    with torch.no_grad():
        for step in range(20):
            inputs["t"] = torch.full((2,), 0.05 * step)
            outputs = network(**inputs)[0]
            inputs["x"] = [x - 0.05 * y for x, y in zip(inputs["x"], outputs)]
    assert skips(handle)["network"] == 9
