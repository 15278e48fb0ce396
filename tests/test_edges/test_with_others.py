# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Next to diffusers' own caches, and callers that change their mind."""

import diffusers
import pytest
import torch
from denoise import inputs_at
from edge_pipelines import TIMES
from tiny import tiny_inputs, tiny_unet
from tiny_transformers import TRANSFORMERS

from mmagic_tome import apply_cache


@torch.no_grad()
def test_diffusers_own_cache_on_top():
    """It looks up blocks by their class."""
    if not hasattr(diffusers, "FirstBlockCacheConfig"):
        pytest.skip("this diffusers has no FirstBlockCacheConfig")
    family = TRANSFORMERS["Flux.1"].deeper(4)
    network = family.build()
    expected = network(**family.inputs()).sample
    handle = apply_cache(network, "balanced")
    network.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    with network.cache_context("cond"):
        assert torch.isfinite(network(**family.inputs()).sample).all()
    network.disable_cache()
    handle.remove()
    assert torch.equal(network(**family.inputs()).sample, expected)


@torch.no_grad()
def test_the_form_of_the_output_is_that_of_the_call():
    network, inputs = tiny_unet(), tiny_inputs()
    apply_cache(network, "fast")
    for step, time in enumerate(TIMES):
        as_tuple = step % 3 == 1
        output = network(**inputs_at(inputs, time), return_dict=not as_tuple)
        assert isinstance(output, tuple) == as_tuple
        inputs["sample"] = inputs["sample"] - 0.05 * output[0]
