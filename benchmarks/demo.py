# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The demo models, and what the scripts beside this one do with them: schedulers to run them with,
how outputs compare, and how many operations are left of a call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmagic_tome.assets import asset_path
from mmagic_tome.models import find_adapter

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


@torch.no_grad()
def draw(
    pipeline: Any, caption: str, seed: int, size: int, steps: int, guidance: float, **options: Any
) -> Tensor:
    """The final latents of one image; options are more of the pipeline's call."""
    return pipeline(
        caption,
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **options,
    ).images


def decode(pipeline: Any, latents: Tensor) -> Tensor:
    """Pixels in 0 ... 1."""
    config = pipeline.vae.config
    latents = latents / config.scaling_factor + (config.get("shift_factor") or 0)
    image = pipeline.vae.decode(latents).sample
    return (image / 2 + 0.5).clamp(0, 1)


def psnr(one: Tensor, other: Tensor) -> float:
    """In dB, of images in 0 ... 1; at most 120."""
    square = float((one - other).square().mean())
    return -10 * math.log10(max(square, 1e-12))


def relative_error(latents: Tensor, baseline: Tensor) -> float:
    """Of the final latents."""
    return float((latents - baseline).norm() / baseline.norm())


def operations(pipeline: Any, steps: int = 1, **options: Any) -> dict[str, int]:
    """Path of a module of the network, '' for all of it -> its operations in so many steps.

    Args:
        pipeline: Any of the two.
        steps: Of the run.
        **options: More of its call: ``height``, ``width`` ...
    """
    name = type(find_adapter(pipeline)[1]).__name__
    options = dict(output_type="latent", guidance_scale=3.0) | options
    with FlopCounterMode(display=False) as counter:
        pipeline("a", num_inference_steps=steps, **options)
    counts = counter.get_flop_counts().items()
    return {path.removeprefix(name).lstrip("."): sum(one.values()) for path, one in counts}


def shares(pipeline: Any, **options: Any) -> dict[str, float]:
    """Region -> share of the operations of a call that are left if it is skipped; options as those
    of :func:`operations`."""
    adapter, network = find_adapter(pipeline)
    counts = operations(pipeline, **options)
    names = {module: path for path, module in network.named_modules()}
    found = {"computed": 1.0, "network": 0.0}
    for region, depth in (("inner", 1), ("innermost", 2)):
        inside = [names[module] for module in adapter.inner_modules(network, depth)]
        found[region] = 1 - sum(counts.get(one, 0) for one in inside) / counts[""]
    return found
