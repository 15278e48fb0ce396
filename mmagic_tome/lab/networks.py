# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Networks of the shapes of published checkpoints, with random weights.

Time and memory of a forward depend on the shape and not on the values of the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ToMeError
from ..latents import tensors_of
from .runners.base import check_size

#: Positional and keyword arguments of a call of a network.
Arguments = tuple[tuple, dict[str, Any]]
# Timestep of a single forward, of 1000.
_MIDDLE = 500
_UNET, _SD3, _FLUX = "UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"


@dataclass(frozen=True)
class Network:
    """A denoising network of diffusers that can be built by name.

    Attributes:
        arguments: Of its constructor, where they are not the default of the class.
        name: Of its class. Default: a UNet, whose defaults are Stable Diffusion 1.
        factor: Pixels per position of the latents, per side.
        text: Number of text tokens.
        size: Default height and width in pixels.
    """

    arguments: Mapping[str, Any]
    name: str = _UNET
    factor: int = 8
    text: int = 77
    size: int = 512

    @property
    def unit(self) -> int:
        """Pixels that height and width must be multiples of: all levels of a UNet but the last
        halve them; Stable Diffusion 3 has patches of 2."""
        levels = len(self.arguments.get("block_out_channels", range(4)))
        return self.factor * {_UNET: 2 ** (levels - 1), _SD3: 2, _FLUX: 1}[self.name]

    def make(self) -> nn.Module:
        """The network, where torch's default device says."""
        import diffusers

        return getattr(diffusers, self.name)(**self.arguments)

    def build(self, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
        """The network with random weights, which are made where they stay, in their final
        precision; in eval mode and without gradients."""
        with torch.device("meta"):
            network = self.make()
        # Not diffusers' own ``to``, which warns of precisions that matter with real weights only.
        network = nn.Module.to(network, dtype).to_empty(device=device)
        for buffer in network.buffers():  # a table of positions
            buffer.zero_()
        generator = torch.Generator(device).manual_seed(0)
        for module in network.modules():
            for name, tensor in module.named_parameters(recurse=False):
                # About unit variance from layer to layer: nothing overflows in half precision, and
                # nothing becomes so small that a CPU slows down on it.
                bound = (3 / max(1, tensor[0].numel())) ** 0.5 if tensor.dim() > 1 else 0.1
                tensor.data.uniform_(-bound, bound, generator=generator)
                if name == "weight" and tensor.dim() == 1:
                    tensor.data.fill_(1)  # a norm
        return network.eval().requires_grad_(False)


@dataclass
class Work:
    """A network and the calls of it that are one measurement."""

    network: nn.Module  #: the baseline; it is not changed
    calls: list[Arguments]
    scheduler: Any  #: whose timesteps the calls have; None for a single call

    def __call__(self, network: nn.Module) -> Tensor:
        """Run a copy of the network: the mean of its outputs."""
        total = None
        for args, kwargs in self.calls:
            output = tensors_of(network(*args, **kwargs))[0]
            total = output if total is None else total + output
        return total / len(self.calls) if len(self.calls) > 1 else total


def work_on(
    entry: Network, network: nn.Module, size: tuple[int, int], batch: int, steps: int
) -> Work:
    """Calls of a network that was built from an entry, on (height, width) pixels, at so many
    falling timesteps; 1 is a single forward."""
    weights = next(network.parameters())
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(weights)

    grid = (size[0] // entry.factor, size[1] // entry.factor)
    call = _CALLS[entry.name](network.config, noise, grid, entry.text)
    times = [round(1000 * (1 - step / steps)) - 1 for step in range(steps)]
    scheduler = SimpleNamespace(timesteps=torch.tensor(times)) if steps > 1 else None
    return Work(network, [call(time) for time in (times if steps > 1 else [_MIDDLE])], scheduler)


_Noise = Callable[..., Tensor]


def _unet_call(config: Any, noise: _Noise, grid: tuple[int, int], text: int) -> Callable:
    x = noise(config.in_channels, *grid)
    known = dict(encoder_hidden_states=noise(text, config.cross_attention_dim))
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        times = x.new_full((len(x), 6), 512.0)
        known["added_cond_kwargs"] = dict(text_embeds=noise(width), time_ids=times)
    # By position: tomesd and DeepCache read these two there.
    return lambda time: ((x, torch.tensor(time, device=x.device)), known)


def _sd3_call(config: Any, noise: _Noise, grid: tuple[int, int], text: int) -> Callable:
    x = noise(config.in_channels, *grid)
    known = dict(
        hidden_states=x,
        encoder_hidden_states=noise(text, config.joint_attention_dim),
        pooled_projections=noise(config.pooled_projection_dim),
    )
    return lambda time: ((), {**known, "timestep": x.new_full((len(x),), time)})


def _flux_call(config: Any, noise: _Noise, grid: tuple[int, int], text: int) -> Callable:
    x = noise(grid[0] * grid[1], config.in_channels)
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    places = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3)
    known = dict(
        hidden_states=x,
        encoder_hidden_states=noise(text, config.joint_attention_dim),
        pooled_projections=noise(config.pooled_projection_dim),
        img_ids=places.to(x),
        txt_ids=x.new_zeros(text, 3),
    )
    if config.guidance_embeds:
        known["guidance"] = x.new_full((len(x),), 3.5)
    return lambda time: ((), {**known, "timestep": x.new_full((len(x),), time / 1000)})


# Class -> what makes (timestep -> arguments of a call).
_CALLS = {_UNET: _unet_call, _SD3: _sd3_call, _FLUX: _flux_call}


def check_network(name: str, size: tuple[int, int] | None = None) -> Network:
    """The entry of :data:`NETWORKS`; ToMeError if there is none, or it cannot work on a size,
    (height, width) in pixels. Default: None, its own."""
    if name not in NETWORKS:
        raise ToMeError(
            f"there is no network {name!r}; write one of {', '.join(NETWORKS)}, a config's "
            "path, or --pipeline FOLDER"
        )
    check_size(name, size, NETWORKS[name].unit)
    return NETWORKS[name]


def share_weights(network: nn.Module) -> nn.Module:
    """A copy of a network with hooks and sub-modules of its own and the same weights."""
    tensors = (*network.parameters(), *network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


#: Name -> network.
NETWORKS = {
    "small": Network(  # about the demo model's network
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
    "sd15": Network(dict(cross_attention_dim=768)),
    "sd15-level0": Network(  # its finest level alone, where the methods differ most
        dict(
            block_out_channels=(320,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            mid_block_type=None,
            cross_attention_dim=768,
        ),
    ),
    "sdxl": Network(
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
    "sd3": Network(  # medium
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
    "flux": Network(dict(guidance_embeds=True), name=_FLUX, size=1024, factor=16, text=512),  # dev
}
