# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Hunyuan-DiT and HunyuanVideo in diffusers; both have rotary embeddings.

Hunyuan-DiT has one stream with cross-attention and long skips: blocks of the second half are given
the tokens that left one of the first half. HunyuanVideo has double and single blocks as Flux, but
the text is behind the picture, and a mask leaves out its padding.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import Block, Host
from .diffusers_unet import SITES
from .dit import PatchTransformer, is_a
from .rotary import merge_mask, with_merged_rotary
from .sd3 import REFUSED as REFUSED_JOINT
from .wan import REFUSED


class HunyuanDiT(PatchTransformer):
    """Host for ``HunyuanDiT2DModel``.

    Sites: ``attn`` = ``attn1``, ``crossattn`` = ``attn2`` (positions are part of its queries too),
    ``mlp`` = ``ff``.
    """

    description = "Hunyuan-DiT (HunyuanDiT2DModel)"
    timestep_position = 1

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, "HunyuanDiT2DModel")

    def blocks(self, network: nn.Module) -> list[Block]:
        return [
            Block(
                name=f"blocks.{index}",
                module=block,
                stack=network,
                downsample=1,
                sites={kind: getattr(block, name) for kind, name in SITES.items()},
                refused=REFUSED,
            )
            for index, block in enumerate(network.blocks)
        ]

    def adapt(
        self, site: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if isinstance(kwargs.get("skip"), Tensor):
            kwargs = {**kwargs, "skip": plan.merge(kwargs["skip"])}
        return with_merged_rotary(plan, args, kwargs)


class HunyuanVideo(Host):
    """Host for ``HunyuanVideoTransformer3DModel``.

    Sites of double blocks: ``attn`` = ``attn``, ``mlp`` = ``ff`` (the video's). Of single
    blocks: ``attn`` = ``attn``, ``mlp`` = ``proj_mlp`` and ``act_mlp``. Grid: that of :mod:`.wan`.
    """

    description = "HunyuanVideo (HunyuanVideoTransformer3DModel)"
    timestep_position = 1
    takes_masks = True

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, "HunyuanVideoTransformer3DModel")

    def blocks(self, network: nn.Module) -> list[Block]:
        common = dict(stack=network, downsample=1, joint=("attn", "block"))
        refused = dict(REFUSED_JOINT)
        if network.config.image_condition_type == "token_replace":
            refused["block"] = (
                "the tokens of the first frame have a timestep of their own there, which does not "
                "fit merged tokens. Write sites=['attn', 'mlp']"
            )
        double = [
            Block(
                name=f"transformer_blocks.{index}",
                module=block,
                sites={"attn": block.attn, "mlp": block.ff},
                refused=refused,
                **common,
            )
            for index, block in enumerate(network.transformer_blocks)
        ]
        single = [
            Block(
                name=f"single_transformer_blocks.{index}",
                module=block,
                sites={"mlp": [block.proj_mlp, block.act_mlp], "attn": block.attn},
                text_beside=("mlp",),
                refused=refused,
                **common,
            )
            for index, block in enumerate(network.single_transformer_blocks)
        ]
        return double + single

    def grid(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        latent = args[0] if args else kwargs["hidden_states"]
        patch, patch_frames = stack.config.patch_size, stack.config.patch_size_t
        frames, height, width = latent.shape[2:]
        return (frames // patch_frames) * (height // patch), width // patch

    def text_before(self, args: tuple, kwargs: dict[str, Any]) -> int:
        return 0

    def adapt(
        self, site: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if len(args) > 3:
            args = (*args[:3], merge_mask(args[3], plan, before=0), *args[4:])
        elif kwargs.get("attention_mask") is not None:
            mask = merge_mask(kwargs["attention_mask"], plan, before=0)
            kwargs = {**kwargs, "attention_mask": mask}
        return with_merged_rotary(plan, args, kwargs)
