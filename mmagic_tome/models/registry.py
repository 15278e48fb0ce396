# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""All model adapters, and how to add one."""

from __future__ import annotations

from ..errors import ToMeError
from .base import ModelAdapter
from .cogview import CogVideoX, CogView3Plus, CogView4
from .diffusers_unet import AnimateDiffUNet, DiffusersUNet, MMagicUNet, SpatioTemporalUNet
from .dit import DiT, HunyuanDiT, PixArt
from .flux import Bria, Chroma, Flux, Flux2, HunyuanVideo, LongCatImage, OvisImage
from .sd3 import SD3, AuraFlow, QwenImage
from .wan import LTX, SkyReelsV2, Wan
from .z_image import Lumina2, ZImage

_UNETS = (MMagicUNet, AnimateDiffUNet, SpatioTemporalUNet, DiffusersUNet)
_TRANSFORMERS = (
    *(DiT, PixArt, HunyuanDiT, SD3, AuraFlow, CogView3Plus, CogView4),
    *(Flux, Flux2, Chroma, Bria, LongCatImage, OvisImage, QwenImage, ZImage, Lumina2),
    *(Wan, SkyReelsV2, LTX, CogVideoX, HunyuanVideo),
)
# The first adapter that matches a module is used, so specific ones come first.
ADAPTERS: list[ModelAdapter] = [family() for family in (*_UNETS, *_TRANSFORMERS)]


def register_adapter(adapter: ModelAdapter) -> ModelAdapter:
    """Make a model family of your own known to :func:`~mmagic_tome.apply_tome`; return its adapter.

    Args:
        adapter: takes precedence over those registered before. One of the same class replaces an
            earlier one.

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
