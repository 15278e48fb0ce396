# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""CPU offload replaces ``forward`` of modules at the end of every image."""

import pytest
import torch
from edge_pipelines import generate, sd15_pipeline, skips
from fixed_steps import FIXED

from mmagic_tome import apply_cache, apply_tome, remove_cache, remove_tome

accelerate = pytest.importorskip("accelerate")

CPU = torch.device("cpu")


def offload(pipeline, how):
    """To the same device, since there is no other: what accelerate wraps is the same."""
    if how == "model":
        pipeline.enable_model_cpu_offload(device="cpu")
    elif how == "group":
        options = dict(onload_device=CPU, offload_device=CPU, offload_type="block_level")
        pipeline.unet.enable_group_offload(**options, num_blocks_per_group=1)
    else:
        # enable_sequential_cpu_offload(device="cpu") fails inside accelerate without a GPU; this
        # is what it does to each model.
        for model in (pipeline.unet, pipeline.vae):
            accelerate.cpu_offload(model, execution_device=CPU)
        assert pipeline.unet.conv_in.weight.is_meta


@pytest.mark.parametrize("first", ["offload", "apply"])
@pytest.mark.parametrize("how", ["model", "sequential", "group"])
def test_offloaded_weights_are_merged_and_cached_in_every_image(how, first):
    case, pipeline = sd15_pipeline()

    def image():
        return generate(case, pipeline, num_inference_steps=12)

    def apply():
        apply_tome(pipeline, ratio=0.5, targets=["attn", "mlp"])
        return apply_cache(pipeline, FIXED["both"])

    baseline = image()
    handle = apply()
    expected, skipped = image(), skips(handle)
    assert skipped["network"] and skipped["inner"] and remove_cache(pipeline)
    remove_tome(pipeline)
    if first == "offload":
        offload(pipeline, how)
    handle = apply()
    if first == "apply":
        offload(pipeline, how)
    for _ in range(2):
        handle.reset_stats()
        assert torch.equal(image(), expected) and skips(handle) == skipped
    assert remove_cache(pipeline) and remove_tome(pipeline) and not remove_cache(pipeline)
    assert torch.equal(image(), baseline)
    apply()  # once more, with what offloading left behind
    assert torch.equal(image(), expected)
