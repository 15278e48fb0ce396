# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
from types import SimpleNamespace

import diffusers
import pytest
import torch
from tiny import tiny_model, tiny_sd_folder, tiny_unet
from warned import silent

from mmagic_tome import apply_cache
from mmagic_tome.cache import StepCacheConfig
from mmagic_tome.schedulers import scheduler_name, warn_of_oscillation

PLAIN = (StepCacheConfig(region="network"),)
FED_BACK = (*PLAIN, StepCacheConfig(region="inner", error_feedback=0.5))
PNDM, IPNDM = diffusers.PNDMScheduler(), diffusers.IPNDMScheduler()


def test_schedulers_of_four_outputs_are_warned_of():
    for name, model in (
        ("PNDMScheduler", SimpleNamespace(scheduler=PNDM)),
        ("IPNDMScheduler", SimpleNamespace(scheduler=IPNDM)),
        # MMagic generates with its test_scheduler; the other one is for training.
        ("PNDMScheduler", SimpleNamespace(scheduler=IPNDM, test_scheduler=PNDM)),
    ):
        with pytest.warns(UserWarning, match=f"^{name} amplifies.*or set error_feedback=0"):
            warn_of_oscillation(model, FED_BACK)
    with silent():
        for model, configs in (
            (SimpleNamespace(scheduler=PNDM), PLAIN),
            (SimpleNamespace(), FED_BACK),
            (SimpleNamespace(scheduler=diffusers.DPMSolverMultistepScheduler()), FED_BACK),
            (SimpleNamespace(scheduler=PNDM, test_scheduler=diffusers.DDIMScheduler()), FED_BACK),
        ):
            warn_of_oscillation(model, configs)


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


def test_apply_cache_warns(tmp_path):
    pipeline = SimpleNamespace(unet=tiny_unet(), scheduler=PNDM)
    with pytest.warns(UserWarning, match="PNDMScheduler amplifies"):
        apply_cache(pipeline, "balanced")
    with silent():
        apply_cache(pipeline.unet, "balanced")
    pytest.importorskip("mmagic")
    model = tiny_model(folder=tiny_sd_folder(tmp_path), test_scheduler=dict(type="PNDMScheduler"))
    assert scheduler_name(model.test_scheduler) == "PNDMScheduler"
    with pytest.warns(UserWarning, match="PNDMScheduler amplifies"):
        apply_cache(model, "balanced")
