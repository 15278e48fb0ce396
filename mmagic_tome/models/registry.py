# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""All model adapters, and how to add one."""

from __future__ import annotations

from ..errors import ToMeError
from .animatediff import AnimateDiffUNet
from .auraflow import AuraFlow
from .base import ModelAdapter
from .cogvideox import CogVideoX
from .cogview import CogView3Plus, CogView4
from .diffusers_unet import DiffusersUNet, SpatioTemporalUNet
from .dit import DiT, PixArt
from .flux import Bria, Chroma, Flux, Flux2, LongCatImage, OvisImage
from .hunyuan import HunyuanDiT, HunyuanVideo
from .ltx import LTX
from .mmagic_unet import MMagicUNet
from .qwen_image import QwenImage
from .sd3 import SD3
from .wan import SkyReelsV2, Wan
from .z_image import Lumina2, ZImage

# The first adapter that matches a module is used, so specific ones come first.
ADAPTERS: list[ModelAdapter] = [
    MMagicUNet(),
    AnimateDiffUNet(),
    SpatioTemporalUNet(),
    DiffusersUNet(),
    DiT(),
    PixArt(),
    HunyuanDiT(),
    SD3(),
    AuraFlow(),
    CogView3Plus(),
    CogView4(),
    Flux(),
    Flux2(),
    Chroma(),
    Bria(),
    LongCatImage(),
    OvisImage(),
    QwenImage(),
    ZImage(),
    Lumina2(),
    Wan(),
    SkyReelsV2(),
    LTX(),
    CogVideoX(),
    HunyuanVideo(),
]


def register_adapter(adapter: ModelAdapter) -> ModelAdapter:
    """Make a model family of your own known to :func:`~mmagic_tome.apply_tome`.

    Args:
        adapter: takes precedence over those registered before. One of the same class replaces an
            earlier one.

    Returns:
        ModelAdapter: ``adapter``.

    Raises:
        ToMeError: not an instance of :class:`ModelAdapter`, or one without a description.
    """
    if not isinstance(adapter, ModelAdapter) or not getattr(adapter, "description", None):
        raise ToMeError(
            "a model adapter is an instance of a subclass of mmagic_tome.models.ModelAdapter with "
            f"a description, got {adapter!r}; see docs/adding_a_model.md"
        )
    ADAPTERS[:] = [adapter, *(other for other in ADAPTERS if type(other) is not type(adapter))]
    return adapter
