# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Transformers of diffusers with one stream of tokens: DiT, PixArt, Hunyuan-DiT; for videos Wan,
SkyReels V2, LTX-Video.

Text, if any, enters by cross-attention only, so no sequence contains text tokens. Targets: ``attn``
= ``attn1``, ``crossattn`` = ``attn2``, ``mlp`` = ``ff``, Wan's ``ffn``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import ToMeError
from .base import argument, is_a
from .transformer import BASIC, ROTARY, RotaryTransformer, Transformer


class DiT(Transformer):
    description = "DiT (DiTTransformer2DModel)"
    class_names = ("DiTTransformer2DModel",)
    timestep_position = 1
    lists = (
        (
            "transformer_blocks",
            dict(
                BASIC,
                context_argument="encoder_hidden_states",
                mask_argument="attention_mask",
            ),
        ),
    )


class PixArt(DiT):
    description = (
        "PixArt-alpha and -sigma (PixArtTransformer2DModel, Transformer2DModel over patches)"
    )
    class_names = ("PixArtTransformer2DModel",)
    timestep_position = 2

    def matches(self, module: nn.Module) -> bool:
        patches = is_a(module, "Transformer2DModel") and getattr(module, "is_input_patches", False)
        return patches or super().matches(module)


class HunyuanDiT(RotaryTransformer):
    """Rotary embeddings apply to queries of cross-attention too. Long skips: blocks of the second
    half receive the output of a block of the first half."""

    description = "Hunyuan-DiT (HunyuanDiT2DModel)"
    class_names = ("HunyuanDiT2DModel",)
    timestep_position = 1
    lists = (("blocks", ROTARY),)

    def adapt(self, target: str, plan: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if isinstance(kwargs.get("skip"), Tensor):
            kwargs = {**kwargs, "skip": plan.merge(kwargs["skip"])}
        return super().adapt(target, plan, args, kwargs)


class Wan(RotaryTransformer):
    """The control branch of VACE is left unchanged."""

    description = "Wan (WanTransformer3DModel, WanVACETransformer3DModel)"
    class_names = ("WanTransformer3DModel", "WanVACETransformer3DModel")
    timestep_position = 1
    lists = (("blocks", dict(ROTARY, mlp="ffn")),)

    def is_per_token(self, modulation: Tensor) -> bool:
        return modulation.dim() == 4  # (B, N, 6, C)

    def adapt(self, target: str, plan: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        modulation = argument(args, kwargs, 2, "temb")
        if isinstance(modulation, Tensor) and self.is_per_token(modulation):
            raise ToMeError(
                f"{target} received one timestep per token, which does not fit merged tokens; "
                "write targets=['attn', 'mlp']"
            )
        return super().adapt(target, plan, args, kwargs)


class SkyReelsV2(Wan):
    description = "SkyReels V2 (SkyReelsV2Transformer3DModel)"
    class_names = ("SkyReelsV2Transformer3DModel",)

    def check(self, target: str, args: tuple, kwargs: dict) -> None:
        # Fifth argument of a block, third of its attention.
        position = {"block": 4, "attn": 2, "attn_kv": 2}.get(target.rpartition(".")[2])
        if position is not None and len(args) > position and args[position] is not None:
            raise ToMeError(
                f"{target} received a causal mask over frames (num_frame_per_block > 1), which "
                "does not fit tokens merged across frames; write targets=['crossattn', 'mlp']"
            )


class LTX(Wan):
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
