# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""CogVideoX in diffusers: video, joint attention, with and without rotary embeddings.

A block receives and returns (video, text) tokens; its feed-forward runs on both in one sequence,
text first. The grid is that of :mod:`.wan`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import Block, ModelAdapter, blocks_of
from .rotary import with_merged_rotary
from .sd3 import REFUSED


class CogVideoX(ModelAdapter):
    """``CogVideoXTransformer3DModel``, and ``ConsisIDTransformer3DModel``, which attends to a face
    between its blocks. Targets: ``attn`` = ``attn1``, ``mlp`` = ``ff``."""

    description = "CogVideoX (CogVideoXTransformer3DModel, ConsisIDTransformer3DModel)"
    class_names = ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
    timestep_position = 2

    def blocks(self, network: nn.Module) -> list[Block]:
        flags = dict(joint_sequence=("mlp",), joint=("attn", "block"), refused=REFUSED)
        return blocks_of(network, "transformer_blocks", attn="attn1", **flags)

    def grid(self, grid_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        latent = args[0] if args else kwargs["hidden_states"]
        frames, _, height, width = latent.shape[1:]
        config = grid_module.config
        patch, patch_frames = config.patch_size, config.get("patch_size_t") or 1
        return -(-frames // patch_frames) * (height // patch), width // patch

    def adapt(
        self, target: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        return with_merged_rotary(plan, args, kwargs)
