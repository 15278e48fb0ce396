# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Runs with a tolerance that are not one image of one prompt with one scheduler to the end."""

from types import SimpleNamespace

import pytest
import torch
from denoise import denoised as denoise
from diffusers import DDIMScheduler
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import apply_cache
from mmagic_tome.cache.extrapolate import OutputHistory

TRAINED = dict(beta_schedule="scaled_linear", prediction_type="v_prediction")


def ddim():
    return DDIMScheduler(clip_sample=False, **TRAINED)


@pytest.mark.parametrize("images", [1, 2, 3])
def test_outputs_in_a_list_have_the_slope_of_their_image(images):
    history = OutputHistory(1, 0.0)
    zeros, ones = ([torch.full((4, 1, 2, 2), value)] * images for value in (0.0, 1.0))
    history.record(2.0, zeros)
    history.record(1.0, ones)
    slopes = torch.arange(images) - 0.5
    guesses = history.extrapolate(0.0, slopes)
    assert [one.mean().item() for one in guesses] == pytest.approx((1 + slopes).tolist())


def test_an_edited_run_goes_on_with_its_budget():
    pipeline = SimpleNamespace(unet=tiny_unet(), scheduler=ddim())
    handle = apply_cache(pipeline, tolerance=0.05)
    denoise(pipeline, edit=9)
    assert len(handle.steps) == 20 and handle.predicted_error[0] <= 0.05
    assert any(step != "computed" for step in handle.steps[:9])
    denoise(pipeline)  # and the next image has one of its own
    assert len(handle.steps) == 20


def test_prompts_with_one_seed_are_no_copies_for_guidance():
    pipeline = SimpleNamespace(unet=tiny_unet(), scheduler=ddim())
    handle = apply_cache(pipeline, tolerance=0.05)
    given = tiny_inputs(size=16)
    same = torch.cat([given["sample"][:1]] * 2)
    denoise(pipeline, sample=same, encoder_hidden_states=given["encoder_hidden_states"])
    assert len(handle.predicted_error) == 2


def test_what_an_interrupted_run_spent_is_forgotten():
    """The next run may start lower, as image-to-image does, and owes nothing."""
    pipeline = SimpleNamespace(unet=tiny_unet(), scheduler=DDIMScheduler(clip_sample=False))
    handle = apply_cache(pipeline, tolerance=0.2)

    def stop(module, args):
        if len(handle.steps) >= 12:
            raise KeyboardInterrupt

    hook = pipeline.unet.conv_in.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        denoise(pipeline)
    hook.remove()
    inputs = tiny_inputs(seed=1)
    pipeline.scheduler.set_timesteps(20)
    with torch.no_grad():
        pipeline.unet(**{**inputs, "timestep": pipeline.scheduler.timesteps[14]})
    assert handle.steps == ["computed"] and not handle.predicted_error
