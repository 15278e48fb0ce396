# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What an evaluation remembers of the sampler and the networks that its pictures come from."""

import inspect
import json

import diffusers
import pytest
import torch

from mmagic_tome.evaluation.generate import network_settings, scheduler_settings

SAMPLERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",  # has an infinity among its settings
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)


@pytest.mark.parametrize("name", SAMPLERS)
def test_settings_of_samplers_of_diffusers_go_into_json(name):
    sampler = getattr(diffusers, name)(beta_end=0.02)
    settings = scheduler_settings(sampler)
    assert json.loads(json.dumps(settings, allow_nan=False)) == settings
    assert settings["beta_end"] == 0.02
    assert settings != scheduler_settings(getattr(diffusers, name)(beta_end=0.03))


def test_settings_are_the_same_in_every_process():
    """One sampler from the file of another: diffusers notes what it lacks in the order of a set."""
    config = diffusers.DDIMScheduler(beta_end=0.02).config
    sampler = diffusers.DPMSolverMultistepScheduler.from_config(config)
    said = scheduler_settings(sampler)
    assert said["beta_end"] == 0.02 and said["solver_order"] == 2
    noted = sampler.config["_use_default_values"]
    assert len(noted) > 1
    # As in a process with other hashes.
    sampler.register_to_config(_use_default_values=noted[::-1])
    assert sampler.config["_use_default_values"] == noted[::-1]
    assert scheduler_settings(sampler) == said
    # Of all else only values that the sampler was made with.
    parameters = inspect.signature(type(sampler)).parameters
    assert set(said) <= set(parameters)


def test_settings_of_a_sampler_without_config():
    class Sampler:
        def __init__(self, betas):
            self.betas, self.kind, self.timesteps = betas, "linear", torch.arange(3)

    settings = scheduler_settings(Sampler(torch.ones(4)))
    assert settings["kind"] == "linear" and len(settings["betas"]) == 16
    assert "timesteps" not in settings  # what a run leaves behind
    assert settings != scheduler_settings(Sampler(torch.zeros(4)))


def test_settings_of_networks_that_change_no_weights():
    def model(heads, scale):
        shape = dict(block_out_channels=(8,), norm_num_groups=4)
        unet = diffusers.UNet2DConditionModel(
            **shape,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            attention_head_dim=heads,
            cross_attention_dim=8,
            layers_per_block=1,
        )
        vae = diffusers.AutoencoderKL(**shape, scaling_factor=scale)
        return torch.nn.ModuleDict({"unet": unet, "vae": vae, "other": torch.nn.Linear(2, 2)})

    settings = network_settings(model(2, 0.18))
    assert json.loads(json.dumps(settings)) == settings and set(settings) == {"unet", "vae"}
    assert settings == network_settings(model(2, 0.18))
    assert settings != network_settings(model(4, 0.18))
    assert settings != network_settings(model(2, 0.2))
    assert not [key for one in settings.values() for key in one if key.startswith("_")]
