# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import warnings
from types import SimpleNamespace

import diffusers
import pytest
import torch
from tiny import tiny_model, tiny_sd_folder, tiny_unet

from mmagic_tome import apply_cache
from mmagic_tome.cache import StepCacheConfig
from mmagic_tome.schedulers import scheduler_name, warn_of_oscillation

PLAIN = (StepCacheConfig(region="network"),)
FED_BACK = (*PLAIN, StepCacheConfig(region="inner", error_feedback=0.5))


def said(scheduler, configs=FED_BACK, where="scheduler"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_oscillation(SimpleNamespace(**{where: scheduler}), configs)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("where", ["scheduler", "test_scheduler"])
@pytest.mark.parametrize("name", ["PNDMScheduler", "IPNDMScheduler"])
def test_schedulers_of_four_outputs_are_warned_of(name, where):
    (message,) = said(getattr(diffusers, name)(), where=where)
    assert message.startswith(name)
    assert "DPMSolverMultistepScheduler, or set error_feedback=0" in message


def test_four_outputs_that_alternate_come_out_larger():
    """The reason given, asked of a scheduler itself."""
    moved = []
    for signs in ((1, 1, 1, 1, 1), (1, 1, -1, 1, -1)):
        scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
        scheduler.set_timesteps(10)
        # It remembers all outputs but the second, and goes by their sum where the sample is zero.
        for sign, time in zip(signs, scheduler.timesteps[:5]):
            after = scheduler.step(torch.tensor([float(sign)]), time, torch.zeros(1)).prev_sample
        moved.append(after.abs().item())
    alike, alternating = moved
    assert alternating / alike == pytest.approx((55 + 59 + 37 + 9) / 24, rel=1e-4)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_others_are_not(name):
    assert not said(getattr(diffusers, name)())


def test_nothing_is_said_without_feedback_or_scheduler():
    pndm = diffusers.PNDMScheduler()
    assert not said(pndm, PLAIN) and not said(pndm, ())
    assert not said(None)
    # MMagic generates with its test_scheduler; the other one is for training.
    model = SimpleNamespace(scheduler=pndm, test_scheduler=diffusers.DDIMScheduler())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_oscillation(model, FED_BACK)


def test_apply_cache_warns():
    pipeline = SimpleNamespace(unet=tiny_unet(), scheduler=diffusers.PNDMScheduler())
    with pytest.warns(UserWarning, match="PNDMScheduler amplifies"):
        apply_cache(pipeline, "balanced")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_cache(pipeline.unet, "balanced")


def test_mmagics_wrapper_of_a_scheduler(tmp_path):
    pytest.importorskip("mmagic")
    model = tiny_model(folder=tiny_sd_folder(tmp_path), test_scheduler=dict(type="PNDMScheduler"))
    assert scheduler_name(model.test_scheduler) == "PNDMScheduler"
    with pytest.warns(UserWarning, match="PNDMScheduler amplifies"):
        apply_cache(model, "balanced")
