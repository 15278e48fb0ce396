# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""UNets and an autoencoder small enough for tests, with random weights everywhere.

``NETWORKS`` is what the tests of all of them go through; docs/reference/support.md lists it.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tiny import randomise, tiny_inputs, tiny_unet, tiny_unet_config, tiny_vae_config
from tiny_transformers import TEXT, WIDTH

FRAMES = 3  # of a clip


def tiny_vae(levels=4, **changes):
    """An ``AutoencoderKL`` with a factor of 2 ** (levels - 1)."""
    from diffusers import AutoencoderKL

    return randomise(AutoencoderKL(**{**tiny_vae_config(levels), **changes}))


def unet_of(class_name, seed=0, **changes):
    """A network of two levels: as :func:`tiny.tiny_unet` in all options that the class has."""
    import diffusers

    kind = getattr(diffusers, class_name)
    known = inspect.signature(kind.__init__).parameters
    options = {name: value for name, value in tiny_unet_config().items() if name in known}
    return randomise(kind(**{**options, **changes}), seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_controlnet(seed=1):
    """A ``ControlNetModel`` that fits :func:`tiny.tiny_unet`; its outputs are not zero."""
    channels = (8, 8, 16, 16)
    return unet_of("ControlNetModel", seed, conditioning_embedding_out_channels=channels)


def controlnet_inputs(batch=2, size=(8, 8)):
    image = noise(batch, 3, *(8 * side for side in size))
    return {**tiny_inputs(batch, size), "controlnet_cond": image}


def kandinsky_unet():
    """Its attention works on the image itself; there are no transformer blocks."""
    return tiny_unet(
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        out_channels=8,  # with the variance
        attention_head_dim=8,
        addition_embed_type="image",
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="image_proj",
        resnet_time_scale_shift="scale_shift",
    )


def kandinsky_inputs(batch=2, size=(8, 8)):
    """Of ``size`` tokens: the finest level has no attention."""
    inputs = tiny_inputs(batch, tuple(2 * side for side in size))
    embeds = dict(image_embeds=noise(batch, WIDTH, seed=1))
    return {**inputs, "encoder_hidden_states": None, "added_cond_kwargs": embeds}


def video_unet():
    """Stable Video Diffusion's: its frames are merged one by one."""
    return unet_of(
        "UNetSpatioTemporalConditionModel",
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),  # its norms have 32 groups
        num_attention_heads=(2, 4),
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    )


def video_inputs(batch=2, size=(8, 8)):
    sample, image = noise(batch, FRAMES, 4, *size), noise(batch, 1, WIDTH, seed=1)
    inputs = dict(sample=sample, encoder_hidden_states=image, added_time_ids=noise(batch, 3))
    return {**tiny_inputs(), **inputs}


def motion_unet():
    """diffusers' UNet of AnimateDiff; MMagic's is laid out in the same way."""
    return unet_of(
        "UNetMotionModel",
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        num_attention_heads=2,
        motion_num_attention_heads=2,
    )


def motion_inputs(batch=2, size=(8, 8)):
    sample, text = noise(batch, 4, FRAMES, *size), noise(batch, TEXT, WIDTH, seed=1)
    text = text.repeat_interleave(FRAMES, dim=0)  # as its pipeline does
    return dict(tiny_inputs(), sample=sample, encoder_hidden_states=text)


@dataclass(frozen=True)
class Network:
    """A kind of UNet: what users call it, the class, odd grids that it is tested on in tokens.

    ``inputs`` takes a batch and a grid and returns keyword arguments of a call. ``layered`` builds
    one with several levels, where ``build`` does not.
    """

    title: str
    class_name: str
    build: Callable
    inputs: Callable
    grids: tuple = ((6, 10), (8, 8))
    compiles: str = "the whole network"
    layered: Callable | None = None


_NETWORKS = (
    Network(
        "Stable Diffusion 1, 2, XL and other UNets",
        "UNet2DConditionModel and alike",
        lambda: tiny_unet(levels=1),
        tiny_inputs,
        # With one level; others want multiples of their factor.
        ((33, 31), (17, 90)),
        layered=tiny_unet,
    ),
    Network("ControlNet", "ControlNetModel", tiny_controlnet, controlnet_inputs, ((8, 8),)),
    Network(
        "Kandinsky 2.2: attention on the image itself",
        "UNet2DConditionModel with added keys",
        kandinsky_unet,
        kandinsky_inputs,
        ((7, 9), (3, 20), (8, 8)),
    ),
    Network("Stable Video Diffusion", "UNetSpatioTemporalConditionModel", video_unet, video_inputs),
    Network(
        "AnimateDiff, frame by frame or across frames",
        "UNetMotionModel, MMagic's UNet3DConditionMotionModel",
        motion_unet,
        motion_inputs,
    ),
)
NETWORKS = {network.title: network for network in _NETWORKS}
