# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""CPU offload replaces ``forward`` of modules at the end of every image."""

import pytest
import torch
from edge_pipelines import SKIPS, generate, sd15_pipeline, skips
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


@pytest.mark.parametrize("first", ["offload", "cache"])
@pytest.mark.parametrize(
    ("setting", "how"), [("both", "model"), ("inner", "model"), ("most", "sequential")]
)
def test_skipping_goes_on_in_later_images_and_removal_is_exact(setting, how, first):
    case, pipeline = sd15_pipeline()
    baseline = generate(case, pipeline)
    if first == "offload":
        offload(pipeline, how)
    handle = apply_cache(pipeline, FIXED[setting])
    if first == "cache":
        offload(pipeline, how)
    images = []
    for _ in range(3):
        handle.reset_stats()
        images.append(generate(case, pipeline))
        assert skips(handle) == SKIPS[setting]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    apply_tome(pipeline, ratio=0.5)
    assert not torch.equal(generate(case, pipeline), baseline)
    assert remove_cache(pipeline) and remove_tome(pipeline) and not remove_cache(pipeline)
    assert torch.equal(generate(case, pipeline), baseline)
    # Once more, with what offloading left behind.
    with apply_cache(pipeline, FIXED[setting]) as handle:
        assert torch.equal(generate(case, pipeline), images[0])
        assert skips(handle) == SKIPS[setting]
    assert torch.equal(generate(case, pipeline), baseline)


@pytest.mark.parametrize("how", ["sequential", "group"])
@pytest.mark.parametrize("first", ["merging", "offload"])
def test_merging_weights_that_are_there_only_while_their_layer_runs(how, first):
    case, pipeline = sd15_pipeline()
    options, steps = dict(ratio=0.5, targets=["attn", "mlp"]), dict(num_inference_steps=2)
    baseline = generate(case, pipeline, **steps)
    with apply_tome(pipeline, **options):
        expected = generate(case, pipeline, **steps)
    if first == "offload":
        offload(pipeline, how)
    handle = apply_tome(pipeline, **options)
    if first == "merging":
        offload(pipeline, how)
    assert torch.equal(generate(case, pipeline, **steps), expected)
    assert {(row["kept"], row["calls"]) for row in handle.stats()} == {(32, 2)}
    handle.remove()
    assert torch.equal(generate(case, pipeline, **steps), baseline)
