# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Deterministic samplers, by the names that tables have."""

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

SCHEDULERS = {
    "DDIM": DDIMScheduler,
    "Euler": EulerDiscreteScheduler,
    "DPM-Solver++ 2M": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
}
TRAINED = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def scheduler_of(name, steps=20):
    # Clipping, which DDIM does by default, is no linear combination.
    given = dict(clip_sample=False) if name == "DDIM" else {}
    scheduler = SCHEDULERS[name](prediction_type="v_prediction", **TRAINED, **given)
    scheduler.set_timesteps(steps)
    return scheduler
