# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""CogVideoX in diffusers: video, joint attention, with and without rotary embeddings.

A block is called with the video's tokens and the text's, and returns them in this order; its
feed-forward works on both in one sequence, text first. The grid is that of :mod:`.wan`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import Block, Host
from .dit import is_a
from .rotary import with_merged_rotary
from .sd3 import REFUSED


class CogVideoX(Host):
    """Host for ``CogVideoXTransformer3DModel``, and ``ConsisIDTransformer3DModel``, which looks at
    a face between its blocks. Sites: ``attn`` = ``attn1``, ``mlp`` = ``ff``."""

    description = "CogVideoX (CogVideoXTransformer3DModel, ConsisIDTransformer3DModel)"
    timestep_position = 2

    def matches(self, module: nn.Module) -> bool:
        names = ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
        return any(is_a(module, name) for name in names)

    def blocks(self, network: nn.Module) -> list[Block]:
        return [
            Block(
                name=f"transformer_blocks.{index}",
                module=block,
                stack=network,
                downsample=1,
                sites={"attn": block.attn1, "mlp": block.ff},
                text_beside=("mlp",),
                joint=("attn", "block"),
                refused=REFUSED,
            )
            for index, block in enumerate(network.transformer_blocks)
        ]

    def grid(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        latent = args[0] if args else kwargs["hidden_states"]
        frames, _, height, width = latent.shape[1:]
        patch, patch_frames = stack.config.patch_size, stack.config.get("patch_size_t") or 1
        return -(-frames // patch_frames) * (height // patch), width // patch

    def adapt(
        self, site: str, plan: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        return with_merged_rotary(plan, args, kwargs)
