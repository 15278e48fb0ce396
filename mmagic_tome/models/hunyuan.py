# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Hunyuan-DiT and HunyuanVideo in diffusers; both use rotary embeddings.

Hunyuan-DiT has one stream with cross-attention and long skips: blocks of the second half receive
the output of a block of the first half. HunyuanVideo has double and single blocks like Flux, but
the text follows the image tokens, and a mask excludes its padding.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import Block, ModelAdapter, blocks_of
from .diffusers_unet import TARGETS
from .dit import PatchTransformer
from .rotary import merge_mask, with_merged_rotary
from .sd3 import REFUSED as REFUSED_JOINT
from .wan import REFUSED


class HunyuanDiT(PatchTransformer):
    """``HunyuanDiT2DModel``.

    Targets: ``attn`` = ``attn1``, ``crossattn`` = ``attn2`` (rotary embeddings apply to its
    queries too), ``mlp`` = ``ff``.
    """

    description = "Hunyuan-DiT (HunyuanDiT2DModel)"
    class_names = ("HunyuanDiT2DModel",)
    timestep_position = 1

    def blocks(self, network: nn.Module) -> list[Block]:
        return blocks_of(network, "blocks", **TARGETS, refused=REFUSED)

    def adapt(
        self, target: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if isinstance(kwargs.get("skip"), Tensor):
            kwargs = {**kwargs, "skip": plan.merge(kwargs["skip"])}
        return with_merged_rotary(plan, args, kwargs)


class HunyuanVideo(ModelAdapter):
    """``HunyuanVideoTransformer3DModel``.

    Targets of double blocks: ``attn`` = ``attn``, ``mlp`` = ``ff`` (the video stream's). Of single
    blocks: ``attn`` = ``attn``, ``mlp`` = ``proj_mlp`` and ``act_mlp``. Grid: that of :mod:`.wan`.
    """

    description = "HunyuanVideo (HunyuanVideoTransformer3DModel)"
    class_names = ("HunyuanVideoTransformer3DModel",)
    timestep_position = 1
    takes_masks = True

    def blocks(self, network: nn.Module) -> list[Block]:
        refused = dict(REFUSED_JOINT)
        if network.config.image_condition_type == "token_replace":
            refused["block"] = (
                "the tokens of the first frame have their own timestep, which does not fit merged "
                "tokens. Write targets=['attn', 'mlp']"
            )
        both = dict(joint=("attn", "block"), refused=refused)
        single = dict(mlp=("proj_mlp", "act_mlp"), mlp_first=True, joint_sequence=("mlp",))
        return [
            *blocks_of(network, "transformer_blocks", **both),
            *blocks_of(network, "single_transformer_blocks", **single, **both),
        ]

    def grid(self, grid_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        latent = args[0] if args else kwargs["hidden_states"]
        patch, patch_frames = grid_module.config.patch_size, grid_module.config.patch_size_t
        frames, height, width = latent.shape[2:]
        return (frames // patch_frames) * (height // patch), width // patch

    def num_text_tokens_before(self, args: tuple, kwargs: dict[str, Any]) -> int:
        return 0

    def adapt(
        self, target: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if len(args) > 3:
            args = (*args[:3], merge_mask(args[3], plan, num_before=0), *args[4:])
        elif kwargs.get("attention_mask") is not None:
            mask = merge_mask(kwargs["attention_mask"], plan, num_before=0)
            kwargs = {**kwargs, "attention_mask": mask}
        return with_merged_rotary(plan, args, kwargs)
