# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Pipelines with several denoisers."""

import pytest
import torch
from edge_pipelines import deeper

from mmagic_tome import ToMeError, apply_cache, apply_tome, get_handle, remove_cache, remove_tome


def wan22(seed=0):
    """Wan 2.2: one expert for high noise, one for low."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    case = deeper("Wan 2.1, 2.2 (video)")
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=case.build(),
        transformer_2=case.build(),
        boundary_ratio=0.875,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline, seed=0):
    config = pipeline.transformer.config
    text = torch.randn(2, 1, 5, config.text_dim, generator=torch.Generator().manual_seed(3))
    return pipeline(
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1],
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=20,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
    ).frames


def test_both_experts_are_merged_and_cached():
    pipeline = wan22()
    baseline = run(pipeline)
    merging = apply_tome(pipeline, ratio=0.5)
    caching = apply_cache(pipeline, "fast")
    images = [run(pipeline) for _ in range(2)]
    assert torch.equal(*images)
    assert not torch.equal(images[0], baseline)
    for name in ("transformer.", "transformer_2."):
        rows = [row for row in merging.stats() if row["target"].startswith(name)]
        assert rows and all(row["calls"] and row["kept"] < row["tokens"] for row in rows)
        regions = {row["region"]: row for row in caching.stats()}
        assert regions[name + "network"]["computed"] > 0
    skipped = {row["region"]: row["skipped"] for row in caching.stats()}
    assert skipped["transformer.network"] + skipped["transformer_2.network"] >= 2 * 2 * 7
    assert "transformer_2.network" in caching.summary()
    assert "transformer_2.blocks.0.attn" in merging.summary()
    # A window is a share of the whole run, whichever expert computes it.
    assert get_handle(pipeline, "tome").stats() == merging.stats()
    assert remove_tome(pipeline) and remove_cache(pipeline)
    assert torch.equal(run(pipeline), baseline)


def test_one_expert_may_be_left_alone_on_purpose():
    pipeline = wan22()
    handle = apply_cache(pipeline, "fast", denoisers=["transformer_2"])
    run(pipeline)
    assert {row["region"] for row in handle.stats()} == {"network", "inner"}
    assert list(handle.networks.values()) == [pipeline.transformer_2]
    with pytest.raises(ToMeError, match="transformer"):
        apply_tome(pipeline, ratio=0.5, denoisers=["transformer_3"])
