# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""CPU offload replaces ``forward`` of modules at the end of every image."""

import pytest
import torch
from edge_pipelines import SKIPS, generate, sd15_pipeline, skips
from fixed_steps import FIXED

from mmagic_tome import apply_cache, apply_tome, remove_cache, remove_tome

accelerate = pytest.importorskip("accelerate")


def offload(pipeline, how):
    if how == "model":
        pipeline.enable_model_cpu_offload(device="cpu")
    else:
        # enable_sequential_cpu_offload(device="cpu") fails inside accelerate without a GPU; this
        # is what it does to each model.
        for model in (pipeline.unet, pipeline.vae):
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


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
