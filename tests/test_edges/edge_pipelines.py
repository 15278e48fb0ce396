# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Pipelines around a UNet with Stable Diffusion 1.5's block types, and what tests ask of them."""

from functools import partial

import diffusers
import torch
from fixed_steps import FIXED
from tiny import tiny_unet
from tiny_pipelines import PIPELINES

from mmagic_tome import apply_cache, apply_tome

STEPS = 20
TIMES = range(951, 0, -50)  # of STEPS
# Of 20 steps, how often each setting skips the network and its inner region.
SKIPS = {
    "inner": {"inner": 7},
    "both": {"network": 6, "inner": 3},
    "most": {"network": 9, "inner": 3},
}
# What keeps state between steps: name -> network -> handle. Outputs of the network and of its inner
# region; the same with samples that predict errors; plans.
KEEPERS = {
    "both": partial(apply_cache, config=FIXED["both"]),
    "tolerance": partial(apply_cache, tolerance=0.2),
    "plans": partial(apply_tome, ratio=0.5, plan_interval=4),
}


def sd15_unet(seed=0, **changes):
    """A UNet with four levels, the coarsest without attention, as in Stable Diffusion 1.5."""
    options = dict(
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(16, 16, 32, 32),
        **changes,
    )
    return tiny_unet(levels=4, seed=seed, **options)


def sd15_pipeline(title="Stable Diffusion 1.x", scheduler=None, **unet):
    """A pipeline of :data:`tiny_pipelines.PIPELINES` around such a UNet; ``scheduler`` is the name
    of another class in diffusers, or (name, options)."""
    case = PIPELINES[title]
    pipeline = case.pipeline()
    pipeline.unet = sd15_unet(**unet)
    if scheduler is not None:
        name, options = (scheduler, {}) if isinstance(scheduler, str) else scheduler
        kind, config = getattr(diffusers, name), pipeline.scheduler.config
        pipeline.scheduler = kind.from_config(config, **options)
    case.prepare(pipeline)
    return case, pipeline


def generate(case, pipeline, seed=0, **changes):
    """Latents of one image."""
    generator = torch.Generator().manual_seed(seed)
    changes = {"num_inference_steps": STEPS, **changes}
    return case.run(pipeline, generator=generator, **changes)


def skips(handle):
    """Region -> how often it was skipped."""
    return {row["region"]: row["skipped"] for row in handle.stats()}
