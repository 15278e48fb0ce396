# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Wan, SkyReels V2 and LTX-Video in diffusers: video, one stream with cross-attention, rotary
embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import ToMeError
from .base import argument
from .transformer import ROTARY, RotaryTransformer


class _OneStream(RotaryTransformer):
    def adapt(self, target: str, plan: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        modulation = argument(args, kwargs, 2, "temb")
        if isinstance(modulation, Tensor) and self.is_per_token(modulation):
            raise ToMeError(
                f"{target} received one timestep per token, which does not fit merged tokens; "
                "write targets=['attn', 'mlp']"
            )
        return super().adapt(target, plan, args, kwargs)


class Wan(_OneStream):
    """``WanTransformer3DModel`` and ``WanVACETransformer3DModel``, whose control branch is left
    unchanged.

    Targets: ``attn`` = ``attn1``, ``crossattn`` = ``attn2``, ``mlp`` = ``ffn``.
    """

    description = "Wan (WanTransformer3DModel, WanVACETransformer3DModel)"
    class_names = ("WanTransformer3DModel", "WanVACETransformer3DModel")
    timestep_position = 1
    lists = (("blocks", dict(ROTARY, mlp="ffn")),)

    def is_per_token(self, modulation: Tensor) -> bool:
        return modulation.dim() == 4  # (B, N, 6, C)


class SkyReelsV2(Wan):
    description = "SkyReels V2 (SkyReelsV2Transformer3DModel)"
    class_names = ("SkyReelsV2Transformer3DModel",)

    def adapt(self, target: str, plan: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # Fifth argument of a block, third of its attention.
        position = {"block": 4, "attn": 2}.get(target.rpartition(".")[2])
        if position is not None and len(args) > position and args[position] is not None:
            raise ToMeError(
                f"{target} received a causal mask over frames (num_frame_per_block > 1), which "
                "does not fit tokens merged across frames; write targets=['crossattn', 'mlp']"
            )
        return super().adapt(target, plan, args, kwargs)


class LTX(_OneStream):
    """``LTXVideoTransformer3DModel``. Grid: of the sizes that it is called with."""

    description = "LTX-Video (LTXVideoTransformer3DModel)"
    class_names = ("LTXVideoTransformer3DModel",)
    timestep_position = 2
    lists = (("transformer_blocks", ROTARY),)

    def grid(self, grid_module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int]:
        names = ("num_frames", "height", "width")
        sizes = [argument(args, kwargs, 4 + i, name) for i, name in enumerate(names)]
        if None in sizes:
            raise ToMeError(
                "LTX-Video was called without num_frames, height and width (with video_coords "
                "instead, as for given frames?), so the token grid is unknown; call the model "
                "without token merging"
            )
        frames, height, width = sizes
        return frames * height, width

    def is_per_token(self, modulation: Tensor) -> bool:
        return modulation.shape[1] > 1  # (B, N or 1, C)
