# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
import warnings
from types import SimpleNamespace

import diffusers
import pytest
import torch
from mmagic_tome.reuse import Reuse
from tiny import tiny_model, tiny_sd_folder

from mmagic_tome import apply_tome
from mmagic_tome.schedulers import scheduler_name, warn_of_paying_back

PAID_BACK = Reuse(network=dict(steps=2), deep=dict(steps=2, repay=0.5))


def said(sampler, reuse=PAID_BACK, where="scheduler"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_paying_back(SimpleNamespace(**{where: sampler}), reuse)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", ["PNDMScheduler", "IPNDMScheduler"])
def test_samplers_of_four_outputs_are_warned_of(name):
    (message,) = said(getattr(diffusers, name)())
    assert message.startswith(name)
    assert (
        "write reuse=dict(deep=dict(repay=0)) beside" in message
    )  # what is not repaid is not named


def test_four_outputs_that_alternate_come_out_larger():
    """The reason given, asked of a sampler itself."""
    moved = []
    for signs in ((1, 1, 1, 1, 1), (1, 1, -1, 1, -1)):
        sampler = diffusers.PNDMScheduler(skip_prk_steps=True)
        sampler.set_timesteps(10)
        # It remembers all outputs but the second, and goes by their sum where the sample is zero.
        for sign, time in zip(signs, sampler.timesteps[:5]):
            after = sampler.step(torch.tensor([float(sign)]), time, torch.zeros(1)).prev_sample
        moved.append(after.abs().item())
    alike, alternating = moved
    assert alternating / alike == pytest.approx((55 + 59 + 37 + 9) / 24, rel=1e-4)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_others_are_not(name):
    assert not said(getattr(diffusers, name)())


def test_nothing_is_said_without_paying_back_or_sampler():
    pndm = diffusers.PNDMScheduler()
    assert not said(pndm, Reuse(network=2)) and not said(pndm, None)
    assert not said(None)
    # MMagic draws with its test_scheduler; the other one is for training.
    model = SimpleNamespace(scheduler=pndm, test_scheduler=diffusers.DDIMScheduler())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_paying_back(model, PAID_BACK)


def test_mmagics_wrapper_of_a_sampler(tmp_path):
    model = tiny_model(folder=tiny_sd_folder(tmp_path), test_scheduler=dict(type="PNDMScheduler"))
    assert scheduler_name(model.test_scheduler) == "PNDMScheduler"
    with pytest.warns(UserWarning, match="network=dict"):
        apply_tome(model, preset="balanced")
