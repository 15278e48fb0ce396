# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Next to diffusers' own caches, copies of pipelines, and callers that change their mind."""

import copy

import pytest
import torch
from edge_pipelines import SKIPS, deeper, generate, sd15_pipeline, skips
from tiny import tiny_inputs, tiny_unet

from mmagic_tome import apply_cache, get_handle


def test_diffusers_own_cache_on_top():
    """It looks up blocks by their class."""
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "FirstBlockCacheConfig"):
        pytest.skip("this diffusers has no FirstBlockCacheConfig")
    family = deeper("Flux.1")
    network = family.build()
    handle = apply_cache(network, "balanced")
    network.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    with torch.no_grad(), network.cache_context("cond"):
        output = network(**family.inputs()).sample
    assert torch.isfinite(output).all()
    network.disable_cache()
    handle.remove()
    with torch.no_grad():
        wanted = family.build()(**family.inputs()).sample
        assert torch.equal(network(**family.inputs()).sample, wanted)


def test_the_form_of_the_output_is_that_of_the_call():
    network = tiny_unet()
    apply_cache(network, "fast")
    inputs = tiny_inputs()
    with torch.no_grad():
        for step, time in enumerate(range(951, 0, -50)):
            tuple_wanted = step % 3 == 1
            output = network(
                **{**inputs, "timestep": torch.tensor(time)}, return_dict=not tuple_wanted
            )
            assert isinstance(output, tuple) == tuple_wanted
            inputs["sample"] = inputs["sample"] - 0.05 * output[0]


def test_a_copied_pipeline_keeps_its_windows():
    from diffusers import EulerDiscreteScheduler

    case, pipeline = sd15_pipeline()
    pipeline.scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, use_karras_sigmas=True
    )
    apply_cache(pipeline, "balanced")
    twin = copy.deepcopy(pipeline)
    twin.set_progress_bar_config(disable=True)
    image = generate(case, pipeline)
    assert torch.equal(generate(case, twin), image)
    assert skips(get_handle(twin)) == SKIPS["balanced"]


def test_a_pipeline_out_of_the_parts_of_another():
    case, pipeline = sd15_pipeline()
    handle = apply_cache(pipeline, "balanced")
    other = type(pipeline)(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    del pipeline
    generate(case, other)
    assert skips(handle) == SKIPS["balanced"]
