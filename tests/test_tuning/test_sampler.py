# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Samplers that add noise, and those that do not."""

import pytest
from tiny import tiny_config

from mmagic_tome.tuning.sampler import adds_noise

SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SDE = dict(algorithm_type="sde-dpmsolver++")


@pytest.mark.parametrize(
    ("name", "options", "noise"),
    [
        ("DDIMScheduler", {}, False),
        ("PNDMScheduler", {}, False),
        ("EulerDiscreteScheduler", {}, False),
        ("HeunDiscreteScheduler", {}, False),
        ("UniPCMultistepScheduler", {}, False),
        ("DPMSolverMultistepScheduler", {}, False),
        ("DPMSolverMultistepScheduler", SDE, True),
        ("DDPMScheduler", {}, True),
        ("EulerAncestralDiscreteScheduler", {}, True),
        ("KDPM2AncestralDiscreteScheduler", {}, True),
        ("LCMScheduler", {}, True),
    ],
)
def test_samplers_of_diffusers(name, options, noise):
    import diffusers

    scheduler = getattr(diffusers, name)(**SCHEDULE, **options)
    state = dict(vars(scheduler))
    assert adds_noise(scheduler, 6) is noise
    assert vars(scheduler).keys() == state.keys()  # it was a copy that ran


def test_samplers_of_mmagic():
    pytest.importorskip("mmagic")
    from mmagic.registry import DIFFUSION_SCHEDULERS

    own = DIFFUSION_SCHEDULERS.build(tiny_config()["scheduler"])
    assert adds_noise(own, 6) is False
    wrapped = DIFFUSION_SCHEDULERS.build(dict(type="EulerAncestralDiscreteScheduler", **SCHEDULE))
    assert adds_noise(wrapped, 6) is True


def test_one_that_cannot_run_is_unknown():
    assert adds_noise(object(), 6) is None
