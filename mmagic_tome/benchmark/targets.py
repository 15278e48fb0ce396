# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""What is run: a network of a named shape with random weights, the demo model's, or a config's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ToMeError
from .denoisers import DENOISER_MERGING, DENOISERS, denoiser_call, side_unit
from .kinds import Call, Merging, Noise, Shape, check_size
from .vits import VITS

# Name of --target -> what it is. More kinds of networks are added here.
SHAPES: dict[str, Shape] = {**DENOISERS, **VITS}
DEMO = "demo"


@dataclass
class Target:
    """A network that is ready to be run.

    Attributes:
        name (str): as the user wrote it.
        network (nn.Module): in eval mode, without gradients, on its device.
        unit (int): pixels that height and width of the picture must be multiples of.
        size (tuple): (height, width) in pixels that it was made for.
        make_call (callable): see :meth:`.kinds.Shape.call`.
        merging (Merging): how tokens are merged in it.
        counts (str | None): see :class:`.kinds.Shape`.
    """

    name: str
    network: nn.Module
    unit: int
    size: tuple[int, int]
    make_call: Callable[[nn.Module, tuple[int, int], int, Noise], Call]
    merging: Merging = DENOISER_MERGING
    counts: str | None = None

    def call(self, size: tuple[int, int], batch: int) -> Call:
        """A function that runs a network like this one on inputs that stay the same.

        Args:
            size (tuple): (height, width) of the picture in pixels.
            batch (int): batch of the network; of a denoiser with guidance twice the pictures.

        Returns:
            callable: network -> its output.

        Raises:
            ToMeError: the size is no multiple of what the network needs.
        """
        check_size(self.name, size, self.unit)
        parameter = next(self.network.parameters())
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=generator)
            return drawn.to(parameter.device, parameter.dtype)

        return self.make_call(self.network, size, batch, noise)


def shape_of(name: str) -> Shape:
    """The shape of that name; :class:`ToMeError` lists them if there is none."""
    if name not in SHAPES:
        raise ToMeError(
            f"no target {name!r}: write {DEMO}, {', '.join(SHAPES)}, or a MMagic config's path"
        )
    return SHAPES[name]


def merging_of(name: str) -> Merging:
    """How tokens are merged in a target, told without building it."""
    return SHAPES[name].merging if name in SHAPES else DENOISER_MERGING


def on_meta(shape: Shape) -> nn.Module:
    """The network of a shape without memory for its weights."""
    with torch.device("meta"):
        return shape.network()


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
    return Target(
        name,
        network.eval().requires_grad_(False),
        shape.unit,
        (shape.size, shape.size),
        shape.call,
        shape.merging,
        shape.counts,
    )


def build_demo(device: str, dtype: torch.dtype) -> Target:
    """The UNet of the demo model that comes with the package, with its weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from ..apis import asset_path

    folder = asset_path("demo_model")
    vae = AutoencoderKL.load_config(folder, subfolder="vae")
    network = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return _denoiser(DEMO, network.to(device), factor, 24)


def build_config(
    path: str, device: str, dtype: torch.dtype | None, options: tuple[str, ...] = ()
) -> Target:
    """The network of a MMagic config, dense, with the config's weights.

    Raises:
        ToMeError: see :func:`mmagic_tome.apis.model_config.build_model`.
    """
    from .. import remove_cache, remove_tome
    from ..apis.command_line import resolve_config
    from ..apis.infer import quiet_libraries
    from ..apis.model_config import build_model, load_config
    from ..models import find_adapter

    config = load_config(resolve_config(path), options)
    quiet_libraries()
    model = build_model(config, device)
    remove_tome(model)
    remove_cache(model)
    try:
        network = find_adapter(model)[1]
    except ToMeError:  # then it runs dense only
        network = model.unet
    if dtype is not None:
        network = network.to(dtype)
    tokenizer = getattr(model, "tokenizer", None)
    text = getattr(tokenizer, "model_max_length", 77)
    return _denoiser(path, network, model.vae_scale_factor, text if text < 10_000 else 77)


def _denoiser(name: str, network: nn.Module, factor: int, text: int) -> Target:
    """A denoising network that is there already."""
    side = getattr(getattr(network, "config", None), "sample_size", None) or 64
    sides = (side, side) if isinstance(side, int) else tuple(side)
    return Target(
        name,
        network.eval().requires_grad_(False),
        factor * side_unit(network),
        (sides[0] * factor, sides[1] * factor),
        lambda network, size, batch, noise: denoiser_call(
            network, size, batch, noise, factor, text
        ),
    )
