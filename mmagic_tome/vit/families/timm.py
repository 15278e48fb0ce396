# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""Vision transformers of timm."""

from __future__ import annotations

import sys

from torch import nn

from .base import Family, Heads, ViT, ViTBlock, check_types


class TimmViT(Family):
    """VisionTransformer of timm and its subclasses."""

    description = "timm VisionTransformer"
    library = "timm.models.vision_transformer"
    network = "VisionTransformer"
    layers = "blocks"

    def describe(self, path: str, network: nn.Module, model: nn.Module) -> ViT:
        return ViT(
            network=network,
            blocks=self.blocks(path, network),
            prefix=network.num_prefix_tokens,
            reads_all=network.attn_pool is not None or network.global_pool != "token",
            mask="attn_mask",
        )

    def block(self, name: str, layer: nn.Module) -> ViTBlock:
        library, attention = sys.modules[self.library], getattr(layer, "attn", None)
        check_types(name, layer, attention, library.Block, library.Attention)
        linear = next(part for part in layer.mlp.modules() if hasattr(part, "weight"))
        return ViTBlock(
            name=name,
            module=layer,
            first=layer.norm1,
            attention=attention,
            output=attention,
            norm=layer.norm2,
            last=layer.mlp,
            sources={
                "queries": (attention.q_norm, Heads(0)),
                "keys": (attention.k_norm, Heads(0)),
                "values": (attention.qkv, Heads(attention.head_dim, 2, 3)),
            },
            hidden=linear.out_features,
        )
