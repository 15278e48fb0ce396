# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Vision transformers of timm."""

from __future__ import annotations

import sys

from torch import nn

from ...errors import ToMeError
from .base import Heads, ViT, ViTBlock, instances, join

_MODULE = "timm.models.vision_transformer"


class TimmViT:
    """VisionTransformer of timm and its subclasses."""

    description = "timm VisionTransformer"

    def find(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """(path, module) of every one inside a model."""
        return instances(model, getattr(sys.modules.get(_MODULE), "VisionTransformer", None))

    def describe(self, path: str, network: nn.Module, model: nn.Module) -> ViT:
        """The modules to hook.

        Raises:
            ToMeError: blocks other than Block with Attention.
        """
        return ViT(
            description=self.description,
            network=network,
            blocks=[
                _block(join(path, "blocks", str(index)), block)
                for index, block in enumerate(network.blocks)
            ],
            prefix=network.num_prefix_tokens,
            reads_all=network.attn_pool is not None or network.global_pool != "token",
            mask="attn_mask",
        )


def _block(name: str, block: nn.Module) -> ViTBlock:
    library = sys.modules[_MODULE]
    attention = getattr(block, "attn", None)
    if type(block) is not library.Block or type(attention) is not library.Attention:
        raise ToMeError(
            f"{name} is a {type(block).__name__} with {type(attention).__name__}; of timm's blocks "
            "only Block with Attention can be merged"
        )
    return ViTBlock(
        name=name,
        module=block,
        first=block.norm1,
        attention=attention,
        output=attention,
        norm=block.norm2,
        last=block.mlp,
        sources={
            "queries": (attention.q_norm, Heads(0)),
            "keys": (attention.k_norm, Heads(0)),
            "values": (attention.qkv, Heads(attention.head_dim, 2, 3)),
        },
        hidden=next(part.out_features for part in block.mlp.modules() if hasattr(part, "weight")),
    )
