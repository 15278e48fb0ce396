# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Next to diffusers' own caches, callers that change their mind, pipelines with two denoisers."""

import diffusers
import pytest
import torch
from denoise import inputs_at
from edge_pipelines import TIMES
from fixed_steps import FIXED
from tiny import tiny_inputs, tiny_unet
from tiny_pipelines import PIPELINES
from tiny_transformers import TRANSFORMERS

from mmagic_tome import apply_cache, apply_tome, remove_cache, remove_tome


@torch.no_grad()
def test_diffusers_own_cache_on_top():
    """It looks up blocks by their class."""
    if not hasattr(diffusers, "FirstBlockCacheConfig"):
        pytest.skip("this diffusers has no FirstBlockCacheConfig")
    family = TRANSFORMERS["Flux.1"].deeper(4)
    network = family.build()
    expected = network(**family.inputs()).sample
    handle = apply_cache(network, FIXED["both"])
    network.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    with network.cache_context("cond"):
        assert torch.isfinite(network(**family.inputs()).sample).all()
    network.disable_cache()
    handle.remove()
    assert torch.equal(network(**family.inputs()).sample, expected)


@torch.no_grad()
def test_the_form_of_the_output_is_that_of_the_call():
    network, inputs = tiny_unet(), tiny_inputs()
    apply_cache(network, FIXED["most"])
    for step, time in enumerate(TIMES):
        as_tuple = step % 3 == 1
        output = network(**inputs_at(inputs, time), return_dict=not as_tuple)
        assert isinstance(output, tuple) == as_tuple
        inputs["sample"] = inputs["sample"] - 0.05 * output[0]


def two_experts():
    """A pipeline of Wan 2.2, one denoiser for high noise and one for low; and what runs it."""
    title = "Wan 2.1, 2.2 (video)"
    family = TRANSFORMERS[title].deeper(4)
    pipeline = PIPELINES[title].pipeline()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    parts = dict(transformer=family.build(), transformer_2=family.build(), scheduler=scheduler)
    pipeline.register_modules(**parts)
    pipeline.register_to_config(boundary_ratio=0.875)

    def run():
        return PIPELINES[title].run(pipeline, height=32, width=32, num_inference_steps=20)

    return pipeline, run


def test_two_experts_are_merged_and_cached():
    pipeline, run = two_experts()
    baseline = run()
    merging = apply_tome(pipeline, ratio=0.5)
    caching = apply_cache(pipeline, FIXED["most"])
    first = run()
    assert torch.equal(run(), first) and not torch.equal(first, baseline)
    skipped = {row["region"]: row["skipped"] for row in caching.stats()}
    for name in ("transformer.", "transformer_2."):
        rows = [row for row in merging.stats() if row["target"].startswith(name)]
        assert rows and all(row["calls"] and row["kept"] < row["tokens"] for row in rows)
    # A window is a share of the whole run, whichever expert computes it.
    assert skipped["transformer.network"] + skipped["transformer_2.network"] >= 2 * 2 * 7
    assert remove_tome(pipeline) and remove_cache(pipeline)
    assert torch.equal(run(), baseline)


def test_two_experts_share_the_tolerance_of_a_run():
    pipeline, run = two_experts()
    handle = apply_cache(pipeline, tolerance=0.5)
    run()
    assert len(handle.steps) == 20  # of both
    skipped = {row["region"]: row["skipped"] for row in handle.stats()}
    assert skipped["transformer.network"] and skipped["transformer_2.network"]
    both = handle.predicted_error[0]
    assert 0 < both <= 0.5
    handle.remove()
    # By itself the first one spends no more than in the run of both.
    first = apply_cache(pipeline, tolerance=0.5, denoisers=["transformer"])
    run()
    assert len(first.steps) < 20 and 0 < first.predicted_error[0] < both
