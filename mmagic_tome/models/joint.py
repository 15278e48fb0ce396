# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Transformers of diffusers with joint attention of image and text tokens: Stable Diffusion 3 and
3.5, AuraFlow, Qwen-Image, CogView 3 Plus and 4, CogVideoX.

A block receives image tokens (``hidden_states``) and text tokens (``encoder_hidden_states``) and
returns (text, image), those of CogView and CogVideoX (image, text); attention returns (image,
text). Only image tokens are merged. Targets: ``attn`` = ``attn``, CogView's ``attn1``, ``mlp`` =
``ff`` (the image stream's).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import ToMeError
from .base import Block, argument
from .transformer import JOINT, TEXT_FIRST, RotaryTransformer, Transformer, merge_rotary

_COGVIEW4_REFUSED = dict(
    JOINT["refused"],
    mlp="one feed-forward runs on the image tokens and then on the text tokens. Write "
    "targets=['attn'] or targets='block'",
)
_COGVIEW_LISTS = (("transformer_blocks", dict(JOINT, attn="attn1", joint_sequence=("mlp",))),)


class SD3(Transformer):
    """Blocks of SD 3.5 may have a parallel self-attention, ``attn2``, which is merged too."""

    description = "Stable Diffusion 3 and 3.5 (SD3Transformer2DModel)"
    class_names = ("SD3Transformer2DModel",)
    timestep_position = 3
    lists = (("transformer_blocks", dict(TEXT_FIRST, image_keys="first")),)

    def blocks(self, network: nn.Module) -> list[Block]:
        return [
            block
            if block.module.attn2 is None
            else replace(block, second_attention={"attn": block.module.attn2})
            for block in super().blocks(network)
        ]


class AuraFlow(Transformer):
    """Joint blocks, then single blocks on one sequence: register, text, image tokens."""

    description = "AuraFlow (AuraFlowTransformer2DModel)"
    class_names = ("AuraFlowTransformer2DModel",)
    timestep_position = 2
    timestep_scale = 1.0
    lists = (
        ("joint_transformer_blocks", TEXT_FIRST),
        ("single_transformer_blocks", dict(JOINT, joint_sequence=("attn", "mlp", "block"))),
    )


class QwenImage(RotaryTransformer):
    """``mlp`` = ``img_mlp``. Rotary table: a pair, rows of the image tokens and of the text."""

    description = "Qwen-Image (QwenImageTransformer2DModel)"
    class_names = ("QwenImageTransformer2DModel",)
    timestep_position = 3
    timestep_scale = 1.0
    lists = (("transformer_blocks", dict(TEXT_FIRST, mlp="img_mlp")),)

    def grid(self, grid_module: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int]:
        shapes = argument(args, kwargs, 4, "img_shapes")
        images = shapes[0] if isinstance(shapes, list) else shapes
        images = images if isinstance(images, list) else [images]
        if len(images) > 1:
            raise ToMeError(
                f"img_shapes has {len(images)} images in one sequence (reference images, layers), "
                "so there is no single grid to merge on; call the model without token merging"
            )
        ((frames, height, width),) = images
        return frames * height, width

    def adapt(self, target: str, plan: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # Positions are those of a block's arguments under gradient checkpointing.
        if argument(args, kwargs, 6, "modulate_index") is not None:
            raise ToMeError(
                f"{target} received a modulation per token (modulate_index), which does not fit "
                "merged tokens; write targets=['attn', 'mlp']"
            )
        return super().adapt(target, plan, args, kwargs)

    def merged_table(self, table: tuple, plan: Any) -> tuple:
        image, text = table
        return merge_rotary(image, plan), text


class CogVideoX(RotaryTransformer):
    description = "CogVideoX (CogVideoXTransformer3DModel, ConsisIDTransformer3DModel)"
    class_names = ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
    timestep_position = 2
    lists = _COGVIEW_LISTS
    frames_axis = 1


class CogView3Plus(Transformer):
    description = "CogView 3 Plus (CogView3PlusTransformer2DModel)"
    class_names = ("CogView3PlusTransformer2DModel",)
    timestep_position = 2
    lists = _COGVIEW_LISTS


class CogView4(RotaryTransformer):
    description = "CogView 4 (CogView4Transformer2DModel)"
    class_names = ("CogView4Transformer2DModel",)
    timestep_position = 2
    takes_masks = True  # they cover text only
    lists = (
        ("transformer_blocks", dict(JOINT, attn="attn1", mlp=None, refused=_COGVIEW4_REFUSED)),
    )
