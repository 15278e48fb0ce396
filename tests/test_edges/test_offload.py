# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""CPU offload replaces ``forward`` of modules at the end of every image."""

import pytest
import torch
from edge_pipelines import SETTINGS, SKIPS, generate, sd15_pipeline, skips

from mmagic_tome import apply_cache, apply_tome, remove_cache, remove_tome

pytest.importorskip("accelerate")


def offload(pipeline, how):
    if how == "model":
        pipeline.enable_model_cpu_offload(device="cpu")
    else:
        from accelerate import cpu_offload

        # enable_sequential_cpu_offload(device="cpu") fails inside accelerate without a GPU; this
        # is what it does to each model.
        for model in (pipeline.unet, pipeline.vae):
            cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize(
    "setting, how",
    [*((setting, "model") for setting in SETTINGS), ("balanced", "sequential")],
)
@pytest.mark.parametrize("first", ["offload", "cache"])
def test_skipping_goes_on_in_later_images(setting, how, first):
    case, pipeline = sd15_pipeline()
    if first == "offload":
        offload(pipeline, how)
    handle = apply_cache(pipeline, setting)
    if first == "cache":
        offload(pipeline, how)
    images = []
    for _ in range(3):
        handle.reset_stats()
        images.append(generate(case, pipeline))
        assert skips(handle) == SKIPS[setting]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert handle.active


@pytest.mark.parametrize("how", ["model", "sequential"])
@pytest.mark.parametrize("order", ["cache first", "offload first"])
def test_removal_is_bit_exact_in_any_order(how, order):
    case, pipeline = sd15_pipeline()
    baseline = generate(case, pipeline)
    if order == "cache first":
        apply_cache(pipeline, "fast")
        offload(pipeline, how)
    else:
        offload(pipeline, how)
        apply_cache(pipeline, "fast")
    apply_tome(pipeline, ratio=0.5)
    assert not torch.equal(generate(case, pipeline), baseline)
    assert remove_cache(pipeline)
    assert remove_tome(pipeline)
    assert not remove_cache(pipeline)
    assert torch.equal(generate(case, pipeline), baseline)
    # Applied once more, with what offloading left behind.
    handle = apply_cache(pipeline, "fast")
    generate(case, pipeline)
    assert skips(handle) == SKIPS["fast"]
    handle.remove()
    assert torch.equal(generate(case, pipeline), baseline)


def test_a_context_manager_inside_an_offloaded_cache():
    from accelerate import hooks

    case, pipeline = sd15_pipeline()
    outer = apply_cache(pipeline, "fast")
    hooks.add_hook_to_module(pipeline.unet, hooks.ModelHook())
    expected = generate(case, pipeline)
    with apply_cache(pipeline, "quality"):
        assert not torch.equal(generate(case, pipeline), expected)
    with apply_tome(pipeline, ratio=0.5):
        generate(case, pipeline)
    assert torch.equal(generate(case, pipeline), expected)
    assert outer.active
