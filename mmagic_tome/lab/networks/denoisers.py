# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Denoising UNets and transformers of diffusers, by the ``config.json`` of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .base import Arguments, Network

_UNET = "UNet2DConditionModel"
_SD3 = "SD3Transformer2DModel"
_FLUX = "FluxTransformer2DModel"


def denoiser(
    arguments: dict[str, Any],
    name: str = _UNET,
    factor: int = 8,
    text: int = 77,
    **options: Any,
) -> Network:
    """A network of diffusers.

    Args:
        arguments: Of its constructor.
        name: Of its class.
        factor: Pixels per position of the latents, per side.
        text: Number of text tokens.
        **options: Of :class:`Network`.
    """

    def make() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**arguments)

    def inputs(network, size, batch, noise) -> Callable[[int], Arguments]:
        grid = (size[0] // factor, size[1] // factor)
        return _INPUTS[name](network.config, noise, batch, grid, text)

    # A UNet halves its sides at every level but the last; Stable Diffusion 3 has patches of 2.
    levels = len(arguments.get("block_out_channels", range(4)))
    unit = factor * {_UNET: 2 ** (levels - 1), _SD3: 2, _FLUX: 1}[name]
    return Network(make, inputs, unit=unit, **options)


# --- inputs of each class -------------------------------------------------------------------------


def _unet_inputs(config, noise, batch, grid, text) -> Callable[[int], Arguments]:
    x = noise(batch, config.in_channels, *grid)
    known = dict(encoder_hidden_states=noise(batch, text, config.cross_attention_dim))
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        known["added_cond_kwargs"] = dict(
            text_embeds=noise(batch, width),
            time_ids=torch.full((batch, 6), 512.0, device=x.device, dtype=x.dtype),
        )
    # By position: tomesd and DeepCache read these two there.
    return lambda time: ((x, torch.tensor(time, device=x.device)), known)


def _sd3_inputs(config, noise, batch, grid, text) -> Callable[[int], Arguments]:
    known = dict(
        hidden_states=noise(batch, config.in_channels, *grid),
        encoder_hidden_states=noise(batch, text, config.joint_attention_dim),
        pooled_projections=noise(batch, config.pooled_projection_dim),
    )
    device = known["hidden_states"].device
    return lambda time: ((), {**known, "timestep": torch.full((batch,), float(time)).to(device)})


def _flux_inputs(config, noise, batch, grid, text) -> Callable[[int], Arguments]:
    hidden = noise(batch, grid[0] * grid[1], config.in_channels)
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    positions = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3)
    known = dict(
        hidden_states=hidden,
        encoder_hidden_states=noise(batch, text, config.joint_attention_dim),
        pooled_projections=noise(batch, config.pooled_projection_dim),
        img_ids=positions.to(hidden),
        txt_ids=torch.zeros(text, 3).to(hidden),
        guidance=torch.full((batch,), 3.5).to(hidden),
    )
    return lambda time: ((), {**known, "timestep": torch.full((batch,), time / 1000).to(hidden)})


_INPUTS = {_UNET: _unet_inputs, _SD3: _sd3_inputs, _FLUX: _flux_inputs}

# --- shapes ---------------------------------------------------------------------------------------

# Only arguments that differ from the defaults of the classes: Stable Diffusion 1, a smaller Stable
# Diffusion 3, Flux.1.
DENOISERS = {
    "small": denoiser(  # about the demo model's network
        dict(
            block_out_channels=(64, 128, 192),
            down_block_types=("CrossAttnDownBlock2D",) * 3,
            up_block_types=("CrossAttnUpBlock2D",) * 3,
            layers_per_block=1,
            cross_attention_dim=192,
            attention_head_dim=(1, 2, 3),
        ),
        size=256,
        factor=4,
        text=24,
    ),
    "sd15": denoiser(dict(cross_attention_dim=768)),
    "sd15-level0": denoiser(  # its finest level alone, where the methods differ most
        dict(
            block_out_channels=(320,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            mid_block_type=None,
            cross_attention_dim=768,
        ),
    ),
    "sdxl": denoiser(
        dict(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        size=1024,
    ),
    "sd3": denoiser(  # medium
        dict(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=192,
        ),
        name=_SD3,
        size=1024,
        text=333,
    ),
    "flux": denoiser(  # dev
        dict(guidance_embeds=True),
        name=_FLUX,
        size=1024,
        factor=16,
        batch=1,
        text=512,
    ),
}
