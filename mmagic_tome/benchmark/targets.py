# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What is run: networks of named shapes with random weights, the demo model, or a config's.

Shapes are those of the published checkpoints (their ``config.json``); time and memory of a
forward depend on them and not on the values of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ToMeError

Call = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Shape:
    """A network by its constructor's arguments.

    Attributes:
        about (str): one line for ``--help``.
        network (str): name of the class in diffusers.
        options (dict): its arguments.
        size (int): default side of the picture in pixels.
        factor (int): pixels per place of the latent, per side.
        batch (int): default batch; 2 is one picture with classifier-free guidance.
        text (int): number of text tokens.
    """

    about: str
    network: str
    options: dict[str, Any] = field(hash=False)
    size: int = 512
    factor: int = 8
    batch: int = 2
    text: int = 77


_SD_LEVELS = dict(
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    layers_per_block=2,
)
_SD3 = dict(
    sample_size=128,
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=24,
    attention_head_dim=64,
    num_attention_heads=24,
    joint_attention_dim=4096,
    caption_projection_dim=1536,
    pooled_projection_dim=2048,
    pos_embed_max_size=192,
)
_FLUX = dict(
    patch_size=1,
    in_channels=64,
    num_layers=19,
    num_single_layers=38,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=4096,
    pooled_projection_dim=768,
    guidance_embeds=True,
    axes_dims_rope=(16, 56, 56),
)
_UNET, _SD3_CLASS = "UNet2DConditionModel", "SD3Transformer2DModel"
_FLUX_CLASS = "FluxTransformer2DModel"

SHAPES = {
    "small": Shape(
        "about the demo model's network (needs no files)",
        _UNET,
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
    "sd15": Shape(
        "Stable Diffusion 1.5",
        _UNET,
        dict(cross_attention_dim=768, attention_head_dim=8, **_SD_LEVELS),
    ),
    "sd15-level0": Shape(
        "its finest level alone, where eta is measured without the noise of the rest",
        _UNET,
        dict(
            block_out_channels=(320,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            mid_block_type=None,
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        ),
    ),
    "sd21": Shape(
        "Stable Diffusion 2.1",
        _UNET,
        dict(
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
            **_SD_LEVELS,
        ),
        size=768,
    ),
    "sdxl": Shape(
        "Stable Diffusion XL",
        _UNET,
        dict(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
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
    "sd3": Shape("Stable Diffusion 3 medium", _SD3_CLASS, _SD3, size=1024, text=333),
    "sd3-block": Shape(
        "one of its 24 blocks", _SD3_CLASS, {**_SD3, "num_layers": 1}, size=1024, text=333
    ),
    "flux": Shape("Flux.1 dev", _FLUX_CLASS, _FLUX, size=1024, factor=16, batch=1, text=512),
    "flux-block": Shape(
        "one of its 19 double and one of its 38 single blocks",
        _FLUX_CLASS,
        {**_FLUX, "num_layers": 1, "num_single_layers": 1},
        size=1024,
        factor=16,
        batch=1,
        text=512,
    ),
}
DEMO = "demo"


@dataclass
class Target:
    """A network that is ready to be run.

    Attributes:
        name (str): as the user wrote it.
        network (nn.Module): in eval mode, without gradients, on its device.
        factor (int): pixels per place of the latent, per side.
        text (int): number of text tokens.
    """

    name: str
    network: nn.Module
    factor: int
    text: int

    def call(self, size: tuple[int, int], batch: int) -> Call:
        """A function that runs a network like this one on inputs that stay the same.

        Args:
            size (tuple): (height, width) of the picture in pixels.
            batch (int): batch of the network; with guidance twice the pictures.

        Returns:
            callable: network -> its output, (B, C, h, w) or (B, N, C).

        Raises:
            ToMeError: the size is no multiple of what the network needs.
        """
        check_size(self.name, size, self.factor * _side_unit(self.network))
        parameter = next(self.network.parameters())
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=generator)
            return drawn.to(parameter.device, parameter.dtype)

        grid = (size[0] // self.factor, size[1] // self.factor)
        make = {_SD3_CLASS: _sd3_call, _FLUX_CLASS: _flux_call}
        make = make.get(type(self.network).__name__, _unet_call)
        return make(self.network, noise, batch, grid, self.text)


def check_size(name: str, size: tuple[int, int], unit: int) -> None:
    """Raise :class:`ToMeError` unless both sides are multiples of ``unit`` pixels."""
    if any(side % unit for side in size):
        near = "x".join(str(max(unit, round(side / unit) * unit)) for side in size)
        raise ToMeError(
            f"size {size[0]}x{size[1]} does not fit {name}: height and width must be multiples "
            f"of {unit}; the nearest is {near}"
        )


def shape_of(name: str) -> Shape:
    """The shape of that name; :class:`ToMeError` lists them if there is none."""
    if name not in SHAPES:
        raise ToMeError(
            f"no target {name!r}: write {DEMO}, {', '.join(SHAPES)}, or a MMagic config's path"
        )
    return SHAPES[name]


def size_unit(shape: Shape) -> int:
    """Pixels that height and width of a shape's picture must be multiples of."""
    levels = len(shape.options.get("block_out_channels", (0,)))
    return shape.factor * 2 ** (levels - 1) * shape.options.get("patch_size", 1)


def on_meta(shape: Shape) -> nn.Module:
    """The network of a shape without memory for its weights."""
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, shape.network)(**shape.options)


def build_shape(name: str, device: str, dtype: torch.dtype) -> Target:
    """A network of a named shape with random weights.

    Weights are made where they stay, in their final precision, so building takes no more
    memory than the network itself.
    """
    shape = shape_of(name)
    network = on_meta(shape).to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            # About unit variance from layer to layer: nothing overflows in half precision, and
            # nothing becomes so small that a CPU slows down on it.
            bound = (3 / max(1, tensor[0].numel())) ** 0.5 if tensor.dim() > 1 else 0.1
            tensor.data.uniform_(-bound, bound, generator=generator)
    for module in network.modules():
        if getattr(module, "weight", None) is not None and module.weight.dim() == 1:
            module.weight.data.fill_(1)  # a norm
    return Target(name, network.eval().requires_grad_(False), shape.factor, shape.text)


def build_demo(device: str, dtype: torch.dtype) -> Target:
    """The UNet of the demo model that comes with the package, with its weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from ..apis import asset_path

    folder = asset_path("demo_model")
    vae = AutoencoderKL.load_config(folder, subfolder="vae")
    network = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return Target(DEMO, network.to(device).eval().requires_grad_(False), factor, 24)


def build_config(
    path: str, device: str, dtype: torch.dtype | None, options: tuple[str, ...] = ()
) -> Target:
    """The network of a MMagic config, dense, with the config's weights.

    Raises:
        ToMeError: see :func:`mmagic_tome.apis.model_config.build_model`.
    """
    from .. import remove_tome
    from ..apis.command_line import resolve_config
    from ..apis.infer import quiet_libraries
    from ..apis.model_config import build_model, load_config
    from ..hosts import find_host

    config = load_config(resolve_config(path), options)
    quiet_libraries()
    model = build_model(config, device)
    remove_tome(model)
    try:
        network = find_host(model)[1]
    except ToMeError:  # then it runs dense only
        network = model.unet
    if dtype is not None:
        network = network.to(dtype)
    network = network.eval().requires_grad_(False)
    tokenizer = getattr(model, "tokenizer", None)
    text = getattr(tokenizer, "model_max_length", 77)
    return Target(path, network, model.vae_scale_factor, text if text < 10_000 else 77)


def default_size(target: Target) -> tuple[int, int]:
    """(height, width) in pixels that the network was made for."""
    if target.name in SHAPES:
        return (SHAPES[target.name].size,) * 2
    size = getattr(getattr(target.network, "config", None), "sample_size", None) or 64
    return (
        (size * target.factor,) * 2
        if isinstance(size, int)
        else tuple(side * target.factor for side in size)
    )


# --- calls, one per family ------------------------------------------------------------------------


def _side_unit(network: nn.Module) -> int:
    """Places of the latent that its sides must be multiples of."""
    config = getattr(network, "config", None)
    if hasattr(network, "down_blocks"):
        return 2 ** (len(network.down_blocks) - 1)
    return getattr(config, "patch_size", 1)


def _unet_call(network, noise, batch, grid, text) -> Call:
    config = getattr(network, "config", None)
    channels = getattr(config, "in_channels", None) or network.in_channels
    width = getattr(config, "cross_attention_dim", None)
    if width is None:  # MMagic's DenoisingUnet has no config
        width = _text_width(network)
    x, context = noise(batch, channels, *grid), noise(batch, text, _first(width))
    timestep = torch.tensor(500, device=x.device)
    extra = {}
    if getattr(config, "addition_embed_type", None) == "text_time":
        embedded = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        extra["added_cond_kwargs"] = dict(
            text_embeds=noise(batch, embedded),
            time_ids=torch.full((batch, 6), 512.0, device=x.device, dtype=x.dtype),
        )

    def call(network: nn.Module) -> Tensor:
        return _tensor(network(x, timestep, encoder_hidden_states=context, **extra))

    return call


def _sd3_call(network, noise, batch, grid, text) -> Call:
    config = network.config
    inputs = dict(
        hidden_states=noise(batch, config.in_channels, *grid),
        encoder_hidden_states=noise(batch, text, config.joint_attention_dim),
        pooled_projections=noise(batch, config.pooled_projection_dim),
    )
    inputs["timestep"] = torch.full((batch,), 500.0, device=inputs["hidden_states"].device)
    return lambda network: _tensor(network(**inputs))


def _flux_call(network, noise, batch, grid, text) -> Call:
    config = network.config
    hidden = noise(batch, grid[0] * grid[1], config.in_channels)
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    places = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3)
    inputs = dict(
        hidden_states=hidden,
        encoder_hidden_states=noise(batch, text, config.joint_attention_dim),
        pooled_projections=noise(batch, config.pooled_projection_dim),
        timestep=torch.full((batch,), 0.5, device=hidden.device, dtype=hidden.dtype),
        img_ids=places.to(hidden.device, hidden.dtype),
        txt_ids=torch.zeros(text, 3, device=hidden.device, dtype=hidden.dtype),
    )
    if config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 3.5, device=hidden.device, dtype=hidden.dtype)
    return lambda network: _tensor(network(**inputs))


def _text_width(network: nn.Module) -> int:
    for module in network.modules():
        if hasattr(module, "attn2") and hasattr(module.attn2, "to_k"):
            return module.attn2.to_k.in_features
    raise ToMeError(f"{type(network).__name__} has no cross-attention: its text width is unknown")


def _first(value: Any) -> int:
    return value[0] if isinstance(value, (list, tuple)) else value


def _tensor(output: Any) -> Tensor:
    """The output tensor out of whatever a network returns it in."""
    if isinstance(output, Tensor):
        return output
    return output["sample"] if isinstance(output, dict) else output[0]
