# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""LTX-Video in diffusers: one stream with cross-attention, rotary embeddings.

The grid is that of :mod:`.wan`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import ToMeError
from .base import Block, ModelAdapter, blocks_of
from .diffusers_unet import TARGETS
from .rotary import with_merged_rotary
from .wan import PER_TOKEN, REFUSED

# Positions of the sizes among the arguments of the network.
_SIZES = {"num_frames": 4, "height": 5, "width": 6}


class LTX(ModelAdapter):
    """``LTXVideoTransformer3DModel``.

    Targets: ``attn`` = ``attn1``, ``crossattn`` = ``attn2``, ``mlp`` = ``ff``.
    """

    description = "LTX-Video (LTXVideoTransformer3DModel)"
    class_names = ("LTXVideoTransformer3DModel",)
    timestep_position = 2

    def blocks(self, network: nn.Module) -> list[Block]:
        return blocks_of(network, "transformer_blocks", **TARGETS, refused=REFUSED)

    def grid(self, grid_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        frames, height, width = (
            args[position] if len(args) > position else kwargs.get(name)
            for name, position in _SIZES.items()
        )
        if None in (frames, height, width):
            raise ToMeError(
                "LTX-Video was called without num_frames, height and width (with video_coords "
                "instead, as for given frames?), so the token grid is unknown; call the model "
                "without token merging"
            )
        return frames * height, width

    def adapt(
        self, target: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        modulation = args[2] if len(args) > 2 else kwargs.get("temb")
        if isinstance(modulation, Tensor) and modulation.shape[1] > 1:
            raise ToMeError(f"{target} {PER_TOKEN}")
        return with_merged_rotary(plan, args, kwargs)
