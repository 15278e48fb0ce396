# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""AuraFlow in diffusers: joint blocks like Stable Diffusion 3, then single blocks.

Single blocks run on one sequence: register and text tokens first, then image tokens. Positions are
added to the tokens once, before the first block.
"""

from __future__ import annotations

from torch import nn

from .base import Block, blocks_of
from .dit import PatchTransformer
from .sd3 import REFUSED


class AuraFlow(PatchTransformer):
    """``AuraFlowTransformer2DModel``. Targets: ``attn`` = ``attn``, ``mlp`` = ``ff``."""

    description = "AuraFlow (AuraFlowTransformer2DModel)"
    class_names = ("AuraFlowTransformer2DModel",)
    timestep_position = 2
    timestep_scale = 1.0

    def blocks(self, network: nn.Module) -> list[Block]:
        lists = {
            "joint_transformer_blocks": dict(output_index={"block": 1}),
            "single_transformer_blocks": dict(joint_sequence=("attn", "mlp", "block")),
        }
        return [
            block
            for name, own in lists.items()
            for block in blocks_of(network, name, joint=("attn", "block"), refused=REFUSED, **own)
        ]
