# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""AuraFlow in diffusers: joint blocks as those of Stable Diffusion 3, then single blocks.

Single blocks work on one sequence: register tokens and text in front, the picture behind. Positions
are part of the tokens from the start.
"""

from __future__ import annotations

from torch import nn

from .base import Block
from .dit import PatchTransformer, is_a
from .sd3 import REFUSED


class AuraFlow(PatchTransformer):
    """Host for ``AuraFlowTransformer2DModel``. Sites: ``attn`` = ``attn``, ``mlp`` = ``ff``."""

    description = "AuraFlow (AuraFlowTransformer2DModel)"
    timestep_position = 2

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, "AuraFlowTransformer2DModel")

    def blocks(self, network: nn.Module) -> list[Block]:
        lists = {
            "joint_transformer_blocks": dict(returns={"block": 1}),
            "single_transformer_blocks": dict(text_beside=("attn", "mlp", "block")),
        }
        return [
            Block(
                name=f"{name}.{index}",
                module=block,
                stack=network,
                downsample=1,
                sites={"attn": block.attn, "mlp": block.ff},
                joint=("attn", "block"),
                refused=REFUSED,
                **own,
            )
            for name, own in lists.items()
            for index, block in enumerate(getattr(network, name))
        ]

    def noise_level(self, timestep: float) -> float:
        # Pipelines divide by 1000 before the call.
        return timestep
