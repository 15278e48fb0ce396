# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The demo model and the schedulers that the scripts beside this one run it with."""

from __future__ import annotations

from typing import Any

import torch

from mmagic_tome.assets import asset_path

#: Name in tables -> class of diffusers, and what is changed of the demo model's own options.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "SDE-DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DDPM": ("DDPMScheduler", {}),
}


def demo_pipeline() -> Any:
    """The demo model as a diffusers pipeline in float32."""
    from diffusers import StableDiffusionPipeline  # after mmagic_tome, which may repair it

    pipeline = StableDiffusionPipeline.from_pretrained(
        asset_path("demo_model"), safety_checker=None, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def demo_transformer() -> Any:
    """The demo diffusion transformer, a small Stable Diffusion 3, in float32."""
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(
        asset_path("demo_dit"), torch_dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def set_scheduler(pipeline: Any, name: str) -> None:
    """Give the pipeline a scheduler of :data:`SCHEDULERS`."""
    import diffusers

    class_name, options = SCHEDULERS[name]
    scheduler = getattr(diffusers, class_name)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
