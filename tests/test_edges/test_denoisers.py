# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Pipelines with several denoisers."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipelines import PIPELINES
from tiny_transformers import TRANSFORMERS

from mmagic_tome import ToMeError, apply_cache, apply_tome, get_handle, remove_cache, remove_tome

TITLE = "Wan 2.1, 2.2 (video)"


@pytest.fixture
def wan22():
    """Wan 2.2: one expert for high noise, one for low."""
    family = TRANSFORMERS[TITLE].deeper(4)
    pipeline = PIPELINES[TITLE].pipeline()
    pipeline.register_modules(
        transformer=family.build(),
        transformer_2=family.build(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    pipeline.register_to_config(boundary_ratio=0.875)
    return pipeline


def run(pipeline):
    return PIPELINES[TITLE].run(pipeline, height=32, width=32, num_inference_steps=20)


def test_both_experts_are_merged_and_cached(wan22):
    baseline = run(wan22)
    merging = apply_tome(wan22, ratio=0.5)
    caching = apply_cache(wan22, "fast")
    images = [run(wan22) for _ in range(2)]
    assert torch.equal(*images)
    assert not torch.equal(images[0], baseline)
    regions = {row["region"]: row for row in caching.stats()}
    for name in ("transformer.", "transformer_2."):
        rows = [row for row in merging.stats() if row["target"].startswith(name)]
        assert rows and all(row["calls"] and row["kept"] < row["tokens"] for row in rows)
        assert regions[name + "network"]["computed"] > 0
    # A window is a share of the whole run, whichever expert computes it.
    skipped = sum(row["skipped"] for region, row in regions.items() if "network" in region)
    assert skipped >= 2 * 2 * 7
    assert "transformer_2.network" in caching.summary()
    assert "transformer_2.blocks.0.attn" in merging.summary()
    assert get_handle(wan22, "tome").stats() == merging.stats()
    assert remove_tome(wan22) and remove_cache(wan22)
    assert torch.equal(run(wan22), baseline)


def test_one_expert_may_be_left_alone_on_purpose(wan22):
    handle = apply_cache(wan22, "fast", denoisers=["transformer_2"])
    run(wan22)
    assert {row["region"] for row in handle.stats()} == {"network", "inner"}
    assert list(handle.networks.values()) == [wan22.transformer_2]
    with pytest.raises(ToMeError, match="transformer"):
        apply_tome(wan22, ratio=0.5, denoisers=["transformer_3"])
