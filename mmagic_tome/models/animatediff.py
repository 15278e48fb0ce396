# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""UNets of AnimateDiff: MMagic's and diffusers'.

Their spatial blocks are those of an image UNet and receive the frames of a clip as batch entries:
(B * F, N, C) tokens. Tokens are merged within each frame, or across the frames of a clip
(``across_frames=True``). The motion modules in between attend along the frames of one position
and are left unchanged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..merging.frames import FramePlan
from .base import Block, is_a
from .diffusers_unet import DiffusersUNet

# Arguments of blocks and cross-attention that repeat for every frame of a clip.
_PER_FRAME = ("encoder_hidden_states", "encoder_attention_mask", "attention_mask")

# Attention along the frames inside a block: an option of MMagic's that its configs leave off.
_ALONG_FRAMES = dict.fromkeys(
    ("block", "stack"),
    "its attention along the frames of one position (unet_use_temporal_attention=True) needs all "
    "positions. Merge inside the block: targets=['attn', 'mlp']",
)


class AnimateDiffUNet(DiffusersUNet):
    """MMagic's ``UNet3DConditionMotionModel`` and diffusers' ``UNetMotionModel``.

    Blocks and targets: those of an image UNet. Frames: the third size of the (B, C, F, h, w)
    input.
    """

    description = (
        "AnimateDiff's UNets (MMagic's UNet3DConditionMotionModel, diffusers' UNetMotionModel)"
    )
    class_names = ("UNet3DConditionMotionModel", "UNetMotionModel")
    has_frames = True

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, *self.class_names) and super().matches(module)

    def blocks(self, network: nn.Module) -> list[Block]:
        return [
            replace(block, refused={**block.refused, **_ALONG_FRAMES})
            if getattr(block.module, "attn_temp", None) is not None
            else block
            for block in super().blocks(network)
        ]

    def frames(self, args: tuple, kwargs: dict[str, Any]) -> int:
        sample = args[0] if args else kwargs["sample"]
        return sample.shape[2]

    def adapt(
        self, target: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if not isinstance(plan, FramePlan):
            return args, kwargs
        # Merged tokens of a clip are one batch entry, so the text is needed once per clip.
        once = {
            name: kwargs[name][:: plan.num_frames]
            for name in _PER_FRAME
            if isinstance(kwargs.get(name), Tensor) and kwargs[name].shape[0] == plan.batch
        }
        return args, {**kwargs, **once}
