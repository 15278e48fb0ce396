# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""LTX-Video in diffusers: one stream with cross-attention, rotary embeddings for every clip.

Tokens lie on a grid of frames, rows and columns, as in :mod:`.wan`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import ToMeError
from .base import Block, Host
from .diffusers_unet import SITES
from .dit import is_a
from .rotary import with_merged_rotary
from .wan import REFUSED

# Positions of the sizes among the arguments of the network.
_SIZES = {"num_frames": 4, "height": 5, "width": 6}


class LTX(Host):
    """Host for ``LTXVideoTransformer3DModel``.

    Sites: ``attn`` = ``attn1``, ``crossattn`` = ``attn2``, ``mlp`` = ``ff``.
    """

    description = "LTX-Video (LTXVideoTransformer3DModel)"
    timestep_position = 2

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, "LTXVideoTransformer3DModel")

    def blocks(self, network: nn.Module) -> list[Block]:
        return [
            Block(
                name=f"transformer_blocks.{index}",
                module=block,
                stack=network,
                downsample=1,
                sites={kind: getattr(block, name) for kind, name in SITES.items()},
                refused=REFUSED,
            )
            for index, block in enumerate(network.transformer_blocks)
        ]

    def timestep(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        timestep = super().timestep(args, kwargs)
        if isinstance(timestep, Tensor) and timestep.dim() == 2:
            # One per token: those of a given first frame are 0 throughout, the last are not.
            return timestep[:, -1]
        return timestep

    def grid(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        frames, height, width = (
            args[position] if len(args) > position else kwargs.get(name)
            for name, position in _SIZES.items()
        )
        if None in (frames, height, width):
            raise ToMeError(
                "LTX-Video was called without num_frames, height and width (video_coords in their "
                "place, with given frames in front?), so that its tokens are on no known grid; "
                "call the model without token merging"
            )
        return frames * height, width

    def adapt(
        self, site: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        modulation = args[2] if len(args) > 2 else kwargs.get("temb")
        if isinstance(modulation, Tensor) and modulation.shape[1] > 1:
            raise ToMeError(
                f"{site} is given a timestep per token, which does not fit merged tokens; write "
                "sites=['attn', 'mlp']"
            )
        return with_merged_rotary(plan, args, kwargs)
